"""Expansions from a folder into a folder, for every operator, compared with the expansion in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compt.expand.execute import expand
from compt.expand.plan import ExpansionPlan, make_plan
from compt.models.growth import ExpandConfig
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec
from compt.weights.artefact import read_artefact, write_artefact
from compt.weights.open import average_of
from tests.unit.expand.oracle import shapes, swin, vit

SEED = 7

VIT = (
    vit("vit_small", 2, 2, 1, 1),
    vit("vit_large", 3, 4, 2, 2, embed_dim=10, context_length=7, vocab_size=13, image_size=12),
)
SWIN = (
    swin("swin_small", 1, (2, 2, 2), text_depth=2),
    swin("swin_large", 2, (2, 4, 4), text_heads=2, text_depth=4, embed_dim=8),
)


@dataclass(frozen=True)
class Case:
    """One expansion of one pair."""

    pair: tuple[ModelSpec, ModelSpec]
    config: ExpandConfig

    @property
    def plan(self) -> ExpansionPlan:
        return make_plan(*self.pair, self.config)


def _cases() -> dict[str, Case]:
    found = {}
    for arch, pair in (("vit", VIT), ("swin", SWIN)):
        for width in WIDTH_OPERATORS:
            found[f"{arch}, width {width}"] = Case(pair, ExpandConfig.both(width))
        for depth in DEPTH_OPERATORS:
            found[f"{arch}, depth {depth}"] = Case(pair, ExpandConfig.both(depth=depth))
        found[f"{arch}, new outputs zero"] = Case(pair, ExpandConfig.both("lemon", "stack", True))
        reference = ExpandConfig.both("insert_packed", reference_compatible=True)
        same_grid = replace(pair[1], image_size=pair[0].image_size)  # the authors' code resizes nothing
        found[f"{arch}, the authors' code"] = Case((pair[0], same_grid), reference)
    found["from vit to swin"] = Case((VIT[0], replace(SWIN[1], text_depth=2, embed_dim=6)), ExpandConfig.both())
    return found


CASES = _cases()


def weights(spec: ModelSpec, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes(spec).items()}
    return state | {"logit_scale": torch.tensor(2.5, dtype=dtype)}


def write_teachers(folder: Path) -> Path:
    """The small models, in several files each, with moving averages."""
    for spec in (VIT[0], SWIN[0]):
        extra = {"ema": weights(spec, 2)}
        write_artefact(folder / spec.name, weights(spec, 1), spec, {}, max_shard_bytes=8000, extra_states=extra)
    return folder


def write_student(
    teachers: Path,
    out: Path,
    case: Case,
    together: bool = True,
    shard: int = 5000,
    watch: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda state: state,
) -> None:
    """Expand from folder to folder, tensor by tensor; `watch` wraps every state that is read."""
    teacher, plan = read_artefact(teachers / case.pair[0].name), case.plan
    average = average_of(teacher) if plan.needs_average else None
    state = watch(expand(plan, watch(teacher.state), SEED, None if average is None else watch(average)))
    fields = {"parent_hash": teacher.hash, "seed": SEED, "expansion": plan.to_json()}
    write_artefact(out, state, plan.student, fields, together=together, max_shard_bytes=shard)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_bitwise_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    assert found.keys() == wanted.keys(), where
    for name, tensor in wanted.items():
        one, other = found[name], tensor
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{where}: {name}"
        same = torch.equal(one.reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
        assert same, f"{where}: {name}"
