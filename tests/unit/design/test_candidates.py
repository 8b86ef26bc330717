"""Candidate models of a designed chain, and the cost of their epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compt.cost.counts import parameters
from compt.cost.gpus import find_device
from compt.cost.speed import Conditions, Throughput, speed
from compt.design.candidates import _grows, candidates, ladder, text_shape
from compt.design.costs import epoch_steps, hours_costs, macs_costs
from compt.design.sizes import log2_size
from compt.errors import ConfigError
from compt.models.presets import PRESETS, ModelSpec, resolve
from compt.plan.jobs import recipe_cost
from compt.plan.links import check_growth
from compt.recipe.read import load_recipe
from compt.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[3]
VITS = [spec for spec in PRESETS.values() if spec.arch == "vit"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "cc3m_vit.yaml", overrides)


def wanted(*names: str) -> dict[str, ModelSpec]:
    return {name: PRESETS[name] for name in names}


def changed(name: str, preset: str, **sizes: int) -> dict[str, ModelSpec]:
    return {name: replace(resolve(preset, sizes), name=name)}


@pytest.mark.parametrize("spec", VITS, ids=lambda spec: spec.name)
def test_the_text_tower_of_every_preset(spec: ModelSpec) -> None:
    assert text_shape(spec, ladder(spec)) == pytest.approx((spec.text_width, spec.text_depth))


def test_text_towers_grow_with_image_towers() -> None:
    family, largest = ladder(PRESETS["vit_t16"]), PRESETS["vit_l16"]
    specs = [replace(largest, width=64 * n, heads=n, depth=2 * n) for n in range(1, 25)]
    shapes = [text_shape(spec, family) for spec in specs]
    widths = [width for width, _ in shapes]
    assert widths == sorted(widths)
    assert widths[0] < 256 < 768 < widths[-1]
    assert [depth for _, depth in shapes] == pytest.approx([12] * 24)


def test_text_towers_follow_those_of_the_wanted_models() -> None:
    """Half as deep a text tower in the wanted model, half as deep in its candidates; the same for Swins."""
    for names in (("vit_b16",), ("swin_b",)):
        usual = candidates(wanted(*names))
        family = {name: resolve(name, {"text_depth": 6, "text_width": 1024}) for name in names}
        found = candidates(family)
        before = {(spec.width, spec.depth, spec.depths): spec.text_width for spec in usual.specs}
        assert len(found.specs) >= len(usual.specs)
        for spec in found.specs:
            width = before.get((spec.width, spec.depth, spec.depths))
            assert spec.text_depth == 6
            assert width is None or spec.text_width == pytest.approx(2 * width, abs=64)
        assert found.grows[:-1, -1].all()
        assert {found.specs[at].name for at in found.presets} >= {names[0], names[0].replace("b", "s")}


def test_candidates_for_a_family() -> None:
    found = candidates(wanted("vit_t16", "vit_l16"))
    sizes = [parameters(spec) for spec in found.specs]
    assert sizes == sorted(sizes)
    assert [found.specs[at].name for at in found.wanted] == ["vit_t16", "vit_l16"]
    assert {found.specs[at].name for at in found.presets} == {spec.name for spec in VITS if spec.head_width == 64}
    assert len({spec.name for spec in found.specs}) == len(found.specs) > 100
    assert found.specs[-1] == PRESETS["vit_l16"]
    assert all(spec.width % 64 == 0 and spec.text_width % 64 == 0 for spec in found.specs)
    shares = [spec.width / spec.depth for spec in found.specs]
    assert min(shares) >= 192 / 12
    assert max(shares) <= 1024 / 12
    assert log2_size(found.specs[0]) >= log2_size(PRESETS["vit_t16"]) - 4


def test_growth_of_every_pair() -> None:
    found = candidates(wanted("vit_t16", "vit_b16"))
    seen = set()
    for row, teacher in enumerate(found.specs):
        for column, student in enumerate(found.specs):
            try:
                check_growth(teacher, student)
                grows = True
            except ConfigError:
                grows = False
            assert found.grows[row, column] == grows, (teacher.name, student.name)
            seen.add(grows)
    assert seen == {True, False}


def test_candidates_take_what_is_common_from_the_next_larger_wanted_model() -> None:
    family = {
        "small": resolve("vit_t16", {"embed_dim": 256, "image_size": 160, "context_length": 32}),
        "big": resolve("vit_b16", {"embed_dim": 768, "image_size": 160, "context_length": 64}),
    }
    family = {name: replace(spec, name=name) for name, spec in family.items()}
    found = candidates(family)
    at = found.wanted[0]
    assert found.specs[at].name == "small"
    assert {(spec.embed_dim, spec.context_length) for spec in found.specs[:at]} == {(256, 32)}
    above = [spec for spec in found.specs if log2_size(spec) > log2_size(family["small"])]
    assert {(spec.embed_dim, spec.context_length) for spec in above} == {(768, 64)}
    assert {spec.image_size for spec in found.specs} == {160}


def test_candidates_have_the_loss_of_the_wanted_models() -> None:
    found = candidates(recipe("optimizer.loss=siglip").specs())
    assert {spec.loss for spec in found.specs} == {"siglip"}
    assert len(found.presets) == 7


def test_the_small_family_has_its_own_proportions() -> None:
    found = candidates(wanted("vit_mini"))
    assert all(spec.width % 32 == 0 and spec.text_width % 32 == 0 for spec in found.specs)
    assert {"vit_nano", "vit_micro", "vit_mini"} <= {spec.name for spec in found.specs}
    assert {spec.image_size for spec in found.specs} == {32}


def test_a_candidate_does_not_take_a_wanted_model_s_name() -> None:
    odd = replace(resolve("vit_b16", {"depth": 16}), name="vit_s16")
    names = [spec.name for spec in candidates({"vit_s16": odd}).specs]
    assert len(set(names)) == len(names)
    assert names.count("vit_s16") == 1


def test_swins_are_presets() -> None:
    found = candidates(wanted("swin_t", "swin_l"))
    assert [spec.name for spec in found.specs] == ["swin_t", "swin_s", "swin_b", "swin_l"]
    assert found.grows.tolist() == np.triu(np.ones((4, 4), dtype=bool), 1).tolist()


def test_presets_stand_before_a_swin_that_is_none_in_its_resolution() -> None:
    family = {"wide": resolve("swin_l384", {"width": 256, "name": "wide"})}
    found = candidates(family)
    assert [spec.name for spec in found.specs] == ["swin_t", "swin_s", "swin_b", "swin_l", "wide"]
    assert {spec.image_size for spec in found.specs} == {384}
    assert {spec.stage_windows for spec in found.specs} == {(12, 12, 12, 12)}
    assert found.specs[0].timm_name == "compt_swin_w96_d2-2-6-2_h32_p4_win12_384"
    assert found.specs[3].timm_name == "swin_large_patch4_window12_384"


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (wanted("vit_b16", "swin_b"), "ViTs and Swins"),
        (
            {**wanted("vit_b16"), "deep": replace(resolve("vit_s16", {"depth": 48}), name="deep")},
            "'deep' and 'vit_b16'",
        ),
        ({**wanted("vit_b16"), "other": replace(resolve("vit_l16", {"image_size": 160}), name="other")}, "image_size"),
    ],
)
def test_models_that_cannot_be_in_one_chain(family: dict[str, ModelSpec], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        candidates(family)


def some_pairs(specs: tuple[ModelSpec, ...]) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    return [tuple(sorted(rng.choice(len(specs), 2, replace=False))) for _ in range(25)]  # type: ignore[misc]


@pytest.mark.parametrize("overrides", [(), ("chain.distill.alpha=0",), ("engine.micro_batch=64",)])
def test_costs_of_pairs_are_the_planner_s(overrides: tuple[str, ...]) -> None:
    plan = recipe(*overrides)
    embeds = {"vit_s16": resolve("vit_s16", {"embed_dim": 384}), "vit_b16": PRESETS["vit_b16"]}
    specs = candidates({name: replace(spec, name=name) for name, spec in embeds.items()}).specs
    device = find_device("h100")
    macs, hours = macs_costs(plan, specs, gpus=8), hours_costs(plan, specs, device, gpus=8)
    samples = epoch_steps(plan) * 1024
    for teacher, student in some_pairs(specs):
        before = specs[teacher] if plan.chain.distill.alpha else None
        for given, at in ((before, (teacher, student)), (None, None)):
            cost = recipe_cost(plan, specs[student], given, epoch_steps(plan), 8, None)
            found = speed(specs[student], given, cost, device, Conditions.of(plan, 8, specs[student].name))
            expected = cost.total_macs, samples * found.seconds_per_sample / 3600
            shown = (macs.links[at], hours.links[at]) if at else (macs.alone[student], hours.alone[student])
            assert shown == pytest.approx(expected, rel=1e-9)
    assert len({spec.embed_dim for spec in specs}) == 2


@pytest.mark.parametrize("grown", [{}, {"norm_eps": 2e-5, "text_norm_eps": 3e-5}])
def test_measured_speeds_replace_projected_ones(grown: dict[str, float]) -> None:
    """Those of models that an operator gave other norms, too."""
    plan = recipe()
    specs = tuple(PRESETS[name] for name in ("vit_t16", "vit_s16", "vit_b16"))
    shown = [{**spec.to_dict(), **grown} for spec in specs]
    common = {"captions": 4, "tokens": 77.0, "batch": 256, "repeats": 3}
    entries = [
        {"student": shown[1], "teacher": shown[0], "seconds_per_sample": 7.0, **common},
        {"student": shown[2], "teacher": None, "seconds_per_sample": 9.0, **common},
        {"student": PRESETS["vit_l16"].to_dict(), "teacher": None, "seconds_per_sample": 1.0, **common},
    ]
    file = Throughput.model_validate(
        {
            "device": "a GPU",
            "kind": "h100",
            "precision": "bf16",
            "seed": 0,
            "date": "2026-01-01",
            "command": "x",
            "versions": {},
            "entries": entries,
        }
    )
    device = find_device("h100")
    projected = hours_costs(plan, specs, device)
    found = hours_costs(plan, specs, device, throughput=file)
    an_hour = epoch_steps(plan) * 1024 / 3600
    assert found.links[0, 1] == pytest.approx(7 * an_hour)
    assert found.alone[2] == pytest.approx(9 * an_hour)
    assert (found.links != projected.links).sum() == 1
    without = hours_costs(recipe("chain.distill.alpha=0"), specs, device, throughput=file)
    assert without.links[:, 2] == pytest.approx([9 * an_hour] * 3)


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 256},
        {"context_length": 32},
        {"mlp_ratio": 2.0, "width": 320, "heads": 5, "text_width": 512, "text_heads": 8},
        {"mlp_ratio": 2.0, "width": 512, "heads": 8, "text_width": 320, "text_heads": 5},
        {"depth": 8},
        {"text_depth": 6},
        {"text_width": 192, "text_heads": 3},
        {"width": 128, "heads": 2, "depth": 60},
    ],
)
def test_no_axis_shrinks(sizes: dict[str, int]) -> None:
    small, large = PRESETS["vit_t16"], PRESETS["vit_s16"]
    smaller = replace(large, **sizes)  # type: ignore[arg-type]
    family = [small, smaller]
    with pytest.raises(ConfigError):
        check_growth(*family)
    counts = [1, 2]
    assert not _grows(family, counts).any()
    assert _grows([small, large], counts).tolist() == [[False, True], [False, False]]
    assert not _grows([small, large], [2, 1]).any()
