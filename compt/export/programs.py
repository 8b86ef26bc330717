"""Both towers as programs: torch.export's, and ONNX graphs made from them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from compt.files import disk_errors, write_json
from compt.models.clip import ClipModel
from compt.weights.artefact import HF_PIXELS, Artefact

_TEXT_PARTS = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
_ONE_FILE = 2**31 - 2**20
"""Bytes of an ONNX file: protobuf allows 2 GiB. Larger weights go to a file beside it."""


class _ImageProgram(nn.Module):
    """pixel_values float32 [N, 3, H, W] -> features [N, embed_dim], not of unit length."""

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        for part in _TEXT_PARTS:  # a program holds every parameter of its module, used or not
            delattr(model, part)
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _TextProgram(nn.Module):
    """input_ids int64 [N, context_length] -> features [N, embed_dim], not of unit length."""

    def __init__(self, model: ClipModel) -> None:
        super().__init__()
        del model.visual
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        # The longest caption of a batch would be a length that depends on values.
        return self.model.encode_text(input_ids, length=self.model.spec.context_length)


def programs(source: Artefact) -> Iterator[tuple[str, ExportedProgram]]:
    """The towers `image` and `text` in fp32, for any number of inputs."""
    spec = source.spec
    pixels = torch.zeros(2, 3, spec.image_size, spec.image_size)
    tokens = torch.zeros(2, spec.context_length, dtype=torch.int64)
    for name, kind, example in (("image", _ImageProgram, pixels), ("text", _TextProgram, tokens)):
        tower = kind(source.load_model()).eval().requires_grad_(False)
        with warnings.catch_warnings(action="ignore"):  # about torch's own modules
            program = torch.export.export(tower, (example,), dynamic_shapes=({0: Dim("batch")},))
        for node in program.graph.nodes:  # would name the folders of this machine
            node.meta.pop("stack_trace", None)
        yield name, program


def write_torch(source: Artefact, folder: Path) -> list[str]:
    """One .pt2 file for each tower."""
    for name, program in programs(source):
        with disk_errors(folder / f"{name}.pt2"):
            torch.export.save(program, folder / f"{name}.pt2")
    return _finish(source, folder)


def write_onnx(source: Artefact, folder: Path) -> list[str]:
    """One .onnx file for each tower, with its weights in a second file where it needs more than 2 GiB."""
    for name, program in programs(source):
        taken = cast("tuple[str, ...]", program.graph_signature.user_inputs)
        given = f"{name}_features"
        with warnings.catch_warnings(action="ignore"):
            onnx = torch.onnx.export(program, input_names=taken, output_names=[given], dynamo=True, verbose=False)
        size = sum(4 * math.prod(tensor.shape) for tensor in program.state_dict.values())
        with disk_errors(folder / f"{name}.onnx"):
            assert onnx is not None
            onnx.save(str(folder / f"{name}.onnx"), external_data=size > _ONE_FILE)
    return _finish(source, folder)


def _finish(source: Artefact, folder: Path) -> list[str]:
    processor = source.preprocess.to_hugging_face(source.spec.image_size)
    if processor is not None:
        write_json(folder / HF_PIXELS, processor)
    length = source.spec.context_length
    return [
        f"Text: `input_ids`, int64 [N, {length}], tokens of `open_clip.tokenize(captions, {length})`.",
        "Features do not have unit length. `compt_export.json` has the learned scalars and the settings of images.",
    ]
