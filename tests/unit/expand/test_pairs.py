"""Every pair of neighbours in the recipes of this repository, under every operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip.model
import pytest
import torch
from torch import Tensor, nn

from compt.cost.counts import parameters
from compt.expand.execute import expand
from compt.expand.plan import make_plan
from compt.models.growth import TOWERS, ExpandConfig, grown_spec
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec, resolve
from compt.models.swin import register_swin
from compt.plan.jobs import make_plan as plan_recipe
from compt.recipe.read import load_recipe
from tests.helpers.cases import matrix
from tests.unit.expand.oracle import random_weights, samples, shapes

ROOT = Path(__file__).resolve().parents[3]
SMALL = 8_000_000  # parameters


def recipe_pairs() -> dict[str, tuple[ModelSpec, ModelSpec]]:
    """Each link of a recipe with the one before it, by `recipe: teacher student`."""
    found = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        links = plan_recipe(load_recipe(path), source=str(path)).links
        for before, link in itertools.pairwise(links):
            assert link.teacher == before.name
            found[f"{path.stem}: {before.spec.name} {link.spec.name}"] = (before.spec, link.spec)
    return found


PAIRS = recipe_pairs()
# Two recipes may have a pair in common.
DISTINCT = {pair: name for name, pair in reversed(PAIRS.items())}


SMALL_PAIRS = {name: pair for pair, name in DISTINCT.items() if parameters(pair[1]) < SMALL}
LARGE_PAIRS = {name: pair for pair, name in DISTINCT.items() if name not in SMALL_PAIRS}


def few_words(pair: tuple[ModelSpec, ModelSpec]) -> tuple[ModelSpec, ModelSpec]:
    """The same two models with a small vocabulary, which is most of them."""
    return replace(pair[0], vocab_size=1000), replace(pair[1], vocab_size=1000)


class Lazy(Mapping[str, Tensor]):
    """A teacher whose parameters are drawn when they are read, so that none stays in memory."""

    def __init__(self, spec: ModelSpec, offset: int = 0) -> None:
        self.sizes = shapes(spec)
        self.offset = offset

    def __getitem__(self, name: str) -> Tensor:
        shape = self.sizes[name]
        draw = torch.Generator().manual_seed(self.offset + sum(name.encode()))
        scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 1.0
        return torch.randn(shape, generator=draw) * scale

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


def test_the_recipes_have_pairs():
    assert len(PAIRS) >= 15
    assert {name.split(":")[0] for name in PAIRS} >= {"cc3m_vit", "cc3m_swin", "merged15m_vit", "emoji", "demo"}
    assert SMALL_PAIRS
    assert LARGE_PAIRS


@pytest.mark.parametrize("name", DISTINCT.values())
def test_every_pair_plans_under_every_operator(name):
    teacher, student = PAIRS[name]
    sizes = shapes(student)
    for width in WIDTH_OPERATORS:
        plan = make_plan(teacher, student, ExpandConfig.both(width))
        assert {entry.name: entry.shape for entry in plan.entries} == sizes
        totals = plan.totals
        assert totals["copied"] + totals["new"] + totals["zeroed"] == totals["parameters"]
        assert totals["parameters"] == sum(map(math.prod, sizes.values()))
        assert totals["copied"] > totals["parameters"] // 8
        assert plan.student == grown_spec(teacher, student, plan.config)
        assert set(plan.inexact) == {"image", "text"}
    for depth in DEPTH_OPERATORS:
        for zero in (False, True):
            assert make_plan(teacher, student, ExpandConfig.both(depth=depth, zero_new_outputs=zero)).totals["copied"]
    assert make_plan(teacher, student, ExpandConfig.both("insert_packed", reference_compatible=True)).totals["copied"]


def check_expanded(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> None:
    plan = make_plan(teacher, student, config)
    sizes = shapes(student)
    average = Lazy(teacher, 1) if plan.needs_average else None
    seen = set()
    for name, tensor in expand(plan, Lazy(teacher), 5, average).items():
        assert tuple(tensor.shape) == sizes[name], name
        assert tensor.dtype == torch.float32
        assert bool(torch.isfinite(tensor).all()), name
        seen.add(name)
    assert seen == set(sizes)


@pytest.mark.parametrize("name", SMALL_PAIRS)
@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_small_pairs_expand(width, name):
    depth = list(DEPTH_OPERATORS)[[*WIDTH_OPERATORS].index(width) % len(DEPTH_OPERATORS)]
    pair = SMALL_PAIRS[name]
    if width != "insert":
        pair = few_words(pair)
    check_expanded(*pair, ExpandConfig.both(width, depth, zero_new_outputs=width == "lemon"))


def tower_of(spec: ModelSpec, tower: str) -> nn.Module:
    """One tower of stock open_clip; the parameters of a ViT's or a text tower's hold nothing yet."""
    config: dict[str, Any] = spec.open_clip_config()
    settings, quick_gelu = config[f"{'vision' if tower == 'image' else 'text'}_cfg"], config.get("quick_gelu", False)
    if tower == "image" and spec.arch == "swin":
        register_swin(spec.timm_name)
        return open_clip.model._build_vision_tower(spec.embed_dim, settings, quick_gelu)
    make = open_clip.model._build_vision_tower if tower == "image" else open_clip.model._build_text_tower
    with torch.device("meta"):
        model: nn.Module = make(spec.embed_dim, settings, quick_gelu)
    if tower == "text":
        model.attn_mask = torch.full((spec.context_length, spec.context_length), -math.inf).triu(1)
    return model


@torch.no_grad()
def features(spec: ModelSpec, state: Mapping[str, Tensor], tower: str, dtype: torch.dtype) -> Tensor:
    """Features of one image or two captions: [1 or 2, embed_dim]."""
    model = tower_of(spec, tower).to(dtype)
    prefix = "visual." if tower == "image" else ""
    weights = {name: state[prefix + name].to(dtype) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
    images, tokens = samples(spec, 2)
    found: Tensor = model.eval()(images[:1].to(dtype) if tower == "image" else tokens)
    return found


def check_promises(teacher: ModelSpec, student: ModelSpec, configs: Iterable[ExpandConfig]) -> set[tuple[str, bool]]:
    """Each tower computes what the teacher's does if and only if the plan says so; which towers kept and lost it."""
    state, seen = random_weights(teacher), set()
    before: dict[tuple[str, torch.dtype], Tensor] = {}
    for config in configs:
        plan = make_plan(teacher, student, config)
        expanded = expand(plan, state, 2)
        for tower in TOWERS:
            promised = not plan.inexact[tower]
            # What differs does so in float32 as well, in half of the time.
            dtype = torch.float64 if promised else torch.float32
            if (tower, dtype) not in before:
                before[tower, dtype] = features(teacher, state, tower, dtype)
            old, new = before[tower, dtype], features(plan.student, expanded, tower, dtype)
            change = float((old - new).abs().max())
            about = f"{config.tower(tower).width}, {tower}: {change:.1e}, not promised for {plan.inexact[tower]}"
            assert change < 1e-10 if promised else 1e-3 < change < math.inf, about
            seen.add((tower, promised))
    return seen


@pytest.mark.parametrize("name", SMALL_PAIRS)
def test_small_pairs_keep_what_is_promised(name):
    exact = (ExpandConfig.both(width, zero_new_outputs=True) for width in ("lemon", "insert_exact", "net2net"))
    seen = check_promises(*few_words(SMALL_PAIRS[name]), [ExpandConfig(), *exact])
    assert seen == {("image", False), ("text", False), ("text", True)}


@pytest.mark.parametrize("name", matrix(LARGE_PAIRS, ("cc3m_vit: vit_t16 vit_s16",)))
def test_large_pairs_keep_what_is_promised(name):
    seen = check_promises(*LARGE_PAIRS[name], [ExpandConfig(), ExpandConfig.both("lemon", zero_new_outputs=True)])
    assert ("text", True) in seen


@pytest.mark.slow
def test_a_swin_of_twice_the_width_keeps_its_function():
    # The third stages are shorter than those of the presets: 4 and 6 layers instead of 6 and 18.
    teacher, student = (
        resolve(name, {"vocab_size": 500, "text_depth": 1, "depths": (2, 2, third, 2)})
        for name, third in (("swin_t", 4), ("swin_l", 6))
    )
    student = replace(student, text_width=2 * teacher.text_width, text_heads=2 * teacher.text_heads)
    exact = (ExpandConfig.both(width, zero_new_outputs=True) for width in ("net2net", "lemon"))
    assert check_promises(teacher, student, exact) == {("image", True), ("text", True)}
