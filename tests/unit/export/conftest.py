"""Models to export, written once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compt.models.clip import build
from compt.models.presets import ModelSpec, resolve
from compt.weights.artefact import write_artefact
from tests.helpers.states import export_state

SPECS = {
    "vit": resolve("vit_pico", {"width": 64, "text_width": 32, "depth": 3, "text_depth": 2}),
    "quick": replace(resolve("vit_pico", {"text_depth": 2, "mlp_ratio": 3.0}), quick_gelu=True),
    "swin": resolve(
        "swin_t",
        {"width": 16, "head_width": 8, "image_size": 32, "patch_size": 2, "window": 4, "depths": (2, 2)}
        | {"text_width": 32, "text_head_width": 32, "text_depth": 1, "embed_dim": 48, "context_length": 20},
    ),
}


def write_model(folder: Path, spec: ModelSpec) -> Path:
    """A model folder whose every parameter is random, biases and norms too."""
    model = build(spec, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    write_artefact(folder, export_state(model), spec, {})
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each of SPECS."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, spec) for name, spec in SPECS.items()}
