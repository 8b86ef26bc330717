"""How the links of a plan grow: operators by link and tower, eps of norms, promises, models from outside."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compt.cli.plan.tables import plan_table
from compt.cost.speed import Measurement
from compt.cost.training import exact_breakdown
from compt.errors import ConfigError
from compt.models.growth import ExpandConfig, TowerGrowth
from compt.models.presets import NORM_EPS, PRESETS, resolve
from compt.plan.forecast import make_forecast
from compt.plan.jobs import Job, make_plan
from compt.plan.links import UNREAD, Start, broken_promises, check_start, check_vocabulary, is_described, planned_start
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[3]

PLAIN = {"train": {"epochs": 2}, "warmup": {"steps": 5}}


def recipe(*members: Any, links: dict[int, Any] | None = None, **sections: Any) -> Recipe:
    """A chain of these members in order; `links` has further keys of a link, `chain` and others of whole sections."""
    names = [member if isinstance(member, str) else member["name"] for member in members]
    chain = [{"model": name, **PLAIN, **(links or {}).get(at, {})} for at, name in enumerate(names)]
    values = {
        "name": "growing",
        "data": {"train": "shards/*.tar", "images": 2000, "captions": 2},
        "family": {"members": list(members), **sections.pop("family", {})},
        "chain": {"links": chain, **sections.pop("chain", {})},
        "baselines": {**PLAIN, "controls": ["equal_epochs", "equal_macs"]},
        "optimizer": {"batch": 64, **sections.pop("optimizer", {})},
        **sections,
    }
    return parse_recipe(copy.deepcopy(values))


def jobs(found: Recipe, **options: Any) -> dict[str, Job]:
    return {job.name: job for job in make_plan(found, baselines=True, **options).jobs}


def refused(found: Recipe, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(found, source="mine.yaml", **options)
    return str(caught.value)


SMALL = ("vit_nano", "vit_micro", "vit_midi")


def test_each_link_has_its_own_operators() -> None:
    links = {1: {"expand": {"text": {"width": "lemon"}}}, 2: {"expand": {"depth": "stack", "noise": 0.2}}}
    found = jobs(recipe(*SMALL, links=links, chain={"expand": {"width": "duplicate"}}))
    assert found["1-vit_nano"].expand is None
    assert found["2-vit_micro"].expand == ExpandConfig(TowerGrowth("duplicate"), TowerGrowth("lemon"))
    assert found["3-vit_midi"].expand == ExpandConfig.both("duplicate", "stack", noise=0.2)
    assert found["baseline-vit_midi-s0"].expand is found["control-equal_macs"].expand is None
    values = json.loads(json.dumps(found["2-vit_micro"].to_json()))
    assert ExpandConfig.from_dict(values["expand"]) == found["2-vit_micro"].expand
    assert found["baseline-vit_midi-s0"].to_json()["expand"] is None


def test_a_link_s_expansion_changes_it_and_what_grows_from_it_alone() -> None:
    before = jobs(recipe(*SMALL))
    for links in ({1: {"expand": {"image": {"depth": "stack"}}}}, {1: {"expand": {"zero_new_outputs": True}}}):
        after = jobs(recipe(*SMALL, links=links))
        assert [name for name in before if before[name].hash != after[name].hash] == ["2-vit_micro", "3-vit_midi"]
    same = jobs(recipe(*SMALL, links={1: {"expand": {}}, 2: {"expand": {"width": "insert"}}}))
    assert [job.hash for job in same.values()] == [job.hash for job in before.values()]


def test_noise_is_a_result_where_there_are_copies() -> None:
    def hashes(noise: float, **expand: Any) -> list[str]:
        return [job.hash for job in jobs(recipe(*SMALL, chain={"expand": {"noise": noise, **expand}})).values()]

    assert hashes(0.1) == hashes(0.3)
    for copying in ({"width": "duplicate"}, {"text": {"width": "net2net"}}, {"image": {"width": "lemon"}}):
        assert hashes(0.1, **copying) != hashes(0.3, **copying)


def test_norms_of_each_link_have_their_teacher_s_eps_times_the_operators_factor() -> None:
    members = [
        {"name": name, "preset": "vit_nano", "width": image, "text_width": text}
        for name, image, text in (("a", 64, 64), ("b", 96, 64), ("c", 160, 96), ("d", 160, 128))
    ]
    lemon, exact = {"expand": {"width": "lemon"}}, {"expand": {"text": {"width": "insert_exact"}}}
    found = jobs(recipe(*members, links={1: lemon, 2: exact}, chain={"expand": {"width": "lemon"}}))
    eps = [(job.spec.norm_eps / NORM_EPS, job.spec.text_norm_eps / NORM_EPS) for job in found.values()][:4]
    image = [1, 64 / 96, 64 / 96 * 96 / 160, 64 / 96 * 96 / 160]
    text = [1, 1, 64 / 96, 64 / 96 * 96 / 128]
    assert [pair[0] for pair in eps] == pytest.approx(image)
    assert [pair[1] for pair in eps] == pytest.approx(text)
    links = [job for job in found.values() if job.kind == "link"]
    assert [job.teacher_spec for job in links[1:]] == [job.spec for job in links[:-1]]
    others = [job for job in found.values() if job.kind != "link"]
    assert len(others) == 6
    assert {(job.spec.norm_eps, job.spec.text_norm_eps) for job in others} == {(NORM_EPS, NORM_EPS)}
    # Links and baselines of one model are recognised by it.
    assert found["4-d"].result["model"] == found["baseline-d-s0"].result["model"]


def test_a_speed_is_that_of_a_model_whatever_its_eps() -> None:
    lemon = jobs(recipe("vit_nano", "vit_micro", chain={"expand": {"width": "lemon"}}))
    link, baseline = (
        Measurement(student=lemon[name].spec, captions=2, tokens=9.0)
        for name in ("2-vit_micro", "baseline-vit_micro-s0")
    )
    assert link.student != baseline.student
    assert link.same_models(baseline)


def test_netexpand_needs_a_moving_average_where_layers_are_added() -> None:
    deeper, wider = {"name": "deeper", "preset": "vit_nano", "text_depth": 3}, {"name": "wider", "preset": "vit_micro"}
    where = "the layers that 'deeper' adds to its text tower from the moving average of the weights that it grows from"
    for chain, links, key in (
        ({"expand": {"depth": "netexpand"}}, {}, "chain.expand"),
        ({}, {1: {"expand": {"text": {"depth": "netexpand"}}}}, "chain.links.1.expand"),
    ):
        message = refused(recipe("vit_nano", deeper, chain=chain, links=links))
        assert message == f"mine.yaml: {key}: depth netexpand fills {where}; set optimizer.ema"
        averaged = recipe("vit_nano", deeper, chain=chain, links=links, optimizer={"ema": {"decay": 0.9}})
        assert jobs(averaged)["2-deeper"].expand
        jobs(recipe("vit_nano", wider, chain=chain, links=links))
    jobs(recipe("vit_nano", deeper, chain={"expand": {"depth": "netexpand", "reference_compatible": True}}))
    jobs(recipe("vit_nano", deeper, chain={"expand": {"depth": "netexpand", "text": {"depth": "stack"}}}))
    swin = {"name": "deeper", "preset": "swin_t", "depths": [2, 2, 8, 2]}
    assert "adds to its image tower" in refused(recipe("swin_t", swin, chain={"expand": {"depth": "netexpand"}}))
    outside = recipe(deeper, chain={"from": "somewhere", "expand": {"depth": "netexpand"}})
    nano = PRESETS["vit_nano"]
    assert refused(outside, start=Start(nano, "1")).endswith("there is none at chain.from = 'somewhere'")
    for averages in (True, None):
        make_plan(outside, start=Start(nano, "1", averaged=averages))


@pytest.mark.parametrize(
    ("members", "expand", "message"),
    [
        (
            ["swin_t", {"name": "odd", "preset": "swin_t", "depths": [2, 2, 9, 2]}],
            {},
            "chain.links.1.model = 'odd': its depths[2] grows from 6 to 9; blocks with",
        ),
        (
            ["vit_nano", {"name": "joint", "preset": "vit_micro", "embed_dim": 256}],
            {"text": {"width": "lemon"}},
            "chain.links.1.model = 'joint': its embed_dim grows from 128 to 256, which both towers share, but",
        ),
        (
            ["vit_nano", {"name": "sharp", "preset": "vit_micro", "image_size": 64}],
            {"reference_compatible": True},
            "chain.links.1.model = 'sharp': its image_size is 64",
        ),
    ],
)
def test_operators_that_cannot_expand_a_pair(members: list[Any], expand: dict[str, Any], message: str) -> None:
    assert refused(recipe(*members, links={1: {"expand": expand}})).startswith(f"mine.yaml: {message}")


def test_a_chain_whose_images_patches_context_and_words_grow() -> None:
    sharp = {"name": "sharp", "preset": "vit_micro", "image_size": 64, "context_length": 48, "vocab_size": 49_500}
    fine = {"name": "fine", "preset": "vit_mini", "image_size": 48, "patch_size": 4, "context_length": 48}
    fine["vocab_size"] = 49_500
    found = jobs(recipe("vit_nano", sharp, fine))
    links = [job for job in found.values() if job.kind == "link"]
    assert [(job.spec.image_size, job.spec.context_length) for job in links] == [(32, 32), (64, 48), (48, 48)]
    for teacher, job in itertools.pairwise(links):
        assert job.cost == exact_breakdown(job.spec, teacher.spec, batch=64, captions=2).of_steps(62)
        # The teacher computes images and captions of its own size.
        own = exact_breakdown(teacher.spec, None, batch=64, captions=2).of_steps(62).student_forward_macs
        assert job.cost.teacher_forward_macs == pytest.approx(own)


# --- what a plan shows


def notes(found: Recipe) -> list[str]:
    return [note for note in plan_table(make_forecast(found, None)).notes if note.startswith(("Expansion", "Inexact"))]


def test_a_plan_says_how_links_grow_where_that_is_not_the_default() -> None:
    assert notes(recipe(*SMALL, chain={"expand": {"noise": 0.4}})) == []
    assert notes(recipe(*SMALL, chain={"expand": {"zero_new_outputs": True}})) == [
        "Expansion of 2-vit_micro, 3-vit_midi: width insert, depth duplicate, outputs of new layers zero."
    ]
    assert notes(recipe(*SMALL, links={2: {"expand": {"text": {"width": "duplicate"}}}})) == [
        (
            "Expansion of 3-vit_midi: image tower: width insert, depth duplicate; text tower: width duplicate, depth "
            "duplicate; noise 0.1."
        )
    ]


def test_a_plan_says_where_an_exact_operator_is_not() -> None:
    mini = {"name": "twice", "preset": "vit_nano", "width": 128, "text_width": 128}
    exact = recipe("vit_nano", mini, chain={"expand": {"width": "net2net"}})
    assert len(notes(exact)) == 1
    found = notes(recipe("vit_nano", "vit_micro", chain={"expand": {"width": "lemon"}}))
    assert found[1:] == [
        (
            "Inexact: in 2-vit_micro, lemon changes what the image tower computes. visual.ln_pre.weight: its output is "
            "the residual stream, whose mean is not zero."
        )
    ]
    pair = PRESETS["vit_nano"], PRESETS["vit_micro"]
    assert list(broken_promises(*pair, ExpandConfig.both("net2net"))) == ["image", "text"]
    assert broken_promises(*pair, ExpandConfig.both("insert")) == {}
    values = make_forecast(recipe("vit_nano", "vit_micro", chain={"expand": {"width": "lemon"}}), None).to_json()
    assert [job["inexact"] and list(job["inexact"]) for job in values["jobs"]] == [None, ["image"], None, None]


# --- models from outside


def test_sizes_that_have_to_agree_with_a_model_from_outside() -> None:
    start = resolve("vit_s16", {"quick_gelu": True, "no_ln_pre": True, "name": "theirs"})
    message = refused(recipe("vit_b16", chain={"from": "theirs"}), start=Start(start, "1"))
    assert message == (
        "mine.yaml: chain.links.0.model = 'vit_b16': its quick_gelu is false, no_ln_pre is false, but "
        "'theirs' at chain.from differs; to make all members agree, write "
        "family.common: {quick_gelu: true, no_ln_pre: true}"
    )
    written = recipe("vit_b16", chain={"from": "x"}, family={"common": {"quick_gelu": True, "no_ln_pre": True}})
    assert make_plan(written, start=Start(start, "1")).links[0].spec.quick_gelu
    with pytest.raises(ConfigError, match=r"write family\.common: \{head_width: 32, text_head_width: 32\}"):
        check_start(PRESETS["vit_nano"], PRESETS["vit_s16"])
    with pytest.raises(ConfigError, match=r"'few' at chain\.from has a vocabulary of 64 tokens, but CLIP's .* 49408"):
        check_vocabulary(resolve("vit_s16", {"vocab_size": 64, "name": "few"}))
    # Between two architectures the image towers need not agree.
    check_start(resolve("vit_s16", {"no_ln_pre": True}), PRESETS["swin_b"])


def test_a_model_that_compt_did_not_write(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.pt"
    theirs.write_bytes(b"")
    chain = recipe("vit_nano", chain={"from": str(theirs), "from_model": "vit_pico"}).chain
    assert is_described(chain, Path())
    assert planned_start(chain, Path()) == Start(PRESETS["vit_pico"], UNREAD, averaged=None)
    link = make_plan(recipe("vit_nano", chain=chain.model_dump(by_alias=True, include={"from_", "from_model"}))).links[
        0
    ]
    assert (link.start, link.teacher_spec, link.alpha) == (theirs, PRESETS["vit_pico"], 500.0)
    message = refused(recipe("vit_nano", chain={"from": str(tmp_path)}))
    assert message.endswith("for a model that compt did not write, name it in chain.from_model")
    message = refused(recipe("vit_nano", chain={"from": "a", "from_model": "vit_pixo"}))
    assert "chain.from_model = 'vit_pixo': is not a preset (did you mean 'vit_pico'?)" in message


def test_a_prefix_belongs_to_the_result_and_a_model_s_name_does_not() -> None:
    start = Start(PRESETS["vit_pico"], "1")
    plain, named, prefixed = (
        make_plan(recipe("vit_nano", chain={"from": "a", **more}), start=start).links[0].hash
        for more in ({}, {"from_model": "vit_pico"}, {"from_prefix": "module."})
    )
    assert plain == named != prefixed


def plan_without_torch(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`compt plan` where torch cannot be loaded."""
    code = "import sys; sys.modules['torch'] = None; from compt.cli.main import main; main()"
    command = [sys.executable, "-c", code, "plan", str(path), "--json", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_planning_from_a_model_that_compt_did_not_write_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "theirs.pt").write_bytes(b"")
    found = recipe("vit_nano", chain={"from": str(tmp_path / "theirs.pt")})
    path = tmp_path / "growing.yaml"
    path.write_text(json.dumps(found.model_dump(mode="json", by_alias=True, exclude_none=True)))
    planned = plan_without_torch(path, "--set", "chain.from_model=vit_pico")
    assert planned.returncode == 0, planned.stderr
    job = json.loads(planned.stdout)["jobs"][0]
    assert job["start"] == str(tmp_path / "theirs.pt")
