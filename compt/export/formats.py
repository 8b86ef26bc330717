"""The table of formats that `compt export --to` writes.

A new format is one entry here and one function `(source: Artefact, folder: Path) -> list[str]`, which writes its files
into an empty folder. It returns what a user has to know, as sentences in Markdown. It raises ArtefactError, before it
writes, for what the format cannot say.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

from compt.errors import ConfigError


@dataclass(frozen=True)
class ExportFormat:
    """How to write one format, and how to load it.

    `about`: the files and their program. `writer`: the function, as "module:name". `load`: lines of Python that load
    FOLDER. `library`: the Hub's name of the program. `task`: the Hub's name of what the model does. `packages`: what
    the writer imports that compt does not depend on.
    """

    about: str
    writer: str
    load: tuple[str, ...]
    library: str
    task: str = "zero-shot-image-classification"
    packages: tuple[str, ...] = ()

    def in_repository(self, name: str) -> ExportFormat:
        """The same with lines that load it from the Hub, where its program can do that."""
        if self.library in ("open_clip", "timm"):
            load = [line.replace("local-dir:FOLDER", f"hf-hub:{name}") for line in self.load]
        elif self.library == "transformers":
            load = [line.replace("FOLDER", name) for line in self.load]
        else:
            fetch = f'folder = huggingface_hub.snapshot_download("{name}")'
            load = ["import huggingface_hub", *self.load[:1], fetch]
            load += [line.replace('"FOLDER/', 'folder + "/') for line in self.load[1:]]
        return replace(self, load=tuple(load))

    def check_packages(self, name: str) -> None:
        """Raise ConfigError, which names the command that installs them, where a package is missing."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(f"--to {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


FORMATS: dict[str, ExportFormat] = {
    "open_clip": ExportFormat(
        "a folder of open_clip, for versions from 2.16 on",
        "compt.export.open_clip:write",
        (
            "import open_clip",
            'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")',
            'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")',
        ),
        "open_clip",
    ),
    "hf": ExportFormat(
        "a folder of Hugging Face transformers: CLIPModel, CLIPVisionModel, CLIPProcessor",
        "compt.export.hugging_face:write",
        (
            "from transformers import CLIPModel, CLIPProcessor",
            'model = CLIPModel.from_pretrained("FOLDER")',
            'processor = CLIPProcessor.from_pretrained("FOLDER")',
        ),
        "transformers",
    ),
    "timm": ExportFormat(
        "the image tower as a folder of timm; its classifier is the projection",
        "compt.export.timm:write",
        (
            "import timm",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        ),
        "timm",
        "image-feature-extraction",
    ),
    "onnx": ExportFormat(
        "two ONNX graphs, image.onnx and text.onnx, for any number of inputs",
        "compt.export.programs:write_onnx",
        (
            "import onnxruntime",
            'image = onnxruntime.InferenceSession("FOLDER/image.onnx")',
            'features = image.run(None, {"pixel_values": pixels})[0]  # float32 [N, 3, H, W]',
        ),
        "onnx",
        packages=("onnx", "onnxscript"),
    ),
    "torch_export": ExportFormat(
        "two programs of torch.export, image.pt2 and text.pt2, for any number of inputs",
        "compt.export.programs:write_torch",
        (
            "import torch",
            'image = torch.export.load("FOLDER/image.pt2").module()',
            "features = image(pixels)  # float32 [N, 3, H, W]",
        ),
        "pytorch",
    ),
}
"""The formats by the name that `--to` gives them."""
