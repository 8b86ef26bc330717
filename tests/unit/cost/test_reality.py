"""The analytic count equals torch's counter, term by term: every preset, every way of training."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from types import CodeType
from typing import Any
from unittest.mock import patch

import open_clip.model
import pytest
import timm
import torch
from torch import nn

from compt.cost import counts
from compt.cost.counts import Count, Tokens, image_tower, parameters, scalars, similarity_macs, text_tower
from compt.cost.training import Breakdown, exact_breakdown
from compt.engines.ddp import DataParallelEngine
from compt.models.clip import ClipModel, build
from compt.models.presets import PACKED, PRESETS, ModelSpec, resolve
from compt.models.swin import register_swin
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.accumulate import cached_backward
from compt.train.losses import contrastive_loss, loss_of, siglip_loss
from compt.train.task import ClipTask, DistillTask
from tests.unit.cost.oracle import Phase, Place, counted, parameters_by_place

# Sizes that no preset has, each unlike its neighbours.
VARIANTS = {
    "wide": resolve("vit_t16", {"width": 320, "depth": 3, "text_width": 192, "text_depth": 2, "embed_dim": 96}),
    "fine": resolve("vit_t16", {"image_size": 240, "patch_size": 12, "depth": 2, "text_depth": 1}),
    "coarse": resolve("vit_nano", {"image_size": 96, "patch_size": 32, "context_length": 50, "no_ln_pre": True}),
    "slim": resolve("vit_nano", {"mlp_ratio": 2.5, "context_length": 7, "depth": 1, "text_depth": 1}),
    "quick": resolve("vit_nano", {"quick_gelu": True, "text_norm_eps": 0.1}),
    "little swin": resolve(
        "swin_t",
        {"image_size": 72, "window": 5, "width": 48, "head_width": 16, "depths": (1, 3, 2), "text_depth": 1}
        | {"mlp_ratio": 2.5},
    ),
    "swin": resolve("swin_t", {"text_width": 192, "text_depth": 3, "context_length": 40, "embed_dim": 200}),
}
MODELS = {**PRESETS, **VARIANTS}

Table = Mapping[tuple[Phase, Place], float]


@cache
def ours(name: str) -> ClipModel:
    return build(MODELS[name], device="meta")


def pixels(spec: ModelSpec, number: int = 1) -> torch.Tensor:
    return torch.zeros(number, 3, spec.image_size, spec.image_size, device="meta")


def forward_of(spec: ModelSpec, tokens: Tokens = None, *, readout: bool = True) -> dict[tuple[Phase, Place], float]:
    """The analytic forward MACs of an image and a caption."""
    towers = {"image": image_tower(spec, readout=readout), "text": text_tower(spec, tokens, readout=readout)}
    return {
        ("forward", Place("student", tower, module)): count.macs
        for tower, table in towers.items()
        for module, count in table.items()
    }


def parameters_of(spec: ModelSpec) -> dict[Place, int]:
    towers = {"image": image_tower(spec), "text": text_tower(spec), "both": scalars(spec)}
    return {
        Place("student", tower, module): count.parameters
        for tower, table in towers.items()
        for module, count in table.items()
    }


def differences(expected: Mapping[Any, float], found: Mapping[Any, float]) -> list[str]:
    """Every entry in which the two differ; what is missing is zero."""
    return [
        f"{key}: {expected.get(key, 0)} by hand, {found.get(key, 0)} found"
        for key in {**expected, **found}
        if expected.get(key, 0) != pytest.approx(found.get(key, 0), rel=1e-12, abs=0)
    ]


@cache
def stock_counts(name: str) -> tuple[Table, Mapping[Place, int]]:
    """The MACs of stock open_clip's model for an image and a caption, and its parameters."""
    spec = MODELS[name]
    if spec.arch == "swin":
        register_swin(spec.timm_name)
    with torch.device("meta"):
        model = open_clip.model.CLIP(**spec.open_clip_config())
    tokens = torch.zeros(1, spec.context_length, dtype=torch.long, device="meta")
    forward = counted(lambda: (model.encode_image(pixels(spec)), model.encode_text(tokens)), model)
    return forward, parameters_by_place(model)


@cache
def our_image_counts(name: str) -> Counter[tuple[Phase, Place]]:
    return counted(lambda: ours(name).encode_image(pixels(MODELS[name])), ours(name))


@cache
def our_counts(name: str, length: int) -> Table:
    tokens = torch.zeros(1, MODELS[name].context_length, dtype=torch.long, device="meta")
    return our_image_counts(name) + counted(lambda: ours(name).encode_text(tokens, length=length), ours(name))


LARGE = ("swin_s", "swin_b", "swin_l", "swin_l384")
"""Presets with the parts of swin_t and swin_b384 in other numbers and sizes."""
BUT_LARGE = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n in LARGE)) for n in MODELS])


@BUT_LARGE
def test_stock_open_clip_has_these_parameters_and_macs(name: str) -> None:
    spec = MODELS[name]
    forward, sizes = stock_counts(name)
    assert differences(forward_of(spec, readout=False), forward) == []
    assert differences(parameters_of(spec), sizes) == []
    assert parameters(spec) == sum(sizes.values())


@BUT_LARGE
def test_our_model_has_these_parameters_and_macs(name: str) -> None:
    spec = MODELS[name]
    assert differences(parameters_of(spec), parameters_by_place(ours(name))) == []
    for length in (spec.context_length, 5):
        assert differences(forward_of(spec, length), our_counts(name, length)) == []


@pytest.mark.parametrize(("name", "size"), [*(("swin_t", size) for size in (96, 100, 256, 288)), ("swin_b", 100)])
def test_a_swin_pads_at_other_image_sizes(name: str, size: int) -> None:
    spec = resolve(name, {"image_size": size})
    with torch.device("meta"):
        trunk = timm.create_model(PRESETS[name].timm_name, img_size=size, num_classes=0)
    model = nn.ModuleDict({"visual": nn.ModuleDict({"trunk": trunk})})
    table = image_tower(spec)
    del table["projection"]
    forward = {("forward", Place("student", "image", kind)): count.macs for kind, count in table.items()}
    assert differences(forward, counted(lambda: trunk(pixels(spec)), model)) == []
    sizes = {Place("student", "image", kind): count.parameters for kind, count in table.items()}
    assert differences(sizes, parameters_by_place(model)) == []


def trained(
    spec: ModelSpec,
    teacher: ModelSpec | None,
    lengths: torch.Tensor,
    *,
    micro_batch: int | None = None,
    loss_chunk: int | None = None,
    checkpointing: bool = False,
    text_buckets: int = 1,
    image_to_text: Any = "slot",
    device: str = "meta",
) -> tuple[Table, Mapping[Place, int]]:
    """What one step of this program runs for captions of `lengths` [b, M], and the parameters that take part."""
    student = build(spec, device=device)
    student.set_grad_checkpointing(checkpointing)
    loss = loss_of(Optimizer(loss=spec.loss, image_to_text=image_to_text), EngineConfig(loss_chunk=loss_chunk))
    options: dict[str, Any] = {"loss": loss, "text_buckets": text_buckets}
    task = DistillTask(student, build(teacher, device=device), **options) if teacher else ClipTask(student, **options)
    modules = (task.module, task.teacher) if isinstance(task, DistillTask) else (task.module,)
    engine = DataParallelEngine(task.module, device=device)
    images = torch.zeros(len(lengths), 3, spec.image_size, spec.image_size, device=device)
    tokens = torch.zeros(*lengths.shape, spec.context_length, dtype=torch.long, device=device)
    # The meta device knows no autocast; in fp32 it does nothing anyway.
    with patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()):
        step = counted(lambda: cached_backward(task, engine, images, tokens, micro_batch, lengths), *modules)
    return step, parameters_by_place(*modules)


def step_of(breakdown: Breakdown) -> dict[tuple[Phase, Place], float]:
    """A breakdown as one step; what is computed again before backward counts as forward there, so both are one."""
    table: dict[tuple[Phase, Place], float] = {}
    for record in breakdown.records:
        place = Place(record.part, record.tower, record.module)
        table["forward", place] = breakdown.batch * (record.forward_macs + record.recompute_macs)
        table["backward", place] = breakdown.batch * record.backward_macs
    return table


def as_step(found: Table) -> Counter[tuple[Phase, Place]]:
    table: Counter[tuple[Phase, Place]] = Counter()
    for (phase, place), macs in found.items():
        table["forward" if phase == "again" else phase, place] += macs
    return table


def wrong(breakdown: Breakdown, step: Table, sizes: Mapping[Place, int]) -> list[str]:
    """All in which a breakdown differs from a step that was really run: MACs, parameters, and what is updated."""
    found = {Place(r.part, r.tower, r.module): r.parameters for r in breakdown.records}
    updates = {Place(r.part, r.tower, r.module): r.step_update_macs for r in breakdown.records}
    trainable = {place: 3 * size for place, size in sizes.items() if place.part != "teacher"}
    return [
        *differences(step_of(breakdown), as_step(step)),
        *differences(found, sizes),
        *differences(updates, trainable),
    ]


NARROW = resolve("vit_pico", {"embed_dim": 64})
# Few layers, where it does not matter how many there are.
SHALLOW = resolve("vit_s16", {"depth": 2, "text_depth": 2, "name": "shallow"})
MINI = resolve("vit_mini", {"depth": 2, "text_depth": 1})
SHALLOW_TEACHER = resolve("vit_t16", {"depth": 1, "text_depth": 2, "embed_dim": 384})
STEPS: dict[str, tuple[str | ModelSpec, ModelSpec | None, dict[str, Any], dict[str, Any]]] = {
    "baseline": ("vit_t16", None, {}, {}),
    "baseline of a swin": ("swin_t", None, {}, {}),
    "large": (resolve("vit_l16", {"depth": 2, "text_depth": 2}), None, {}, {}),
    "link": ("vit_s16", PRESETS["vit_t16"], {}, {}),
    "link of a swin": ("swin_s", PRESETS["swin_t"], {}, {}),
    "link with projectors": (MINI, NARROW, {}, {}),
    "variant": (VARIANTS["wide"], PRESETS["vit_t16"], {}, {}),
    "one block": (VARIANTS["slim"], None, {"checkpointing": True}, {"checkpointing": True}),
    "all captions are candidates": (MINI, NARROW, {"image_to_text": "all"}, {}),
    "micro-batches": (MINI, NARROW, {"micro_batch": 2}, {"recompute": True}),
    "micro-batch of all": (MINI, NARROW, {"micro_batch": 4}, {}),
    "checkpointed": (MINI, NARROW, {"checkpointing": True}, {"checkpointing": True}),
    "checkpointed swin": (resolve("swin_t", {"text_depth": 1}), None, {"checkpointing": True}, {"checkpointing": True}),
    "chunked loss": (MINI, NARROW, {"loss_chunk": 3}, {"chunked_loss": True}),
    "chunked loss of all candidates": (
        MINI,
        NARROW,
        {"loss_chunk": 1, "image_to_text": "all"},
        {"chunked_loss": True},
    ),
    "chunk of all": (MINI, NARROW, {"loss_chunk": 4}, {}),
    "all at once": (
        SHALLOW,
        SHALLOW_TEACHER,
        {"micro_batch": 1, "checkpointing": True, "loss_chunk": 2},
        {"recompute": True, "checkpointing": True, "chunked_loss": True},
    ),
}
BATCH, CAPTIONS = 4, 3


def spec_of(step: str) -> ModelSpec:
    """The student of a step."""
    model = STEPS[step][0]
    return MODELS[model] if isinstance(model, str) else model


@cache
def really(name: str) -> tuple[Table, Mapping[Place, int]]:
    _, teacher, run, _ = STEPS[name]
    spec = spec_of(name)
    return trained(spec, teacher, torch.full((BATCH, CAPTIONS), spec.context_length), **run)


def by_hand(name: str) -> Breakdown:
    _, teacher, _, options = STEPS[name]
    return exact_breakdown(spec_of(name), teacher, batch=BATCH, captions=CAPTIONS, **options)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_training_costs_this(name: str) -> None:
    assert wrong(by_hand(name), *really(name)) == []


@pytest.mark.parametrize("name", ["link with projectors", "micro-batches", "chunked loss", "checkpointed"])
def test_the_meta_device_counts_as_a_real_one(name: str) -> None:
    _, teacher, run, _ = STEPS[name]
    spec, lengths = spec_of(name), torch.full((BATCH, CAPTIONS), 9)
    assert trained(spec, teacher, lengths, device="cpu", **run) == trained(spec, teacher, lengths, **run)


@pytest.mark.parametrize(
    ("buckets", "micro_batch", "context"),
    [(PACKED, None, 11), (PACKED, 2, 32), (1, None, 32), (1, 2, 11), (2, None, 11), (2, 2, 32), (5, 2, 11)],
)
def test_trimmed_captions_cost_what_their_lengths_cost(buckets: int, micro_batch: int | None, context: int) -> None:
    """A teacher with a shorter context computes less of the long ones."""
    lengths = torch.tensor([[3, 30, 8], [4, 4, 25], [12, 6, 5], [9, 9, 32]])
    spec, teacher = resolve("vit_mini", {"depth": 1, "text_depth": 2}), replace(NARROW, depth=1, context_length=context)
    step, sizes = trained(spec, teacher, lengths, micro_batch=micro_batch, text_buckets=buckets)

    computed: Counter[int] = Counter()
    for piece in lengths.split(micro_batch or len(lengths)):
        for group in piece.flatten().sort().values.chunk(buckets or piece.numel()):
            computed[int(group.max())] += len(group)
    options = {"batch": 4, "captions": 3, "recompute": micro_batch is not None}
    assert wrong(exact_breakdown(spec, teacher, tokens=computed, **options), step, sizes) == []
    mean = sum(length * number for length, number in computed.items()) / lengths.numel()
    if len(computed) > 1:
        assert wrong(exact_breakdown(spec, teacher, tokens=mean, **options), step, sizes) != []


@pytest.mark.parametrize("image_to_text", ["slot", "all"])
def test_each_process_computes_its_share_of_the_similarities(
    image_to_text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two processes: its 4 images against all 8."""
    monkeypatch.setattr("compt.train.losses.gather_with_grad", lambda features: torch.cat([features, features]))
    image, text, scale = (torch.ones(*shape, requires_grad=True) for shape in ((4, 16), (4, 3, 16), (1,)))

    def backward() -> None:
        contrastive_loss(image, text, scale, image_to_text=image_to_text).task.backward()

    step = counted(backward)
    assert 2 * sum(step.values()) == 3 * similarity_macs(8, 3, 16)
    whole = exact_breakdown(resolve("vit_nano", {"embed_dim": 16}), None, batch=8, captions=3)
    assert 2 * sum(step.values()) == 8 * whole.sum("forward_macs", "backward_macs", parts=("loss",))


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_sigmoid_loss_computes_half_of_that_and_nothing_again(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compt.train.losses.world_size", lambda: 2)
    monkeypatch.setattr("compt.train.losses.pass_on", lambda block: block)
    image, text, scale, bias = (torch.ones(*shape, requires_grad=True) for shape in ((4, 16), (4, 3, 16), (1,), (1,)))

    def whole() -> None:
        siglip_loss(image, text, scale, bias, chunk=chunk)[0].backward()

    step = counted(whole)
    assert 2 * sum(step.values()) == 3 * similarity_macs(8, 3, 16, pairwise=True)
    spec = replace(PRESETS["vit_pico"], embed_dim=16, loss="siglip")
    cost = exact_breakdown(spec, None, batch=8, captions=3, chunked_loss=chunk is not None)
    assert 8 * cost.sum("forward_macs", "backward_macs", "recompute_macs", parts=("loss",)) == 2 * sum(step.values())


# The comparisons above see every term: each is left out once, and they have to notice.


def notices(name: str) -> list[str]:
    """As the tests above compare `name`, which is a model or a step; empty where nothing is wrong."""
    if name in STEPS:
        return wrong(by_hand(name), *really(name))
    forward, sizes = stock_counts(name)
    return [
        *differences(forward_of(MODELS[name], readout=False), forward),
        *differences(forward_of(MODELS[name], 5), our_counts(name, 5)),
        *differences(parameters_of(MODELS[name]), sizes),
    ]


class Forgetful:
    """A function of `compt.cost.counts` that forgets its `field` where one place of the source calls it."""

    def __init__(self, function: Callable[..., Count], field: str) -> None:
        self.function = function
        self.field = field
        self.matters: dict[tuple[CodeType, int], bool] = {}
        self.without: tuple[CodeType, int] | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Count:
        caller = sys._getframe(1)
        place = caller.f_code, caller.f_lasti
        count = self.function(*arguments, **options)
        self.matters[place] = self.matters.get(place, False) or bool(getattr(count, self.field))
        return replace(count, **{self.field: 0}) if place == self.without else count


@pytest.mark.parametrize("field", ["macs", "parameters"])
@pytest.mark.parametrize("function", ["linear", "attention_matmuls", "_norm"])
@pytest.mark.parametrize("name", ["vit_t16", "swin_l", "vit_pico", "link with projectors"])
def test_no_layer_can_be_left_out(name: str, function: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = Forgetful(getattr(counts, function), field)
    monkeypatch.setattr(counts, function, forgetful)
    assert notices(name) == []
    places = [place for place, matters in forgetful.matters.items() if matters]
    assert len(places) >= (0 if (function, field) in {("attention_matmuls", "parameters"), ("_norm", "macs")} else 1)
    for place in places:
        forgetful.without = place
        assert notices(name) != [], place


@pytest.mark.parametrize("name", ["link of a swin", "all at once"])
def test_no_entry_of_a_breakdown_can_be_left_out(name: str) -> None:
    breakdown = by_hand(name)
    fields = ("parameters", "forward_macs", "backward_macs", "recompute_macs", "step_update_macs")
    for at, record in enumerate(breakdown.records):
        for field in fields:
            changed = list(breakdown.records)
            changed[at] = replace(record, **{field: 0})
            found = wrong(replace(breakdown, records=tuple(changed)), *really(name))
            assert bool(found) == bool(getattr(record, field)), (record, field)


@pytest.mark.parametrize("option", ["recompute", "checkpointing", "chunked_loss"])
def test_what_is_computed_again_can_not_be_left_out(option: str) -> None:
    _, teacher, _, options = STEPS["all at once"]
    found = exact_breakdown(
        spec_of("all at once"), teacher, batch=BATCH, captions=CAPTIONS, **{**options, option: False}
    )
    assert wrong(found, *really("all at once")) != []
