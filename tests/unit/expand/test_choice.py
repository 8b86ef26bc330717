"""Plans: every shipped pair, what is refused, what is recorded."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from compt.errors import ArtefactError, ConfigError
from compt.expand import axes as axes_module
from compt.expand.axes import check_parameters, parameters
from compt.expand.plan import ExpansionPlan, make_plan
from compt.models import growth
from compt.models.clip import exported_shapes
from compt.models.growth import ExpandConfig, TowerGrowth
from compt.models.operators import WIDTH_OPERATORS
from compt.models.presets import PRESETS, resolve
from compt.plan.links import check_growth
from tests.helpers.states import expand_state
from tests.unit.expand.cases import BIG, SMALL, TINY, Negative, sentinels, sized

LADDERS = (
    ("vit_t16", "vit_c16", "vit_s16", "vit_m16", "vit_b16", "vit_xb16", "vit_l16"),
    ("vit_pico", "vit_nano", "vit_micro", "vit_mini", "vit_midi", "vit_maxi"),
    ("swin_t", "swin_s", "swin_b", "swin_l"),
    ("swin_b384", "swin_l384"),
)
PAIRS = [pair for ladder in LADDERS for pair in itertools.pairwise(ladder)]


def test_the_ladders_hold_every_preset():
    assert {name for ladder in LADDERS for name in ladder} == set(PRESETS)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_step_of_the_shipped_ladders_plans(teacher, student):
    plan = make_plan(PRESETS[teacher], PRESETS[student])
    described = parameters(PRESETS[student])
    assert {entry.name: entry.shape for entry in plan.entries} == {n: p.shape for n, p in described.items()}
    assert {entry.action for entry in plan.entries} == {"gather"}
    assert 0 < plan.totals["copied"] < plan.totals["parameters"]
    smaller = sum(torch.Size(p.shape).numel() for p in parameters(PRESETS[teacher]).values())
    assert plan.totals["copied"] >= smaller
    written = json.dumps(plan.to_json())
    assert len(written) < 2000
    assert ExpansionPlan.from_json(json.loads(written)) == plan


def test_entries_have_a_rule_and_counts():
    plan = make_plan(TINY, SMALL, ExpandConfig.both(zero_new_outputs=True))
    entries = {entry.name: entry for entry in plan.entries}
    projection = entries["visual.proj"]
    assert (projection.shape, projection.rule) == ((12, 7), "insert res 8→12, emb 6→7")
    assert (projection.copied, projection.new, projection.zeroed) == (48, 36, 0)
    zeroed = entries["visual.transformer.resblocks.1.attn.out_proj.weight"]
    assert (zeroed.rule, zeroed.sources) == ("zero: layer 1 is added", ())
    assert (zeroed.copied, zeroed.new, zeroed.zeroed) == (0, 0, 144)
    assert entries["positional_embedding"].rule == "insert context 5→6, text_res 4→8"
    assert plan.totals["copied"] + plan.totals["new"] + plan.totals["zeroed"] == plan.totals["parameters"]


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_a_plan_comes_back_from_its_description_and_counts_everything(width):
    config = ExpandConfig(TowerGrowth(width, "stack"), TowerGrowth(width, "interval", True), 0.25)
    plan = make_plan(SMALL, BIG, config)
    again = ExpansionPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    table = json.loads(json.dumps(plan.table_json()))
    assert again.table_json() == table
    assert table["totals"] == {key: plan.to_json()[key] for key in table["totals"]}
    for key in ("copied", "new", "zeroed"):
        assert sum(entry[key] for entry in table["parameters"]) == table["totals"][key]
    assert set(table["inexact"]) == {"image", "text"}
    assert table["inexact"]["image"]


def test_a_plan_that_rebuilds_otherwise_is_refused():
    values = make_plan(TINY, SMALL).to_json()
    with pytest.raises(ArtefactError, match="'copied' is 1, but compt plans"):
        ExpansionPlan.from_json(values | {"copied": 1})
    with pytest.raises(ArtefactError, match="unreadable"):
        ExpansionPlan.from_json({"teacher": values["teacher"]})


@pytest.mark.parametrize(
    ("changes", "field", "old", "new"),
    [
        ({"width": 8, "heads": 2}, "width", 12, 8),
        ({"depth": 3}, "depth", 4, 3),
        ({"text_width": 4, "text_heads": 1}, "text_width", 8, 4),
        ({"text_depth": 1}, "text_depth", 2, 1),
        ({"context_length": 4}, "context_length", 6, 4),
        ({"embed_dim": 3}, "embed_dim", 7, 3),
        ({"mlp_ratio": 2.0}, "mlp_ratio x text_width", 32, 16),
    ],
)
def test_shrinking_is_refused_with_both_models_field_and_values(changes, field, old, new):
    student = replace(SMALL, name="lesser", **changes)
    message = f"cannot expand small to lesser: its {field} {new} is smaller than the {old} of 'small'"
    with pytest.raises(ConfigError, match=message):
        make_plan(SMALL, student)


@pytest.mark.parametrize(
    ("changes", "field", "old", "new"),
    [
        ({"head_width": 6, "width": 18}, "head_width", 4, 6),
        ({"no_ln_pre": True}, "no_ln_pre", False, True),
    ],
)
def test_sizes_that_must_agree(changes, field, old, new):
    student = replace(SMALL, name="other", **changes)
    with pytest.raises(ConfigError, match=f"small to other: its {field} is {new}, but 'small', .* has {old}"):
        make_plan(SMALL, student)


@pytest.mark.parametrize("changes", [{"image_size": 16}, {"patch_size": 2}, {"patch_size": 8, "image_size": 16}])
def test_positions_and_patches_are_resized_but_not_as_the_authors_code(changes):
    student = replace(SMALL, name="other", **changes)
    rules = {entry.name: entry.rule for entry in make_plan(SMALL, student).entries if entry.rule != "copy"}
    assert ("bicubic pos 5→" in rules.get("visual.positional_embedding", "")) == (
        changes != {"patch_size": 8, "image_size": 16}
    )
    assert ("pseudo-inverse patch_y 4→" in rules.get("visual.conv1.weight", "")) == ("patch_size" in changes)
    with pytest.raises(ConfigError, match="but 'small' has .*; reference_compatible resizes nothing"):
        make_plan(SMALL, student, ExpandConfig(reference_compatible=True))


def test_one_table_says_what_must_agree(monkeypatch):
    monkeypatch.setattr(growth, "SAME", ("embed_dim",))
    with pytest.raises(ConfigError, match="its embed_dim is 10"):
        make_plan(SMALL, BIG)
    with pytest.raises(ConfigError, match="its embed_dim is 10"):
        check_growth(SMALL, BIG)


def test_unknown_operators_are_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"width = 'insrt': unknown width operator .*'insert'"):
        ExpandConfig.both("insrt")
    with pytest.raises(ConfigError, match="unknown depth operator; known: duplicate, stack"):
        ExpandConfig.both(depth="x")


def test_a_parameter_without_axes_is_an_error(monkeypatch):
    known = axes_module.parameters

    def without_projection(spec):
        return {name: parameter for name, parameter in known(spec).items() if name != "visual.proj"}

    monkeypatch.setattr(axes_module, "parameters", without_projection)
    with pytest.raises(ConfigError, match=r"compt\.expand\.axes has other shapes of visual\.proj, or lacks them"):
        make_plan(replace(TINY, name="fresh"), SMALL)


def test_a_description_that_the_real_model_does_not_follow_is_an_error(monkeypatch):
    shapes = exported_shapes(PRESETS["swin_t"])
    monkeypatch.setattr(axes_module, "exported_shapes", lambda spec: shapes)
    with pytest.raises(ConfigError, match=r"other shapes of visual\.trunk\.layers\.2\.blocks\.6\.attn"):
        check_parameters(resolve("swin_t", {"depths": (2, 2, 8, 2)}))
    with pytest.raises(ConfigError, match=r"other shapes of visual\.trunk.*bias_table"):
        check_parameters(resolve("swin_t", {"window": 8}))


def test_weights_that_do_not_fit_the_plan_are_refused():
    plan, old = make_plan(TINY, SMALL), sentinels(TINY)
    with pytest.raises(ArtefactError, match=r"tiny has no parameter visual\.proj"):
        expand_state(plan, {name: tensor for name, tensor in old.items() if name != "visual.proj"}, Negative())
    with pytest.raises(ArtefactError, match=r"visual\.proj has shape \[6, 8\], but the plan has \[8, 6\]"):
        expand_state(plan, old | {"visual.proj": old["visual.proj"].T}, Negative())


def test_another_architecture_keeps_text_and_starts_a_fresh_image_tower():
    for teacher, student in (("vit_s16", "swin_s"), ("swin_t", "vit_b16")):
        plan = make_plan(PRESETS[teacher], PRESETS[student])
        for entry in plan.entries:
            assert entry.action == ("own" if entry.name.startswith("visual.") else "gather")
        assert list(plan.layers) == ["transformer.resblocks"]


def test_another_architecture_must_not_have_fewer_parameters():
    student = resolve("vit_t16", {"text_width": 512})
    with pytest.raises(ConfigError, match=r"to vit_t16: its [\d,]+ parameters are fewer than the [\d,]+ of 'swin_b'"):
        make_plan(PRESETS["swin_b"], student)


def test_swin_depth_grows_in_pairs_stage_by_stage():
    plan = make_plan(PRESETS["swin_t"], PRESETS["swin_s"])
    assert plan.layers["visual.trunk.layers.0.blocks"] == [0, 1]
    assert plan.layers["visual.trunk.layers.2.blocks"] == [0, 1] * 3 + [2, 3] * 3 + [4, 5] * 3


def test_an_odd_swin_stage_cannot_grow(monkeypatch):
    monkeypatch.setattr(axes_module, "check_parameters", lambda spec: None)
    student = replace(PRESETS["swin_t"], name="odd", depths=(2, 2, 7, 2), depth=13, timm_name="")
    with pytest.raises(ConfigError, match=r"its depths\[2\] grows from 6 to 7; .* come in pairs"):
        make_plan(PRESETS["swin_t"], student)
    with pytest.raises(ConfigError, match=r"to less: its depths\[2\] 4 is smaller than the 6 of 'swin_t'"):
        make_plan(PRESETS["swin_t"], replace(student, name="less", depths=(2, 2, 4, 6), depth=14, timm_name=""))


def test_models_with_and_without_the_first_norm_are_described():
    check_parameters(BIG)
    check_parameters(sized("plain", 2, 2, 1, 1, no_ln_pre=True))
