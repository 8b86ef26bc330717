"""What a model is, and CLIP models built from open_clip's and timm's modules."""

from typing import Any


def __getattr__(name: str) -> Any:
    # `compt export` prints `compt.models.register_swin(...)` to users, so this name has to stay.
    # Importing it at the top would make every light module below this package load torch.
    if name == "register_swin":
        from compt.models.swin import register_swin

        return register_swin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
