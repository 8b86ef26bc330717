"""Chain-of-Models Pre-Training: train a family of CLIP models, each from the next smaller one.

`import compt` loads nothing else: a name of `__all__` is imported when it is used (docs/api.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compt.api.functions import (
        Chain,
        LoadedModel,
        contrastive_loss,
        create_model,
        evaluate_model,
        expand_model,
        feature_distillation,
        list_models,
        load_model,
        plan_chain,
    )
    from compt.recipe.schema import Recipe

__version__ = "0.1.0"

__all__ = [
    "list_models",
    "create_model",
    "load_model",
    "LoadedModel",
    "expand_model",
    "Recipe",
    "plan_chain",
    "Chain",
    "evaluate_model",
    "contrastive_loss",
    "feature_distillation",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from compt.api import functions

    return getattr(functions, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
