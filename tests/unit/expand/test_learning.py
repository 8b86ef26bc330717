"""What expanded models learn: gradients reach every new weight, and copies grow apart where noise is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import open_clip.model
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compt.expand.execute import expand
from compt.expand.plan import ExpansionPlan, make_plan
from compt.models.growth import ExpandConfig
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec
from tests.unit.expand.oracle import build, differences, lines, random_weights, samples, swin, vit

LR = 1e-3
T = vit("t", 2, 2, 1, 2)
PAIRS: dict[str, tuple[ModelSpec, ModelSpec]] = {
    "vit": (T, vit("twice", 4, 4, 2, 3, embed_dim=12)),
    "part": (T, vit("part", 3, 3, 2, 2, embed_dim=8, context_length=7)),
    "bare": (replace(T, no_ln_pre=True), vit("bare", 5, 2, 3, 2, embed_dim=6, no_ln_pre=True)),
    "swin": (swin("s", 1, (2, 2, 2)), swin("s2", 2, (2, 4, 2), embed_dim=10, text_heads=2, text_depth=2)),
    "swin part": (swin("s2", 2, (2, 2, 2)), swin("s3", 3, (2, 2, 4), embed_dim=7)),
}


def grow(pair: str, config: ExpandConfig) -> tuple[ExpansionPlan, dict[str, Tensor]]:
    teacher, student = PAIRS[pair]
    plan = make_plan(teacher, student, config)
    average = random_weights(teacher, 8) if plan.needs_average else None
    state = random_weights(teacher)
    for name, tensor in state.items():
        if name.endswith(("c_fc.weight", "c_fc.bias", "fc1.weight", "fc1.bias")):
            tensor *= 0.5  # `duplicate` adds copies up: far below zero, GELU has no slope left
    return plan, dict(expand(plan, state, 3, average))


def loss_of(model: open_clip.model.CLIP, spec: ModelSpec, count: int = 8) -> Tensor:
    images, tokens = samples(spec, count)
    image, text = (F.normalize(each, dim=-1) for each in (model.encode_image(images), model.encode_text(tokens)))
    logits = model.logit_scale.exp() * image @ text.T
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def optimizer(model: open_clip.model.CLIP) -> torch.optim.Optimizer:
    """As a link is trained: AdamW, without decay on 1-D parameters."""
    split: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in model.parameters():
        split[parameter.ndim >= 2].append(parameter)
    groups = [{"params": split[True], "weight_decay": 0.1}, {"params": split[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98))


def train(spec: ModelSpec, state: Mapping[str, Tensor], steps: int) -> open_clip.model.CLIP:
    model = build(spec, state)
    adam = optimizer(model)
    for _ in range(steps):
        adam.zero_grad()
        loss_of(model, spec).backward()
        adam.step()
    return model


def dead(model: open_clip.model.CLIP, spec: ModelSpec) -> dict[str, int]:
    """Elements without a gradient by parameter, but for those that have none in any model."""
    model.zero_grad()
    loss_of(model, spec).backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if name == "token_embedding.weight":
            grad = grad.abs().amax(dim=0)  # every channel of some token; not every token occurs
        if name.endswith(("in_proj_bias", "qkv.bias")):
            third = len(grad) // 3
            grad = torch.cat([grad[:third], grad[2 * third :]])  # a softmax ignores what key biases add
        silent = int((grad.abs() <= 1e-13 * grad.abs().max()).sum()) if grad.any() else grad.numel()
        if silent:
            found[name] = silent
    return found


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_every_weight_learns_after_one_step(width, pair):
    plan, state = grow(pair, ExpandConfig.both(width))
    assert dead(train(plan.student, state, 1), plan.student) == {}


@pytest.mark.parametrize("depth", DEPTH_OPERATORS)
@pytest.mark.parametrize("width", ["insert", "net2net", "insert_exact"])
def test_layers_that_start_silent_learn_after_one_step(width, depth):
    for pair in ("vit", "swin"):
        plan, state = grow(pair, ExpandConfig.both(width, depth, zero_new_outputs=True))
        assert dead(train(plan.student, state, 1), plan.student) == {}


def test_a_weight_that_cannot_learn_is_noticed():
    plan, state = grow("vit", ExpandConfig.both("net2net"))
    state["transformer.resblocks.0.mlp.c_fc.weight"][3] = 0
    state["transformer.resblocks.0.mlp.c_proj.weight"][:, 3] = 0
    state["transformer.resblocks.0.mlp.c_fc.bias"][3] = 0
    found = dead(build(plan.student, state), plan.student)
    assert found["transformer.resblocks.0.mlp.c_fc.weight"] >= 8


def apart(pair: str, plan: ExpansionPlan, weights: Mapping[str, Tensor], kind: str) -> dict[str, float]:
    """How far the copies of the first unit along what is written of `kind` are from one another, by parameter."""
    teacher, student = PAIRS[pair]
    stacks = {stack: sources for stack, sources in plan.layers.items() if sources}
    assert all(sources[0] == 0 for sources in stacks.values())
    found = {}
    for name, weight in weights.items():
        if "blocks." in name and "blocks.0." not in name:
            continue
        for dim, line in enumerate(lines(student, name)):
            if line.kind != kind or line.use != "write":
                continue
            old = lines(teacher, name)[dim].units
            if line.units < 2 * old:
                continue
            # One channel and one block apart from another: the query rows of the first heads, for one.
            units = weight.detach().movedim(dim, 0).reshape(line.blocks, line.units, line.channels, -1)
            first, second = units[:, 0], units[:, old]
            if line.blocks == 3:
                first, second = first[[0, 2]], second[[0, 2]]
            found[name] = float((first - second).abs().max())
    return found


STREAM_AND_UNITS = ("res", "hidden")


@pytest.mark.parametrize("pair", ["vit", "swin"])
@pytest.mark.parametrize("width", ["duplicate", "net2net", "lemon"])
def test_copies_learn_apart_with_noise_and_never_without(width, pair):
    steps = 4
    for noise in (0.1, 0.0):
        plan, state = grow(pair, ExpandConfig.both(width, noise=noise))
        before = {kind: apart(pair, plan, state, kind) for kind in STREAM_AND_UNITS}
        model = train(plan.student, state, steps)
        weights = dict(model.named_parameters())
        for kind in STREAM_AND_UNITS:
            after = apart(pair, plan, weights, kind)
            # What writes one unit and reads no copies begins the same; what reads copies begins apart by the noise.
            assert len(after) > 4
            for name, distance in after.items():
                if noise:
                    assert distance > 1e-7, (kind, name)
                    assert distance > before[kind][name] * 0.5
                else:
                    assert before[kind][name] == 0, (kind, name)
                    assert distance < 1e-9, (kind, name)


@pytest.mark.parametrize("pair", ["vit", "swin"])
def test_copies_of_the_joint_embedding_learn_apart(pair):
    for width in ("net2net", "duplicate"):
        plan, state = grow(pair, ExpandConfig.both(width))
        model = train(plan.student, state, 4)
        old = PAIRS[pair][0].embed_dim
        for name in ("visual.proj" if pair == "vit" else "visual.head.proj.weight", "text_projection"):
            weight = model.get_parameter(name).detach()
            weight = weight.T if name.endswith("head.proj.weight") else weight
            for unit in range(old):
                both = weight[:, [unit, unit + old]].T
                # Not even in proportion: the two would then be one unit.
                assert float(F.cosine_similarity(both[0], both[1], dim=0)) < 1 - 1e-9, (width, name, unit)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9])
def test_noise_changes_nothing_at_the_first_step(noise):
    teacher, student = PAIRS["vit"]
    state = random_weights(teacher)
    plan = make_plan(teacher, student, ExpandConfig.both("net2net", zero_new_outputs=True, noise=noise))
    expanded = dict(expand(plan, state, 3))
    assert not any(plan.inexact.values())
    assert max(differences(teacher, state, student, expanded).values()) < 1e-10
    pairs = ((teacher, state), (plan.student, expanded))
    before, after = (loss_of(build(spec, weights), teacher).item() for spec, weights in pairs)
    assert before == pytest.approx(after, abs=1e-10)
