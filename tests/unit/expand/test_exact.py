"""Which expansions keep the function: stock open_clip in float64 before and after, and each rule broken on purpose."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import open_clip.model
import pytest
import torch
from torch import Tensor

from compt.errors import ConfigError
from compt.expand.execute import expand
from compt.expand.linalg import complete
from compt.expand.plan import ExpansionPlan, make_plan
from compt.models.growth import ExpandConfig, TowerGrowth
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec
from tests.helpers.states import expand_state
from tests.unit.expand.oracle import Marks, build, differences, numbered, random_weights, samples, swin, vit

EXACT = 1e-10
BROKEN = 1e-8

# A large eps: with 1e-5, a forgotten factor would change features by at most about 1e-6.
T = vit("t", 2, 2, 2, 2, text_norm_eps=1e-3, norm_eps=1e-3)
BARE = replace(T, name="bare", no_ln_pre=True)
SWIN = swin("s", 1, (2, 2, 2), text_heads=2, text_depth=2)


def grown(spec: ModelSpec, heads: int, text_heads: int, **other: Any) -> ModelSpec:
    """The same model with more heads in both towers (and stages)."""
    changes: dict[str, Any] = {
        "name": "grown",
        "heads": heads,
        "width": 4 * heads,
        "text_heads": text_heads,
        "text_width": 4 * text_heads,
    }
    if spec.arch == "swin":
        changes |= {"stage_heads": tuple(heads * 2**stage for stage in range(3)), "timm_name": ""}
        changes["depth"] = sum(other.get("depths", spec.depths))
    return replace(spec, **changes | other)


@dataclass
class Grown:
    """A teacher and what it grew into."""

    teacher: ModelSpec
    state: dict[str, Tensor]
    plan: ExpansionPlan
    student: ModelSpec
    expanded: dict[str, Tensor]

    def differences(self) -> dict[str, float]:
        return differences(self.teacher, self.state, self.student, self.expanded)


def grow(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig, seed: int = 3) -> Grown:
    state = random_weights(teacher)
    plan = make_plan(teacher, student, config)
    average = random_weights(teacher, 9) if plan.needs_average else None
    return Grown(teacher, state, plan, plan.student, dict(expand(plan, state, seed, average)))


def exact(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> Grown:
    """Expand, and assert that the plan promises the same function for both towers, and that they keep it."""
    found = grow(teacher, student, config)
    assert {tower: tuple(reasons) for tower, reasons in found.plan.inexact.items()} == {"image": (), "text": ()}
    assert max(found.differences().values()) < EXACT
    return found


def inexact(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig, tower: str, parameter: str) -> None:
    """Expand, and assert that the plan names the parameter that prevents exactness, and that the function changes."""
    found = grow(teacher, student, config)
    reasons = found.plan.inexact[tower]
    assert any(reason.startswith(parameter) for reason in reasons), reasons
    assert found.differences()[tower] > 1e-6


# --- widths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("width", ["net2net", "lemon"])
@pytest.mark.parametrize("teacher", [T, BARE, SWIN], ids=lambda spec: spec.name)
def test_copies_are_exact_at_integer_ratios_everywhere(teacher, width, noise):
    for factor in (2, 3):
        exact(teacher, grown(teacher, factor * teacher.heads, 6), ExpandConfig.both(width, noise=noise))


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("width", ["lemon", "insert_exact"])
@pytest.mark.parametrize("heads", [3, 5, 7])
def test_lemon_and_exact_insertion_keep_the_function_at_any_ratio(width, heads, noise):
    exact(BARE, grown(BARE, heads, 8 - heads + 2), ExpandConfig.both(width, noise=noise))
    exact(BARE, grown(BARE, heads, heads, embed_dim=11), ExpandConfig.both(width, noise=noise))


@pytest.mark.parametrize("width", ["net2net", "lemon", "insert_exact"])
@pytest.mark.parametrize("teacher", [T, BARE, SWIN], ids=lambda spec: spec.name)
def test_hidden_units_and_the_joint_embedding_grow_at_any_ratio(teacher, width):
    wider: dict[str, Any] = {"timm_name": ""} if teacher.arch == "swin" else {}
    exact(teacher, replace(teacher, name="hidden", mlp_ratio=5.5, **wider), ExpandConfig.both(width))
    exact(teacher, replace(teacher, name="joint", embed_dim=2 * teacher.embed_dim + 3), ExpandConfig.both(width))


@pytest.mark.parametrize("width", ["net2net", "lemon", "insert_exact"])
def test_growing_joint_embeddings_keep_every_cosine(width):
    found = exact(BARE, grown(BARE, 4, 4, embed_dim=13), ExpandConfig.both(width, noise=0.5))
    assert found.differences()["pair"] < EXACT


def test_towers_may_keep_the_function_by_different_operators():
    towers = ExpandConfig(TowerGrowth("net2net"), TowerGrowth("insert_exact"))
    exact(T, grown(T, 4, 5, embed_dim=9), towers)
    found = grow(T, grown(T, 3, 5), ExpandConfig(TowerGrowth("insert"), TowerGrowth("lemon")))
    assert found.plan.inexact["image"]
    assert not found.plan.inexact["text"]
    assert found.differences()["text"] < EXACT


@pytest.mark.parametrize(
    ("teacher", "student", "width", "tower", "parameter"),
    [
        (T, grown(T, 3, 2), "lemon", "image", "visual.ln_pre.weight"),
        (T, grown(T, 3, 2), "insert_exact", "image", "visual.ln_pre.weight"),
        (T, grown(T, 4, 2), "insert_exact", "image", "visual.ln_pre.weight"),
        (T, grown(T, 3, 2), "net2net", "image", "visual."),
        (BARE, grown(BARE, 2, 3), "net2net", "text", ""),
        (swin("s2", 2, (2, 2, 2)), swin("s3", 3, (2, 2, 2)), "lemon", "image", "visual.trunk."),
        (swin("s2", 2, (2, 2, 2)), swin("s3", 3, (2, 2, 2)), "net2net", "image", "visual.trunk."),
        (SWIN, grown(SWIN, 2, 2), "insert_exact", "image", "visual.trunk.patch_embed.norm.weight"),
        (T, grown(T, 4, 2), "insert", "image", "visual."),
        (T, grown(T, 2, 4), "duplicate", "text", ""),
        (T, grown(T, 4, 2), "netexpand", "image", "visual."),
        (T, grown(T, 4, 2), "interpolate", "image", "visual."),
        (T, grown(T, 4, 2), "insert_packed", "image", "visual."),
    ],
)
def test_a_plan_names_what_forbids_exactness(teacher, student, width, tower, parameter):
    inexact(teacher, student, ExpandConfig.both(width), tower, parameter)


def test_longer_captions_and_more_words_change_nothing_for_old_ones():
    student = replace(T, name="longer", context_length=9, vocab_size=17)
    for width in WIDTH_OPERATORS:
        exact(T, student, ExpandConfig.both(width))
    exact(BARE, grown(BARE, 3, 3, context_length=8, vocab_size=12), ExpandConfig.both("lemon"))
    exact(BARE, grown(BARE, 3, 3, context_length=8, vocab_size=12), ExpandConfig.both("insert_exact"))


def test_finer_grids_are_not_promised():
    for change in ({"image_size": 16}, {"image_size": 16, "patch_size": 8}):
        plan = make_plan(T, replace(T, name="finer", **change), ExpandConfig.both("lemon"))
        assert plan.inexact["image"]
        assert all(reason.startswith("visual.") for reason in plan.inexact["image"])
        assert not plan.inexact["text"]


# --- depths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTH_OPERATORS)
@pytest.mark.parametrize("teacher", [T, SWIN], ids=lambda spec: spec.name)
def test_depth_is_exact_where_added_layers_say_nothing(teacher, depth):
    if teacher.arch == "swin":
        deeper = grown(teacher, 1, 2, depths=(4, 2, 4), text_depth=4)
    else:
        deeper = replace(teacher, name="deeper", depth=4, text_depth=6)
    exact(teacher, deeper, ExpandConfig.both(depth=depth, zero_new_outputs=True))
    found = grow(teacher, deeper, ExpandConfig.both(depth=depth))
    for tower in ("image", "text"):
        assert found.plan.inexact[tower]
        assert found.differences()[tower] > 1e-4


def test_lost_layers_are_not_promised():
    deeper = replace(T, name="deeper", depth=3, text_depth=5)
    found = grow(T, deeper, ExpandConfig.both(depth="interval", zero_new_outputs=True))
    assert all(found.plan.inexact[tower] for tower in ("image", "text"))
    assert min(found.differences().values()) > 1e-4
    for depth in ("duplicate", "stack", "constant", "netexpand"):
        exact(T, deeper, ExpandConfig.both(depth=depth, zero_new_outputs=True))


@pytest.mark.parametrize("depth", DEPTH_OPERATORS)
@pytest.mark.parametrize("width", ["net2net", "lemon", "insert_exact"])
def test_width_and_depth_together_are_exact(width, depth):
    deeper = grown(BARE, 4, 6, depth=4, text_depth=4, embed_dim=7)
    exact(BARE, deeper, ExpandConfig.both(width, depth, True, noise=0.5))
    if width != "insert_exact":
        deeper = grown(SWIN, 2, 4, depths=(2, 4, 4), text_depth=4, embed_dim=10)
        exact(SWIN, deeper, ExpandConfig.both(width, depth, True))


def test_reference_compatible_depth_is_exact_with_silent_layers():
    config = ExpandConfig.both("insert", "duplicate", True, reference_compatible=True)
    exact(T, replace(T, name="twice", depth=4, text_depth=3), config)
    exact(SWIN, grown(SWIN, 1, 2, depths=(3, 2, 5)), config)


# --- negative controls ---------------------------------------------------------------------------------------------

Break = Callable[[Grown], None]


def times(name: str, where: Any, factor: float) -> Break:
    def change(found: Grown) -> None:
        found.expanded[name][where] *= factor

    return change


def plus(name: str, where: Any, value: float) -> Break:
    def change(found: Grown) -> None:
        found.expanded[name][where] += value

    return change


def old_eps(found: Grown) -> None:
    found.student = replace(found.student, text_norm_eps=found.teacher.text_norm_eps, norm_eps=found.teacher.norm_eps)


def own_noise(name: str, where: Any) -> Break:
    """Noise that does not cancel over the copies."""

    def change(found: Grown) -> None:
        part = found.expanded[name][where]
        found.expanded[name][where] = part * (1 + 0.1 * torch.linspace(0, 1, part.numel()).reshape(part.shape))

    return change


FIRST = "transformer.resblocks.0."
REST, OLD = slice(16, None), slice(0, 8)  # of a residual stream of 8 that grows to 20: two copies and 4 means
BREAKS: dict[str, dict[str, Break]] = {
    "lemon": {
        "eps": old_eps,
        "a gain": times("ln_final.weight", slice(0, 16), 1.5**0.5),
        "means of the embedding": times("token_embedding.weight", (slice(None), REST), 0.0),
        "mean of a bias": times(f"{FIRST}mlp.c_proj.bias", REST, 0.0),
        "a mean row": times(f"{FIRST}attn.out_proj.weight", REST, 0.0),
        "a shift of the rest": plus(f"{FIRST}ln_1.bias", REST, 0.1),
        "a column of the stream": times(f"{FIRST}mlp.c_fc.weight", (slice(None), 0), 2.0),
        "a head's columns": times(f"{FIRST}attn.out_proj.weight", (slice(None), slice(0, 4)), 2.0),
        "noise": own_noise("text_projection", slice(0, 16)),
    },
    "insert_exact": {
        "eps": old_eps,
        "a gain": times(f"{FIRST}ln_2.weight", OLD, 1.2),
        "a mean": plus("positional_embedding", (slice(None), OLD), 0.1),
        "mean of a bias": plus(f"{FIRST}attn.out_proj.bias", OLD, 0.1),
        "a new row": plus(f"{FIRST}mlp.c_proj.bias", slice(8, None), 0.1),
        "a new shift": plus("ln_final.bias", slice(8, None), 0.1),
        "a new unit": plus(f"{FIRST}mlp.c_proj.weight", (OLD, slice(32, 33)), 0.1),
        "a new head": plus(f"{FIRST}attn.out_proj.weight", (OLD, slice(8, 12)), 0.1),
        "the joint embedding": times("text_projection", (slice(None), 0), 2**0.5),
    },
    "net2net": {
        "a column of the stream": times(f"{FIRST}attn.in_proj_weight", (slice(None), 3), 2.0),
        "a hidden unit": times(f"{FIRST}mlp.c_proj.weight", (slice(None), 5), 2.0),
        "a head's columns": times(f"{FIRST}attn.out_proj.weight", (slice(None), slice(8, 12)), 2.0),
        "the joint embedding": times("text_projection", (slice(None), 0), 2**0.5),
        "noise": own_noise(f"{FIRST}mlp.c_fc.weight", slice(None)),
        "keys for values": lambda found: found.expanded[f"{FIRST}attn.in_proj_bias"].data.copy_(
            found.expanded[f"{FIRST}attn.in_proj_bias"].roll(16)
        ),
    },
}


@pytest.mark.parametrize(("width", "rule"), [(width, rule) for width in BREAKS for rule in BREAKS[width]])
def test_one_broken_rule_is_noticed(width, rule):
    found = exact(BARE, grown(BARE, 4, 4 if width == "net2net" else 5, embed_dim=9), ExpandConfig.both(width))
    BREAKS[width][rule](found)
    broken = found.differences()
    assert broken["text"] > BROKEN
    # What is broken in one tower stays there; the eps is that of both.
    assert rule == "eps" or broken["image"] < EXACT


@pytest.mark.parametrize("leaf", ["attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"])
def test_one_output_that_is_not_zero_is_noticed(leaf):
    deeper = replace(T, name="deeper", depth=4, text_depth=4)
    found = exact(T, deeper, ExpandConfig.both(zero_new_outputs=True))
    tensor = found.expanded[f"visual.transformer.resblocks.1.{leaf}"]
    assert not tensor.any()
    tensor.view(-1)[0] += 0.1
    assert found.differences()["image"] > BROKEN


def test_an_image_eps_and_a_relative_position_out_of_place_are_noticed():
    found = exact(BARE, grown(BARE, 3, 2), ExpandConfig.both("lemon"))
    found.student = replace(found.student, norm_eps=BARE.norm_eps)
    assert found.differences()["image"] > BROKEN
    found = exact(SWIN, grown(SWIN, 2, 2), ExpandConfig.both("net2net"))
    table = found.expanded["visual.trunk.layers.1.blocks.0.attn.relative_position_bias_table"]
    table.copy_(table.roll(1, 0).clone())
    assert found.differences()["image"] > BROKEN


# --- the promise at large ------------------------------------------------------------------------------------------


def some_pair(draw: random.Random) -> tuple[ModelSpec, ModelSpec, ExpandConfig]:
    """A random teacher, something that it can grow into, and operators."""
    heads, text_heads = draw.choice([1, 2]), draw.choice([1, 2])
    eps = draw.choice([1e-5, 1e-3])
    if draw.random() < 0.35:
        teacher = swin("teacher", heads, (2, 2, 2), text_heads=text_heads, text_norm_eps=eps)
    else:
        bare = draw.random() < 0.5
        teacher = vit("teacher", heads, 2, text_heads, 2, no_ln_pre=bare, norm_eps=eps, text_norm_eps=eps)
    other: dict[str, Any] = {"text_depth": teacher.text_depth + draw.choice([0, 0, 1, 2])}
    if teacher.arch == "swin":
        other["depths"] = tuple(depth + draw.choice([0, 0, 2]) for depth in teacher.depths)
    else:
        other["depth"] = teacher.depth + draw.choice([0, 0, 1, 2])
    other["embed_dim"] = teacher.embed_dim + draw.choice([0, 0, 4, teacher.embed_dim])
    other["context_length"] = teacher.context_length + draw.choice([0, 2])
    other["mlp_ratio"] = draw.choice([4.0, 4.0, 4.75])
    student = grown(teacher, heads + draw.choice([0, 1, heads]), text_heads + draw.choice([0, 1, text_heads]), **other)
    # The operators that can be exact come more often, or nearly all pairs were inexact.
    widths = [*WIDTH_OPERATORS, *["net2net", "lemon", "insert_exact"] * 4]
    towers = [
        TowerGrowth(draw.choice(widths), draw.choice(list(DEPTH_OPERATORS)), draw.random() < 0.75) for _ in range(2)
    ]
    return teacher, student, ExpandConfig(*towers, noise=draw.choice([0.0, 0.1, 0.5]))


def test_a_tower_is_exact_if_and_only_if_the_plan_says_so():
    draw = random.Random(0)
    seen = {("image", True): 0, ("image", False): 0, ("text", True): 0, ("text", False): 0}
    tried = 0
    while tried < 40:
        teacher, student, config = some_pair(draw)
        try:
            found = grow(teacher, student, config)
        except ConfigError:
            continue  # the towers' operators do different things to the joint embedding
        tried += 1
        change = found.differences()
        for tower in ("image", "text"):
            promised = not found.plan.inexact[tower]
            seen[tower, promised] += 1
            about = f"{tower}: {change[tower]:.1e}\n{found.plan.inexact}\n{config}\n{teacher}\n{student}"
            assert change[tower] < EXACT if promised else change[tower] > 1e-7, about
        if not any(found.plan.inexact.values()):
            assert change["pair"] < EXACT
    assert min(seen.values()) >= 6, seen


# --- eps, composition, identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "factor"), [("lemon", 0.8), ("insert_exact", 0.4)])
def test_the_eps_travels_in_the_model_config(width, factor):
    found = exact(BARE, grown(BARE, 5, 5), ExpandConfig.both(width))
    config = json.loads(json.dumps(found.plan.student.open_clip_config()))
    for tower in ("vision_cfg", "text_cfg"):
        assert config[tower]["norm_kwargs"]["eps"] == pytest.approx(1e-3 * factor, rel=1e-12)
    model = open_clip.model.CLIP(**config).double()
    model.load_state_dict(found.expanded)
    images, tokens = samples(BARE)
    with torch.no_grad():
        teacher = build(BARE, found.state)
        torch.testing.assert_close(model.encode_image(images), teacher.encode_image(images), rtol=0, atol=EXACT)
        torch.testing.assert_close(model.encode_text(tokens), teacher.encode_text(tokens), rtol=0, atol=EXACT)


@pytest.mark.parametrize("width", ["net2net", "lemon", "insert_exact"])
def test_exact_operators_stay_exact_one_after_the_other(width):
    sizes = ((4, 4), (8, 12)) if width == "net2net" else ((3, 3), (7, 5))
    first = exact(BARE, grown(BARE, *sizes[0], depth=4), ExpandConfig.both(width, zero_new_outputs=True))
    last = grown(BARE, *sizes[1], depth=5, text_depth=3, embed_dim=8)
    plan = make_plan(first.plan.student, last, ExpandConfig.both(width, "stack", True))
    assert not any(plan.inexact.values())
    twice = Grown(BARE, first.state, plan, plan.student, dict(expand(plan, first.expanded, 4)))
    assert max(twice.differences().values()) < EXACT
    twice.student = replace(twice.student, norm_eps=first.student.norm_eps, text_norm_eps=first.student.text_norm_eps)
    assert width == "net2net" or twice.differences()["text"] > BROKEN


def test_insertion_in_two_steps_is_insertion_in_one():
    for teacher, middle, student in (
        (T, grown(T, 3, 3, depth=4, text_depth=2, embed_dim=7), grown(T, 5, 4, depth=8, text_depth=4, embed_dim=9)),
        (
            SWIN,
            grown(SWIN, 2, 3, depths=(2, 4, 4), context_length=6),
            grown(SWIN, 3, 4, depths=(2, 4, 8), context_length=8, embed_dim=7),
        ),
    ):
        state = numbered(teacher, 1.0)
        direct = expand_state(make_plan(teacher, student), state, Marks())
        first = expand_state(make_plan(teacher, middle), state, Marks())
        steps = expand_state(make_plan(middle, student), first, Marks())
        for name, tensor in direct.items():
            inherited = tensor > 0
            assert inherited.any(), name
            assert torch.equal(steps[name][inherited], tensor[inherited]), name


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
@pytest.mark.parametrize("teacher", [T, SWIN], ids=lambda spec: spec.name)
def test_a_model_to_its_own_size_is_the_same_bytes(teacher, width):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        state = {name: tensor.to(dtype) for name, tensor in random_weights(teacher).items()}
        for depth in DEPTH_OPERATORS:
            plan = make_plan(teacher, teacher, ExpandConfig.both(width, depth, True))
            assert not any(plan.inexact.values())
            same_bytes(state, dict(expand(plan, state, 1)))


def same_bytes(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("width", WIDTH_OPERATORS)
def test_a_plan_that_was_written_down_gives_the_same_bytes(width):
    for teacher, student in ((BARE, grown(BARE, 5, 3, depth=5)), (SWIN, grown(SWIN, 2, 3, depths=(2, 4, 2)))):
        state = {name: tensor.float() for name, tensor in random_weights(teacher).items()}
        plan = make_plan(teacher, student, ExpandConfig.both(width, "stack", noise=0.3))
        again = ExpansionPlan.from_json(json.loads(json.dumps(plan.to_json())))
        same_bytes(dict(expand(plan, state, 7)), dict(expand(again, state, 7)))


@pytest.mark.parametrize(("old", "new"), [((192, 96), (256, 128)), ((384, 96), (512, 256)), ((512, 128), (768, 320))])
def test_the_number_of_threads_changes_no_bit_of_a_complement(old, new):
    """In float64, before rounding hides it; at sizes where sums on two threads come out otherwise than on one."""
    draw = torch.Generator().manual_seed(0)
    block, own = (torch.randn(size, generator=draw, dtype=torch.float64) for size in (old, new))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(complete(block, own, torch.arange(old[0]), torch.arange(old[1])))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert not torch.equal(found[0], own)
