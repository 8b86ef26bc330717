"""Which teacher element every student element is: against a slow oracle, by hand, and against deliberate mistakes."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from compt.errors import ArtefactError
from compt.expand import axes as axes_module
from compt.expand import execute
from compt.expand.axes import Axis, parameters
from compt.expand.execute import Draw, expand
from compt.expand.maps import OWN, ZERO, AxisMap, pack, prefix
from compt.expand.plan import make_plan
from compt.models.growth import ExpandConfig, added_layers, layer_sources
from compt.models.init import init_tensor, rule_for
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec
from tests.helpers.states import expand_state
from tests.unit.expand.cases import (
    BIG,
    HEAD,
    SMALL,
    TINY,
    Negative,
    insertion_oracle,
    negative,
    sentinels,
    sized,
    source_name,
)

BLOCK = "visual.transformer.resblocks"


class Refuse:
    def own(self, name: str, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError(f"own initialization of {name} was asked for")

    noise = own


def differences(teacher, student) -> list[str]:
    """The student parameters in which head-aligned insertion differs from the oracle."""
    old = sentinels(teacher)
    new = expand_state(make_plan(teacher, student), old, Negative())
    found = []
    for name, parameter in parameters(student).items():
        expected = insertion_oracle(name, old[source_name(name, teacher, student)], parameter.shape)
        if not torch.equal(new[name], expected):
            found.append(name)
    assert list(new) == list(parameters(student))
    return found


@pytest.mark.parametrize("pair", [(TINY, SMALL), (SMALL, BIG), (TINY, BIG)], ids=lambda pair: pair[1].name)
def test_every_parameter_is_the_oracles(pair):
    assert differences(*pair) == []


@pytest.mark.parametrize("role", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("tower", ["visual.", ""], ids=["image", "text"])
def test_each_head_of_each_role_keeps_role_and_head(role, tower):
    old = sentinels(SMALL)
    new = expand_state(make_plan(SMALL, BIG), old, Negative())
    heads, width = (SMALL.heads, BIG.width) if tower else (SMALL.text_heads, BIG.text_width)
    d = heads * HEAD
    for layer in range(2):
        block, source = f"{tower}transformer.resblocks.{layer}.attn", f"{tower}transformer.resblocks.{layer // 2}.attn"
        weight, bias, out = (new[f"{block}.{leaf}"] for leaf in ("in_proj_weight", "in_proj_bias", "out_proj.weight"))
        for head in range(width // HEAD):
            rows = weight[role * width + head * HEAD : role * width + (head + 1) * HEAD]
            biases = bias[role * width + head * HEAD : role * width + (head + 1) * HEAD]
            columns = out[:d, head * HEAD : (head + 1) * HEAD]
            if head >= heads:
                assert (rows < 0).all()
                assert (biases < 0).all()
                assert (columns < 0).all()
                continue
            start = role * d + head * HEAD
            assert torch.equal(rows[:, :d], old[f"{source}.in_proj_weight"][start : start + HEAD])
            assert (rows[:, d:] < 0).all()
            assert torch.equal(biases, old[f"{source}.in_proj_bias"][start : start + HEAD])
            assert torch.equal(columns, old[f"{source}.out_proj.weight"][:, head * HEAD : (head + 1) * HEAD])


def test_a_packed_matrix_taken_as_one_block_is_noticed(monkeypatch):
    def one_block(prefix: str, heads: int, head_width: int, suffix: str = ""):
        rows, columns = (
            Axis(f"{prefix}{name}{suffix}", n * heads * head_width, "hidden") for name, n in (("r", 3), ("c", 1))
        )
        return (rows,), (columns,)

    monkeypatch.setattr(axes_module, "_attention_axes", one_block)
    wrong = differences(TINY, SMALL)
    assert len(wrong) == 2 * (SMALL.depth + SMALL.text_depth)
    assert all("in_proj" in name for name in wrong)


def test_duplicate_repeats_heads_whole_and_leaves_positions_alone():
    student = sized("twice", 5, 2, 1, 1, context_length=7)
    old = sentinels(TINY)
    new = expand_state(make_plan(TINY, student, ExpandConfig.both("duplicate", noise=0)), old, Negative())
    weight, source = new[f"{BLOCK}.1.attn.in_proj_weight"], old[f"{BLOCK}.1.attn.in_proj_weight"]
    for role in range(3):
        for head in range(5):
            for channel in range(HEAD):
                for column in range(20):
                    got = weight[role * 20 + head * HEAD + channel, column]
                    assert got == source[role * 8 + (head % 2) * HEAD + channel, column % 8]
    c_proj = new[f"{BLOCK}.0.mlp.c_proj.weight"]
    assert all(c_proj[i, j] == old[f"{BLOCK}.0.mlp.c_proj.weight"][i % 8, j % 32] for i in range(20) for j in range(80))
    assert torch.equal(new["positional_embedding"][:5], old["positional_embedding"])
    assert (new["positional_embedding"][5:] < 0).all()


@pytest.mark.parametrize(
    ("operator", "p", "q", "expected"),
    [
        ("duplicate", 4, 6, [0, 0, 1, 2, 2, 3]),
        ("duplicate", 2, 3, [0, 0, 1]),
        ("duplicate", 12, 24, [k // 2 for k in range(24)]),
        ("duplicate", 3, 3, [0, 1, 2]),
        ("stack", 4, 6, [0, 1, 2, 3, 0, 1]),
        ("stack", 2, 5, [0, 1, 0, 1, 0]),
        ("constant", 4, 6, [0, 1, 2, 3, -1, -1]),
        ("interval", 4, 6, [0, -1, -1, 2, -1, -1]),
        ("interval", 2, 4, [0, -1, 1, -1]),
    ],
)
def test_depth_maps_by_hand(operator, p, q, expected):
    assert DEPTH_OPERATORS[operator].sources(p, q) == expected


@pytest.mark.parametrize("operator", DEPTH_OPERATORS)
def test_equal_depth_is_the_identity(operator):
    assert all(DEPTH_OPERATORS[operator].sources(depth, depth) == list(range(depth)) for depth in range(1, 30))


def test_pairs_keep_the_parity_of_shifted_windows():
    assert layer_sources("duplicate", 2, 6, 2) == [0, 1, 0, 1, 0, 1]
    assert layer_sources("duplicate", 6, 8, 2) == [0, 1, 0, 1, 2, 3, 4, 5]
    assert layer_sources("constant", 2, 6, 2) == [0, 1, -1, -1, -1, -1]
    assert layer_sources("duplicate", 3, 3, 2) == [0, 1, 2]


def test_layers_are_added_from_the_second_use_of_a_source_on():
    assert added_layers([0, 0, 1, 2, 2, 3]) == [False, True, False, False, True, False]
    assert added_layers([0, -1, 1, -1]) == [False, True, False, True]


def test_layer_sources_reach_the_right_tensors():
    student = sized("deep", 2, 4, 1, 2)
    old = sentinels(TINY)
    for operator, image, text in (("stack", [0, 1, 0, 1], [0, 0]), ("interval", [0, -1, 1, -1], [0, -1])):
        plan = make_plan(TINY, student, ExpandConfig.both(depth=operator))
        assert plan.layers == {BLOCK: image, "transformer.resblocks": text}
        new = expand_state(plan, old, Negative())
        for layer, source in enumerate(image):
            got = new[f"{BLOCK}.{layer}.mlp.c_fc.bias"]
            expected = negative("", (32,)) if source < 0 else old[f"{BLOCK}.{source}.mlp.c_fc.bias"]
            assert torch.equal(got, expected.to(got.dtype))


def test_own_size_gives_the_same_bytes_and_new_storage():
    old = sentinels(BIG)
    for width in WIDTH_OPERATORS:
        plan = make_plan(BIG, replace(BIG, name="again"), ExpandConfig.both(width))
        new = expand_state(plan, old, Refuse())
        assert plan.totals["copied"] == plan.totals["parameters"]
        for name, tensor in new.items():
            assert tensor.numpy().tobytes() == old[name].numpy().tobytes()
            assert tensor.data_ptr() != old[name].data_ptr()


def test_two_links_agree_with_one_on_the_inserted_block():
    old = sentinels(TINY)
    direct = expand_state(make_plan(TINY, BIG), old, Negative())
    between = expand_state(make_plan(TINY, SMALL), old, Negative())
    twice = expand_state(make_plan(SMALL, BIG), between, Negative())
    for name, tensor in direct.items():
        block = tensor >= 0
        assert block.any()
        assert torch.equal(tensor[block], twice[name][block]), name


def test_the_plan_counts_what_execution_copies():
    plan = make_plan(TINY, SMALL)
    new = expand_state(plan, sentinels(TINY), Negative())
    for entry in plan.entries:
        assert entry.copied == int((new[entry.name] >= 0).sum())
        assert entry.copied + entry.new + entry.zeroed == entry.size == new[entry.name].numel()
    by_name = {entry.name: entry for entry in plan.entries}
    packed = by_name[f"{BLOCK}.3.attn.in_proj_weight"]
    assert packed.copied / packed.size == pytest.approx((8 / 12) ** 2)
    assert packed.sources == (f"{BLOCK}.1.attn.in_proj_weight",)
    assert packed.rule == "insert head 2→3, res 8→12, layer 3 ← 1"
    assert by_name["logit_scale"].rule == "copy"
    totals = plan.totals
    assert totals["copied"] + totals["new"] == totals["parameters"] == sum(tensor.numel() for tensor in new.values())


@pytest.mark.parametrize("shape", [(), (1,)], ids=["exported", "inside"])
def test_logit_scale_is_inherited_as_a_scalar(shape):
    old = sentinels(TINY) | {"logit_scale": torch.full(shape, 3.25)}
    new = expand_state(make_plan(TINY, SMALL), old, Negative())
    assert new["logit_scale"].shape == ()
    assert new["logit_scale"] == 3.25


def test_new_elements_are_those_of_a_scratch_model():
    plan = make_plan(TINY, SMALL)
    old = {name: torch.full_like(tensor, 1e6, dtype=torch.float32) for name, tensor in sentinels(TINY).items()}
    new = expand(plan, old, seed=7)
    changed = 0
    for name, tensor in new.items():
        scratch = init_tensor(rule_for(SMALL, name, tensor.shape), 7, name, tensor.shape)
        own = tensor != 1e6
        assert torch.equal(tensor[own], scratch[own])
        changed += int(own.sum())
    assert changed == plan.totals["new"]
    other = expand(plan, old, seed=8)
    assert not torch.equal(other[f"{BLOCK}.0.mlp.c_fc.weight"], new[f"{BLOCK}.0.mlp.c_fc.weight"])


def test_each_parameter_is_made_when_it_is_asked_for():
    """So that neither model need be in memory whole: no tensor is read before its turn, and none is kept."""
    plan, old = make_plan(TINY, SMALL), {name: tensor.float() for name, tensor in sentinels(TINY).items()}
    reads: list[str] = []

    class Teacher(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    state = expand(plan, Teacher(old), seed=7)
    assert list(state) == [entry.name for entry in plan.entries]
    assert len(state) == len(plan.entries)
    assert reads == []
    assert torch.equal(state["visual.proj"], expand_state(plan, old, Draw(SMALL, 7))["visual.proj"])
    assert state["visual.proj"] is not state["visual.proj"]
    assert reads == ["visual.proj"] * 3
    made = []
    for tensor in state.values():
        made.append(weakref.ref(tensor))
        assert sum(one() is not None for one in made) == 1
    with pytest.raises(KeyError):
        state["visual.none"]


def test_the_teachers_dtype_is_kept():
    old = {name: tensor.to(torch.bfloat16) for name, tensor in sentinels(TINY).items()}
    assert {tensor.dtype for tensor in expand(make_plan(TINY, SMALL), old, 0).values()} == {torch.bfloat16}


TEXT = ("text_width", "text_depth", "text_heads", "text_head_width", "context_length", "vocab_size", "embed_dim")
SWIN = ModelSpec(
    name="windows",
    arch="swin",
    width=8,
    depth=4,
    heads=1,
    head_width=8,
    depths=(2, 2),
    stage_heads=(1, 2),
    window=2,
    image_size=16,
    patch_size=4,
    **{name: getattr(SMALL, name) for name in TEXT},
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("student", "depth"),
    [(sized("deep", 2, 4, 1, 2), "interval"), (BIG, "constant"), (SWIN, "duplicate")],
    ids=["zeros", "own layers", "own tower"],
)
def test_what_comes_from_nobody_has_the_teachers_dtype_too(student, depth, dtype):
    plan = make_plan(TINY, student, ExpandConfig.both(depth=depth, zero_new_outputs=student.depth == 4))
    assert {"own", "zero"} & {entry.action for entry in plan.entries}
    # logit_scale is often in fp32 beside weights of other types.
    old = {name: tensor.to(dtype) for name, tensor in sentinels(TINY).items()} | {"logit_scale": torch.tensor(3.25)}
    new = dict(expand(plan, old, seed=7))
    assert new.pop("logit_scale").dtype == torch.float32
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    for entry in plan.entries:
        if entry.action == "own":
            own = init_tensor(rule_for(plan.student, entry.name, entry.shape), 7, entry.name, entry.shape)
            assert torch.equal(new[entry.name], own.to(dtype)), entry.name
        elif entry.action == "zero":
            assert not new[entry.name].any()


def test_the_teachers_dtype_is_looked_up_once_and_only_where_it_is_needed():
    old = {name: tensor.to(torch.bfloat16) for name, tensor in sentinels(TINY).items()}
    reads: list[str] = []

    class Teacher(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    new = expand(make_plan(TINY, sized("deep", 2, 4, 1, 2), ExpandConfig.both(depth="constant")), Teacher(old), seed=7)
    assert new["visual.proj"].dtype == torch.bfloat16
    assert reads == ["visual.proj"]
    for layer in (2, 3, 2):
        assert new[f"{BLOCK}.{layer}.mlp.c_fc.weight"].dtype == torch.bfloat16
    assert len(reads) == 2


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_threads_do_not_show_in_a_single_bit(width):
    teacher, student = (
        sized("wide", 24, 1, 4, 1),
        sized("wider", 37, 1, 7, 1, embed_dim=9, image_size=16, patch_size=8),
    )
    plan = make_plan(teacher, student, ExpandConfig.both(width))
    old = {name: tensor.sin().float() for name, tensor in sentinels(teacher).items()}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(dict(expand(plan, old, seed=7)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert tensor.dtype == torch.float32
        assert all(torch.equal(tensor, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_what_is_computed_some_rows_at_a_time_is_what_is_computed_at_once(monkeypatch, width):
    plan = make_plan(SMALL, replace(BIG, image_size=16, patch_size=4), ExpandConfig.both(width))
    old = {name: tensor.sin().to(torch.bfloat16) for name, tensor in sentinels(SMALL).items()}
    whole = dict(expand(plan, old, seed=7))
    monkeypatch.setattr(execute, "_CHUNK", 7)
    for name, tensor in expand(plan, old, seed=7).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_what_is_not_finite_is_named_and_refused(monkeypatch, width):
    """One number of a parameter is enough, in whichever of the parts that are looked at it is."""
    monkeypatch.setattr(execute, "_CHUNK", 7)
    for name, place in (("visual.proj", (-1, -1)), ("logit_scale", ()), (f"{BLOCK}.1.mlp.c_fc.weight", (0, 0))):
        for value in (torch.nan, torch.inf, -torch.inf):
            old = {key: tensor.float() for key, tensor in sentinels(TINY).items()}
            old[name][place] = value
            new = expand(make_plan(TINY, SMALL, ExpandConfig.both(width)), old, 0)
            with pytest.raises(ArtefactError, match=rf"parameter {re.escape(name)}: 1 of [\d,]+ numbers are NaN"):
                dict(new)
            assert new["text_projection"].isfinite().all()
    plan = make_plan(TINY, sized("deep", 2, 4, 1, 2), ExpandConfig.both(width, "netexpand"))
    average = {**sentinels(TINY), f"{BLOCK}.1.ln_1.bias": torch.full((8,), torch.nan)}
    with pytest.raises(ArtefactError, match=r"1\.ln_1\.bias, moving average: 8 of 8 numbers are NaN"):
        dict(expand(plan, sentinels(TINY), 0, average))


def test_added_layers_come_from_the_moving_average():
    student = sized("deep", 2, 4, 1, 2)
    old = sentinels(TINY)
    average = {name: -1 - tensor for name, tensor in old.items()}
    plan = make_plan(TINY, student, ExpandConfig.both(depth="netexpand"))
    assert plan.needs_average
    new = expand_state(plan, old, Refuse(), average)
    for layer in range(4):
        source = (average if layer % 2 else old)[f"{BLOCK}.{layer // 2}.ln_1.bias"]
        assert torch.equal(new[f"{BLOCK}.{layer}.ln_1.bias"], source)
    assert torch.equal(new["visual.proj"], old["visual.proj"])
    rules = {entry.rule for entry in plan.entries if "blocks.1." in entry.name}
    assert rules == {"copy, layer 1 ← average of 0"}
    with pytest.raises(ArtefactError, match=r"moving average of tiny, .* optimizer\.ema"):
        expand(plan, old, 0)
    with pytest.raises(ArtefactError, match="tiny has no parameter .* among its moving average"):
        dict(expand(plan, old, 0, {}))


def test_a_scaling_operator_reaches_single_and_packed_axes(monkeypatch):
    def halved(kind, use, old: int, new: int, noise: float) -> AxisMap:
        return replace(prefix(old, new), weight=np.where(np.arange(new) == 0, 0.5, 1.0)[:, None])

    monkeypatch.setattr("compt.expand.maps.insert", halved)
    old = sentinels(TINY)
    new = expand_state(make_plan(TINY, SMALL, ExpandConfig()), old, Negative())
    source = old[f"{BLOCK}.0.attn.in_proj_bias"].reshape(3, 2, HEAD)
    got = new[f"{BLOCK}.0.attn.in_proj_bias"].reshape(3, 3, HEAD)
    assert torch.equal(got[:, 0], source[:, 0] * 0.5)
    assert torch.equal(got[:, 1], source[:, 1])
    projection = new["visual.proj"]
    assert projection[0, 0] == old["visual.proj"][0, 0] * 0.25
    assert projection[0, 1] == old["visual.proj"][0, 1] * 0.5


def test_packing_is_new_where_any_axis_is():
    packed = pack([prefix(2, 3), prefix(2, 3)])
    assert packed.index[:, 0].tolist() == [0, 1, OWN, 2, 3, OWN, OWN, OWN, OWN]
    zeros = pack([prefix(2, 3), prefix(1, 2, ZERO)])
    assert zeros.index[:, 0].tolist() == [0, ZERO, 1, ZERO, OWN, ZERO]
    assert packed.source_size == 4
