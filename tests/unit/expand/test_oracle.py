"""Where every element of a numbered teacher goes, compared with a slow oracle: by operator, role, head, stage."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import open_clip.model
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor

from compt.errors import ArtefactError, ConfigError
from compt.expand.plan import make_plan
from compt.models.growth import ExpandConfig, TowerGrowth
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.presets import ModelSpec
from tests.helpers.states import expand_state
from tests.unit.expand.oracle import (
    Line,
    Marks,
    closes_branch,
    lines,
    numbered,
    shapes,
    stock,
    student_oracle,
    swin,
    vit,
)

COPIES = ("insert", "duplicate", "insert_packed")
VALUES = tuple(name for name in WIDTH_OPERATORS if name != "netexpand")

A = vit("a", 2, 2, 1, 2)
PAIRS = {
    "part": (A, vit("part", 3, 5, 2, 3, embed_dim=7, context_length=7, vocab_size=13)),
    "twice": (A, vit("twice", 4, 4, 2, 4, embed_dim=12)),
    "more": (vit("two", 2, 2, 2, 1), vit("more", 5, 4, 3, 2, embed_dim=15)),
    "hidden": (A, replace(A, name="hidden", mlp_ratio=5.5)),
    "joint": (A, replace(A, name="joint", embed_dim=8)),
    "deep": (A, replace(A, name="deep", depth=6, text_depth=4)),
    "swin": (swin("a", 1, (2, 2, 4)), swin("b", 2, (2, 4, 8), embed_dim=8, text_heads=2, text_depth=2)),
    "swin part": (swin("a2", 2, (2, 2, 2)), swin("c", 3, (4, 2, 6), embed_dim=7)),
}
NUMBERS = functools.cache(numbered)


def check(
    teacher: ModelSpec,
    student: ModelSpec,
    config: ExpandConfig,
    average: Mapping[str, Tensor] | None = None,
    exact: bool = False,
) -> None:
    """Compare the product with the oracle, every parameter and element."""
    state = NUMBERS(teacher)
    plan = make_plan(teacher, student, config)
    found = expand_state(plan, state, Marks(), average)
    wanted = student_oracle(teacher, student, config, state, average)
    assert list(found) == list(dict.fromkeys(found))
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        got = found[name].double().numpy()
        assert got.shape == values.shape, name
        same = np.array_equal(got, values) if exact else np.allclose(got, values, rtol=1e-9, atol=1e-9)
        assert same, f"{name}: {np.argwhere(~np.isclose(got, values, rtol=1e-9, atol=1e-9))[:5].tolist()}"


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("width", VALUES)
def test_every_width_operator_puts_each_element_where_the_oracle_does(width, pair):
    check(*PAIRS[pair], ExpandConfig.both(width, noise=0), exact=width in COPIES)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("depth", DEPTH_OPERATORS)
@pytest.mark.parametrize("pair", ["part", "deep", "swin", "swin part"])
def test_every_depth_operator_takes_the_layers_of_the_oracle(pair, depth, zero):
    teacher, student = PAIRS[pair]
    average = numbered(teacher, 0.5) if depth == "netexpand" else None
    check(teacher, student, ExpandConfig.both("insert", depth, zero, noise=0), average, exact=True)


@pytest.mark.parametrize("width", ["net2net", "lemon", "insert_exact", "interpolate"])
def test_width_and_depth_together(width):
    for pair, depth in (("part", "stack"), ("swin", "netexpand"), ("twice", "interval"), ("part", "constant")):
        teacher, student = PAIRS[pair]
        average = numbered(teacher, 0.5) if depth == "netexpand" else None
        check(teacher, student, ExpandConfig.both(width, depth, True, noise=0), average)


def test_each_tower_has_operators_of_its_own():
    image, text = TowerGrowth("lemon", "stack", True), TowerGrowth("insert_exact", "constant")
    check(*PAIRS["part"], ExpandConfig(image, text, noise=0))
    check(*PAIRS["swin"], ExpandConfig(TowerGrowth("insert_packed", "interval"), TowerGrowth("insert"), noise=0))
    same = replace(PAIRS["part"][1], embed_dim=A.embed_dim)
    check(A, same, ExpandConfig(TowerGrowth("duplicate"), TowerGrowth("interpolate", "stack"), noise=0))


@pytest.mark.parametrize("width", ["insert", "net2net", "lemon", "insert_exact"])
def test_between_architectures_the_text_tower_is_carried_over(width):
    image = swin("cross", 2, (2, 2, 2), embed_dim=9, text_heads=2, text_depth=3)
    text = vit("cross vit", 6, 6, 2, 3, embed_dim=7)
    check(A, image, ExpandConfig.both(width, noise=0))
    check(swin("a", 1, (2, 2, 4)), text, ExpandConfig.both(width, noise=0))


@pytest.mark.parametrize("width", ["insert", "lemon", "interpolate"])
def test_grids_are_resized_before_widths_grow(width):
    finer = replace(PAIRS["part"][1], name="finer", image_size=20)
    check(A, finer, ExpandConfig.both(width, noise=0))
    teacher = swin("a", 1, (2, 2, 4))
    check(teacher, swin("wide", 2, (2, 2, 4), window=4, image_size=64), ExpandConfig.both(width, noise=0))


def test_position_embeddings_are_those_of_open_clip():
    finer = replace(A, name="finer", image_size=28)
    state = numbered(A)
    found = expand_state(make_plan(A, finer), state, Marks())
    theirs = {name: tensor.clone() for name, tensor in state.items()}
    open_clip.model.resize_pos_embed(theirs, stock(finer))
    torch.testing.assert_close(
        found["visual.positional_embedding"], theirs["visual.positional_embedding"], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
@pytest.mark.parametrize("patch", [2, 3, 5, 8])
def test_patches_of_another_size_see_a_resized_image_as_before(patch, make):
    if make is vit:
        teacher, name = A, "visual.conv1.weight"
        student = replace(A, name="patches", patch_size=patch, image_size=2 * patch)
    else:
        teacher, name = swin("a", 1, (2, 2)), "visual.trunk.patch_embed.proj.weight"
        student = swin("patches", 1, (2, 2), patch_size=patch, image_size=8 * patch)
    draw = torch.Generator().manual_seed(2)
    old = torch.randn(shapes(teacher)[name], generator=draw, dtype=torch.float64)
    state = {**NUMBERS(teacher), name: old}
    kept = expand_state(make_plan(teacher, student), state, Marks())
    assert all(torch.equal(kept[other], tensor) for other, tensor in state.items() if other != name)
    theirs = resample_patch_embed(old.float(), [patch, patch], interpolation="bicubic", antialias=True)
    torch.testing.assert_close(kept[name].float(), theirs, rtol=1e-3, atol=1e-4)
    picture = torch.randn(6, 3, 4, 4, generator=draw, dtype=torch.float64)
    larger = F.interpolate(picture, size=(patch, patch), mode="bicubic", antialias=True, align_corners=False)
    before, after = F.conv2d(picture, old).flatten(), F.conv2d(larger, kept[name]).flatten()
    assert (float((before - after).abs().max()) < 1e-9) == (patch >= 4)
    wider = replace(PAIRS["part"][1], patch_size=patch, image_size=2 * patch)
    if make is vit:  # widths grow as if the teacher had these patches
        grown = expand_state(make_plan(A, wider, ExpandConfig.both("interpolate")), state, Marks())
        same = replace(A, patch_size=patch, image_size=2 * patch)
        again = expand_state(make_plan(same, wider, ExpandConfig.both("interpolate")), kept, Marks())
        torch.testing.assert_close(grown[name], again[name], rtol=0, atol=1e-10)


def test_longer_texts_and_larger_vocabularies_keep_the_first_rows():
    student = replace(A, name="longer", context_length=9, vocab_size=17)
    state = numbered(A)
    for width in WIDTH_OPERATORS:
        found = expand_state(make_plan(A, student, ExpandConfig.both(width)), state, Marks())
        for name, size in (("positional_embedding", 5), ("token_embedding.weight", 11)):
            assert torch.equal(found[name][:size], state[name]), (width, name)
            assert torch.equal(found[name], torch.cat([state[name], Marks().own(name, found[name].shape)[size:]]))
        assert all(torch.equal(found[name], state[name]) for name in state if "embedding" not in name)


def test_the_operators_differ_where_they_are_compared():
    """The comparisons above would miss an error if two operators agreed there."""
    teacher, student = PAIRS["part"]
    found = {
        width: student_oracle(teacher, student, ExpandConfig.both(width, noise=0), NUMBERS(teacher)) for width in VALUES
    }
    different = {
        "attn.in_proj_weight": [("insert", "insert_packed"), ("net2net", "lemon"), ("lemon", "insert_exact")],
        "attn.out_proj.weight": [("insert", "insert_exact"), ("net2net", "lemon"), ("net2net", "insert_exact")],
        "mlp.c_fc.weight": [("net2net", "lemon"), ("lemon", "insert_exact")],
        "mlp.c_proj.weight": [("insert", "insert_exact"), ("net2net", "lemon")],
        "ln_1.weight": [("insert", "insert_exact"), ("net2net", "lemon")],
        "ln_2.bias": [("insert", "insert_exact"), ("net2net", "lemon")],
    }
    everywhere = list(itertools.combinations(("insert", "duplicate", "interpolate"), 2))
    for leaf, pairs in different.items():
        name = f"visual.transformer.resblocks.0.{leaf}"
        for one, other in [*pairs, *everywhere, *([("duplicate", "net2net")] if leaf.endswith("proj.weight") else [])]:
            assert not np.array_equal(found[one][name], found[other][name]), (name, one, other)


# --- copies and noise ----------------------------------------------------------------------------------------------


def copies_of(line: Line, old: Line) -> list[list[int]]:
    """The student positions that are copies of one another, for each teacher position."""
    found = []
    for block, unit, channel in itertools.product(range(old.blocks), range(old.units), range(old.channels)):
        units = range(unit, line.units, old.units)
        found.append([(block * line.units + at) * line.channels + channel for at in units])
    return found


@pytest.mark.parametrize("width", ["duplicate", "net2net"])
@pytest.mark.parametrize("pair", ["part", "twice", "more", "swin"])
def test_noise_moves_what_reads_copies_and_cancels_over_them(width, pair):
    teacher, student = PAIRS[pair]
    ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes(teacher).items()}
    plan = make_plan(teacher, student, ExpandConfig.both(width, noise=0.25))
    found = expand_state(plan, ones, Marks())
    for name in found:
        old, new = lines(teacher, "logit_scale" if name == "logit_scale" else plan_source(name)), lines(student, name)
        reads = [dim for dim, line in enumerate(new) if line.use == "read" and line.units != old[dim].units]
        if any(line.kind in ("prefix", "emb") for line in new):
            continue
        if not reads:
            assert (found[name] == 1).all(), name
            continue
        weight = found[name].movedim(reads[0], 0)
        for group in copies_of(new[reads[0]], old[reads[0]]):
            part = weight[group] * (len(group) if width == "net2net" else 1)
            torch.testing.assert_close(part.mean(0), torch.ones_like(part[0]), rtol=1e-12, atol=1e-12)
            if len(group) == 1:
                assert (part == 1).all()
                continue
            assert (part - 1).abs().max() <= 2 * 0.25
            # A factor that a whole copy shares would be lost on an optimizer that normalises the gradients.
            assert (part.flatten(1).std(dim=1) > 0.02).all(), name


def plan_source(name: str) -> str:
    """A parameter of the first layer of the same stack, which every teacher has."""
    return re.sub(r"(?<=blocks\.)\d+", "0", name)


@pytest.mark.parametrize("width", ["net2net", "lemon", "insert_exact"])
def test_the_joint_embedding_is_scaled_alike_in_both_towers_and_keeps_its_length(width):
    teacher, student = A, replace(A, name="joint", embed_dim=16)  # 6 -> 16: copies three and two times
    ones = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes(teacher).items()}
    for noise in (0.0, 0.5):
        found = expand_state(make_plan(teacher, student, ExpandConfig.both(width, noise=noise)), ones, Marks())
        scale = found["visual.proj"][0]
        assert torch.equal(scale.expand(8, 16), found["visual.proj"])
        assert torch.equal(scale.expand(4, 16), found["text_projection"])
        for unit in range(6):
            copies = scale[unit::6]
            torch.testing.assert_close(copies.square().sum(), torch.ones((), dtype=torch.float64), rtol=1e-12, atol=0)
            assert (copies.std() > 1e-3) == (noise > 0)


def test_no_noise_is_drawn_where_nothing_is_copied():
    for width in ("insert", "interpolate", "insert_packed", "netexpand"):
        teacher, student = PAIRS["part"]
        state = NUMBERS(teacher)
        loud, quiet = (
            expand_state(make_plan(teacher, student, ExpandConfig.both(width, noise=noise)), state, Marks())
            for noise in (0.5, 0.0)
        )
        assert all(torch.equal(loud[name], quiet[name]) for name in loud), width


# --- netexpand -----------------------------------------------------------------------------------------------------


def blocks_of(old: list[Line], new: list[Line]) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """The matrices that a parameter consists of (q, k, v apart): student's rows and columns, and where old ones are."""
    found = []
    roles = new[0].blocks if new[0].kind == "hidden" else 1
    for role in range(roles):
        per_role = [replace(line, blocks=line.blocks // roles) if not dim else line for dim, line in enumerate(new)]
        places: list[list[int]] = []
        for dim, (line, before) in enumerate(zip(per_role, old, strict=True)):
            grid = np.arange(line.size).reshape(line.blocks, line.units, line.channels) + (
                role * line.size if not dim else 0
            )
            places += [grid.ravel().tolist(), grid[:, : before.units].ravel().tolist()]
        found.append((places[0], places[1], places[2], places[3]))
    return found


def check_orthonormal(matrix: Tensor, rows: list[int], old_rows: list[int], old_columns: list[int]) -> int:
    """The properties of one matrix; [student rows, student columns]. Returns how many rows are made of a complement."""
    columns = range(matrix.shape[1])
    new_columns = sorted(set(columns) - set(old_columns))
    new_rows = sorted(set(rows) - set(old_rows))
    block = matrix[old_rows][:, old_columns]
    assert not matrix[old_rows][:, new_columns].any()
    room = len(columns) - int(torch.linalg.matrix_rank(block))
    rms = torch.linalg.svdvals(block).square().mean().sqrt()
    if not room:
        return 0
    for first in range(0, len(new_rows), room):
        part = matrix[new_rows[first : first + room]]
        torch.testing.assert_close(part @ part.T, rms**2 * torch.eye(len(part), dtype=part.dtype), rtol=0, atol=1e-9)
        assert (part @ matrix[old_rows].T).abs().max() < 1e-9
    return len(new_rows)


@pytest.mark.parametrize("pair", ["part", "twice", "hidden", "joint", "swin"])
def test_netexpand_adds_an_orthonormal_complement_of_the_copied_blocks_scale(pair):
    teacher, student = PAIRS[pair]
    draw = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes(teacher).items()}
    found = expand_state(make_plan(teacher, student, ExpandConfig.both("netexpand", "constant")), state, Marks())
    inserted = student_oracle(teacher, student, ExpandConfig.both("insert", "constant"), state)
    orthonormal = 0
    for name, tensor in found.items():
        kept = torch.from_numpy(inserted[name])
        if name not in state or tensor.ndim < 2 or name.endswith(("embedding", "embedding.weight", "bias_table")):
            torch.testing.assert_close(tensor.double(), kept, rtol=0, atol=0, msg=name)
            continue
        old, new = lines(teacher, name), lines(student, name)
        if tensor.ndim == 4:
            pixels = Line("fixed", "read", tensor[0].numel())
            tensor, kept, old, new = tensor.flatten(1), kept.flatten(1), [old[0], pixels], [new[0], pixels]
        for rows, old_rows, columns, old_columns in blocks_of(old, new):
            assert torch.equal(tensor[old_rows][:, old_columns], kept[old_rows][:, old_columns]), name
            matrix = torch.zeros_like(tensor)
            matrix[rows] = tensor[rows]
            made = 0
            if len(rows) > len(old_rows):
                made = check_orthonormal(matrix, rows, old_rows, old_columns)
            elif len(columns) > len(old_columns):
                made = check_orthonormal(matrix[rows].T, columns, old_columns, [rows.index(row) for row in old_rows])
            if not made:
                assert torch.equal(tensor[rows], kept[rows]), name
            orthonormal += made
    assert orthonormal > 8 or pair in ("hidden", "joint")  # where a matrix of full rank leaves no room


# --- the authors' initialization -----------------------------------------------------------------------------------


def authors(teacher: ModelSpec, student: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `weight_initialization` of the authors' code leaves: teacher's blocks over the student's own values."""
    target = {name: Marks().own(name, shape).double() for name, shape in shapes(student).items()}
    doubles = teacher.arch == student.arch == "vit" and student.depth == 2 * teacher.depth
    for key, value in state.items():
        names = [key]
        if doubles and key.startswith("visual.transformer.resblocks."):
            parts = key.split(".")
            names = [".".join([*parts[:3], str(2 * int(parts[3]) + more), *parts[4:]]) for more in (0, 1)]
        for name in names:
            size = value.shape
            if value.ndim == 0:
                target[name] = value
            elif value.ndim in (1, 4):
                target[name][: size[0]] = value
            elif value.ndim == 2:
                target[name][: size[0], : size[1]] = value
    return target


@pytest.mark.parametrize("pair", ["part", "twice", "deep", "swin", "swin part"])
def test_reference_compatible_packed_insertion_is_the_authors_element_by_element(pair):
    teacher, student = PAIRS[pair]
    config = ExpandConfig.both("insert_packed", reference_compatible=True)
    state = NUMBERS(teacher)
    found = expand_state(make_plan(teacher, student, config), state, Marks())
    wanted = authors(teacher, student, state)
    assert set(found) == set(wanted)
    wrong = [name for name in wanted if not torch.equal(found[name].double(), wanted[name])]
    assert wrong == []
    plain = expand_state(make_plan(teacher, student, ExpandConfig.both("insert")), state, Marks())
    assert any(not torch.equal(plain[name].double(), wanted[name]) for name in wanted)


def test_reference_compatible_takes_stages_of_odd_growth_layer_by_layer():
    teacher, student = swin("a", 1, (2, 2, 4)), swin("odd", 2, (2, 3, 5), embed_dim=8)
    with pytest.raises(ConfigError, match=r"depths\[1\]"):
        make_plan(teacher, student)
    check(teacher, student, ExpandConfig.both("insert_packed", reference_compatible=True), exact=True)


@pytest.mark.parametrize("change", [{"image_size": 16}, {"image_size": 16, "patch_size": 8}])
def test_reference_compatible_refuses_what_the_authors_code_cannot(change):
    student = replace(PAIRS["twice"][1], name="other", **change)
    with pytest.raises(ConfigError):
        make_plan(A, student, ExpandConfig.both("insert_packed", reference_compatible=True))


def test_an_average_that_is_not_there_is_missed():
    teacher, student = PAIRS["deep"]
    plan = make_plan(teacher, student, ExpandConfig.both(depth="netexpand"))
    assert plan.needs_average
    with pytest.raises(ArtefactError, match="ema|average"):
        dict(expand_state(plan, NUMBERS(A), Marks()))
    same = make_plan(teacher, replace(teacher, name="same"), ExpandConfig.both(depth="netexpand"))
    assert not same.needs_average


def test_zeroed_outputs_are_those_of_added_layers_alone():
    teacher, student = PAIRS["deep"]
    plan = make_plan(teacher, student, ExpandConfig.both(depth="stack", zero_new_outputs=True))
    found = expand_state(plan, NUMBERS(A), Marks())
    zeros = {name for name, tensor in found.items() if tensor.numel() > 1 and not tensor.any()}
    added = ("visual.transformer.resblocks.2.", "visual.transformer.resblocks.5.", "transformer.resblocks.3.")
    kept = ("visual.transformer.resblocks.0.", "visual.transformer.resblocks.1.", "transformer.resblocks.0.")
    assert any(name.startswith(added) for name in zeros)
    assert not any(name.startswith(kept) for name in zeros)
    assert all(closes_branch(name) for name in zeros)
    assert len(zeros) == 4 * (4 + 2)
