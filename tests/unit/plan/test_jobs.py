"""Jobs of a recipe: order, steps, cost, hashes, and the chains that are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from compt.cost.counts import parameters
from compt.cost.training import exact_breakdown
from compt.errors import ConfigError
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, PRESETS, ModelSpec, resolve
from compt.plan.jobs import Job, Plan, make_plan, recipe_cost
from compt.plan.links import MODEL_FORMAT, Start, check_growth
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Member, Recipe
from compt.recipe.types import Duration, is_execution

BASE: dict[str, Any] = {
    "name": "small",
    "seed": 0,
    "data": {"train": "shards/*.tar", "images": 2000, "captions": 2},
    "family": {"members": ["vit_nano", {"name": "wide", "preset": "vit_micro", "width": 128}, "vit_midi"]},
    "chain": {
        "links": [
            {"model": "vit_nano", "train": {"epochs": 8}, "warmup": {"steps": 10}},
            {"model": "wide", "train": {"epochs": 2}, "warmup": {"steps": 5}},
        ],
        "expand": {},
        "distill": {},
    },
    "baselines": {"train": {"epochs": 8}, "warmup": {"steps": 10}, "seeds": [0], "controls": ["equal_epochs"]},
    "optimizer": {"batch": 64, "ema": {"decay": 0.9}},
    "engine": {},
    "evaluation": {"sets": [{"name": "a", "data": "a.tar"}, {"name": "b", "data": "b.tar"}]},
}


def changed(path: str, value: Any, base: dict[str, Any] = BASE) -> Recipe:
    values = copy.deepcopy(base)
    place: Any = values
    *parents, last = path.split(".")
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[int(last) if isinstance(place, list) else last] = value
    return parse_recipe(values)


def plan(recipe: Recipe | None = None, **options: Any) -> Plan:
    return make_plan(recipe or parse_recipe(BASE), **({"baselines": True} | options))


def hashes(recipe: Recipe, **options: Any) -> list[str]:
    return [job.hash for job in plan(recipe, **options).jobs]


def test_the_jobs_of_a_recipe() -> None:
    jobs = plan(controls=["equal_epochs", "equal_macs", "equal_chain_macs"]).jobs
    assert [job.name for job in jobs] == [
        "1-vit_nano",
        "2-wide",
        "baseline-vit_nano-s0",
        "baseline-wide-s0",
        "control-equal_epochs",
        "control-equal_macs",
        "control-equal_chain_macs",
    ]
    first, second, same, baseline, epochs, macs, chain = jobs
    assert (first.steps, first.warmup_steps, first.samples, first.epochs) == (248, 10, 248 * 64, 8.0)
    assert (first.teacher, first.alpha, first.teacher_spec) == (None, 0.0, None)
    assert (second.teacher, second.alpha, second.steps) == ("1-vit_nano", 500.0, 62)
    assert second.teacher_spec == first.spec
    assert same.same_as == "1-vit_nano"
    assert [job.same_as for job in (first, second, baseline, epochs, macs)] == [None] * 5
    assert (baseline.kind, baseline.steps, baseline.teacher) == ("baseline", 248, None)
    assert (epochs.kind, epochs.steps, epochs.warmup_steps, epochs.spec) == ("control", 62, 10, second.spec)
    assert macs.steps > epochs.steps
    one_step = macs.cost.total_macs / macs.steps
    assert abs(macs.cost.total_macs - second.cost.total_macs) <= one_step / 2
    spent = first.cost.total_macs + second.cost.total_macs
    assert abs(chain.cost.total_macs - spent) <= one_step / 2


def test_no_link_draws_what_its_predecessor_saw() -> None:
    jobs = plan(changed("seed", 2)).jobs
    assert [job.order_seed for job in jobs[:2]] == [2000, 2001]
    assert {job.order_seed for job in jobs[2:]} == {0, 2000}


def test_what_is_planned_can_be_chosen() -> None:
    assert [job.kind for job in make_plan(parse_recipe(BASE)).jobs] == ["link", "link", "control"]
    assert [job.kind for job in make_plan(parse_recipe(BASE), controls=()).jobs] == ["link", "link"]
    several = plan(changed("baselines.seeds", [0, 3]), controls=())
    assert [job.name for job in several.jobs[2:]] == [
        "baseline-vit_nano-s0",
        "baseline-vit_nano-s3",
        "baseline-wide-s0",
        "baseline-wide-s3",
    ]
    assert [job.same_as for job in several.jobs[2:4]] == ["1-vit_nano", None]
    assert plan(images=6400).job("1-vit_nano").steps == 800


def test_a_first_pair_test_makes_no_link_longer_than_its_baseline() -> None:
    """Its factor holds for a length and its warm-up; a recipe that is longer by itself stays as it is."""
    last = {"model": "vit_midi", "train": {"epochs": 4}, "warmup": {"steps": 20}}
    recipe = changed("chain.links", [*BASE["chain"]["links"], last])

    def lengths(recipe: Recipe, scale: float) -> list[tuple[int, int]]:
        return [(job.steps, job.warmup_steps) for job in plan(recipe, scales=[scale]).links]

    assert lengths(recipe, 1.5) == [(248, 10), (93, 8), (186, 30)]
    assert lengths(recipe, 3.0) == [(248, 10), (186, 15), (248, 40)]
    longer = changed("chain.links", [*BASE["chain"]["links"], {**last, "train": {"epochs": 10}}])
    assert lengths(longer, 3.0)[-1] == (310, 20)
    assert lengths(longer, 0.5)[-1] == (155, 10)
    assert lengths(longer, 1.0)[-1] == (310, 20)


def test_a_recipe_without_baselines() -> None:
    recipe = changed("baselines", None)
    only = make_plan(recipe)
    assert [job.kind for job in only.jobs] == ["link", "link"]
    assert only.acceleration() is None
    assert only.rows()[1]["speedup"] is None
    with pytest.raises(ConfigError, match="baselines: is missing"):
        make_plan(recipe, baselines=True)


def test_acceleration_follows_from_the_costs() -> None:
    found = plan(controls=())
    first, second, _, baseline = (job.cost.total_macs for job in found.jobs)
    assert found.acceleration() == pytest.approx((first + baseline) / (first + second))
    row = found.rows()[1]
    assert row["speedup"] == pytest.approx(baseline / second)
    assert row["accumulated_macs"] == pytest.approx(first + second)
    assert make_plan(parse_recipe(BASE)).acceleration() == found.acceleration()
    paper = found.rows("paper")[1]
    assert paper["total_macs"] != row["total_macs"]
    assert found.acceleration("paper") == pytest.approx(found.acceleration(), rel=0.1)


def test_costs_know_captions_trimming_recomputation_and_the_teacher() -> None:
    def cost(recipe: Recipe, **options: Any) -> float:
        return make_plan(recipe, **options).job("2-wide").cost.total_macs

    whole = cost(parse_recipe(BASE))
    assert cost(changed("data.captions", 3)) > whole
    mean, shares = (cost(changed("data.caption_tokens", tokens)) for tokens in (9.5, {2: 1, 17: 1}))
    assert mean < shares < whole
    assert cost(changed("chain.links.1.alpha", 0)) < whole
    micro = changed("engine.micro_batch", 16)
    assert cost(micro) > whole
    assert cost(micro, world_size=4) == whole
    chunked = changed("engine.loss_chunk", 16)
    assert cost(chunked) - whole == pytest.approx(62 * 2 * 64 * 64 * 2 * 128)
    assert cost(chunked, world_size=4) == whole
    job = make_plan(parse_recipe(BASE)).job("2-wide")
    assert job.cost == exact_breakdown(job.spec, job.teacher_spec, batch=64, captions=2).of_steps(62)


def test_a_job_is_plain_data() -> None:
    job = plan().jobs[1]
    values = json.loads(json.dumps(job.to_json()))
    assert values["teacher"] == "1-vit_nano"
    assert ModelSpec.from_dict(values["spec"]).width == 128
    assert values["parameters"] == parameters(job.spec)


# One other value for every field of the schema; a field that is added needs one as well.
OTHER: dict[str, Any] = {
    "name": "large",
    "seed": 1,
    "data.train.N.shards": None,  # see test_a_recipe_with_sets_comes_back_from_its_file
    "data.train.N.weight": None,  # the same
    "data.train.N.captions_csv": None,  # the same
    "data.images": 1990,
    "data.captions": 3,
    "data.caption_pool": 7.0,
    "data.caption_tokens": 9.0,
    "data.crop_scale": [0.5, 1.0],
    "data.crop_ratio": [0.5, 2.0],
    **{f"data.augment.{name}": 0.5 for name in ("flip", "brightness", "contrast", "saturation", "hue", "grey")},
    "data.augment.jitter": None,  # see test_the_share_of_jitter_is_a_result
    "data.mean": [0.5, 0.5, 0.5],
    "data.std": [0.5, 0.5, 0.5],
    "data.shuffle_shards": 2,
    "data.captions_csv": "captions.csv",
    "data.caption_columns": ["text"],
    "data.min_matched": 0.9,
    "data.decoder": None,  # see tests/unit/seams/test_decoder.py
    "data.index_dir": "index",
    "data.cache_dir": "cache",
    "data.cache_size": 7,
    "data.max_bad_share": 0.5,
    "family.members.N.name": None,  # see test_names_are_no_result
    "family.members.N.preset": "vit_mini",
    "family.common": {"text_depth": 3},
    "chain.from": None,  # see test_an_existing_model_is_known_by_its_weights
    "chain.from_model": None,  # see test_a_model_that_compt_did_not_write
    "chain.from_prefix": None,
    "chain.links.N.model": "vit_midi",
    "chain.links.N.train": {"epochs": 3},
    "chain.links.N.warmup": {"steps": 6},
    "chain.links.N.lr": 2e-3,
    "chain.links.N.alpha": 100.0,
    "chain.links.N.initial": "random",
    "baselines.lr": {"wide": 2e-3},
    "chain.links.N.expand.width": "lemon",
    "chain.links.N.expand.depth": "constant",
    "chain.links.N.expand.zero_new_outputs": True,
    "chain.links.N.expand.noise": None,
    "chain.links.N.expand.reference_compatible": True,
    **{
        f"chain.{place}.{tower}.{name}": value
        for place in ("expand", "links.N.expand")
        for tower in ("image", "text")
        for name, value in (("width", "insert_packed"), ("depth", "netexpand"), ("zero_new_outputs", True))
    },
    "chain.expand.width": "duplicate",
    "chain.expand.depth": "stack",
    "chain.expand.zero_new_outputs": True,
    "chain.expand.noise": None,  # see test_noise_is_a_result_where_there_are_copies
    "chain.expand.reference_compatible": True,
    "chain.distill.alpha": 0,
    "chain.distill.reference_compatible": True,
    "baselines.train": {"epochs": 9},
    "baselines.warmup": {"steps": 11},
    "baselines.seeds": [1],
    "baselines.controls": [],
    "optimizer.batch": 32,
    "optimizer.lr": 5e-4,
    "optimizer.schedule.shape": "linear",
    "optimizer.schedule.end": 0.1,
    "optimizer.schedule.decay": None,  # see test_the_decay_of_wsd_is_a_result
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.2,
    "optimizer.clip_grad_norm": 1.0,
    "optimizer.precision": "fp32",
    "optimizer.ema.decay": 0.99,
    "optimizer.loss": "siglip",
    "optimizer.image_to_text": "all",
    "optimizer.max_nonfinite": 3,
    "engine.device": "cpu",
    "engine.micro_batch": 16,
    "engine.text": "padded",
    "engine.text_buckets": 3,
    "engine.loss_chunk": 8,
    "engine.compile": True,
    "engine.compile_mode": None,  # see test_settings_of_one_engine_or_with_others_are_no_result
    "engine.graphs": None,
    "engine.workers": 0,
    "engine.cache": True,
    "engine.log_every": {"steps": 3},
    "engine.loggers": [],
    "engine.checkpoint_every": {"epochs": 1},
    "engine.keep_checkpoints": 5,
    "engine.keep_every": {"epochs": 1},
    "engine.async_checkpoints": True,
    "engine.name": "fsdp2",
    "engine.deepspeed_config": None,  # see test_settings_of_one_engine_or_with_others_are_no_result
    **{
        f"engine.fsdp2.{name}": None
        for name in ("reshard_after_forward", "replicas", "cpu_offload", "reduce_precision")
    },
    "engine.shard_teacher": True,
    "engine.teacher_cache": 10**9,
    "engine.recompute": True,
    "engine.find_micro_batch": True,
    "engine.tune": True,
    "engine.timeout": 60.0,
    "chain.links.N.engine": {"name": "zero2"},
    "chain.links.N.nodes": 2,
    "evaluation.every": {"epochs": 1},
    "evaluation.validation": ["held_out.tar"],
    "evaluation.primary": "a",
    "evaluation.batch": 8,
    "evaluation.contact_sheet": "a",
    "evaluation.sets.N.name": "c",
    "evaluation.sets.N.task": "retrieval",
    "evaluation.sets.N.data": "c.tar",
    "evaluation.sets.N.train": None,  # see test_fields_of_other_tasks_are_results
    "evaluation.sets.N.caption_columns": None,  # the same
    "evaluation.sets.N.role": "select",
    "evaluation.sets.N.label": "label",
    "evaluation.sets.N.classnames": "names.txt",
    "evaluation.sets.N.class_order": "number",
    "evaluation.sets.N.templates": "templates.txt",
}


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (None if annotation is Duration else annotation), False
    for part in get_args(annotation):
        found, many = section_of(part)
        if found is not None:
            return found, many or getattr(annotation, "__origin__", None) is list
    return None, False


def fields(section: type[BaseModel] = Recipe, prefix: str = "", execution: bool = False) -> Iterator[tuple[str, bool]]:
    """(path, whether it is an execution field) of every field of the schema; N is an item of a list."""
    for name, field in section.model_fields.items():
        path = prefix + (field.alias or name)
        own = execution or is_execution(field)
        inner, many = section_of(field.annotation)
        if inner is None:
            yield path, own
        else:
            yield from fields(inner, f"{path}.{'N.' if many else ''}", own)


FIELDS = dict(fields())
TESTED_APART = {path for path, value in OTHER.items() if value is None}


def test_the_decay_of_wsd_is_a_result() -> None:
    fast, slow = (changed("optimizer.schedule", {"shape": "wsd", "decay": decay}) for decay in (0.1, 0.2))
    assert hashes(fast) != hashes(slow)


@pytest.mark.parametrize(
    ("task", "field", "value"), [("knn", "train", "t.tar"), ("retrieval", "caption_columns", ["text"])]
)
def test_fields_of_other_tasks_are_results(task: str, field: str, value: Any) -> None:
    item = {"name": "b", "data": "b.tar", "task": task}
    old, new = (changed("evaluation.sets", [one]).evaluation for one in (item, {**item, field: value}))
    assert old.identity() != new.identity()
    with pytest.raises(ConfigError, match=rf"{field} is for .*{task}.*, not for multilabel"):
        changed("evaluation.sets", [{**item, field: value, "task": "multilabel"}])


def test_the_share_of_jitter_is_a_result() -> None:
    few, many = (changed("data.augment", {"hue": 0.1, "jitter": share}) for share in (0.5, 1.0))
    assert hashes(few) != hashes(many)
    assert hashes(changed("data.augment", {"flip": 0.0})) == hashes(parse_recipe(BASE))


def test_every_field_has_another_value_here() -> None:
    assert set(OTHER) == set(FIELDS)


@pytest.mark.parametrize("path", sorted(set(FIELDS) - TESTED_APART))
def test_result_fields_change_the_hashes_and_execution_fields_do_not(path: str) -> None:
    before = hashes(parse_recipe(BASE))
    if FIELDS[path]:
        assert hashes(changed(path.replace("N", "1"), OTHER[path])) == before
    else:
        assert hashes(changed(path.replace("N", "1"), OTHER[path])) != before


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "zero2", "deepspeed_config": "a.json"},
        {"compile": "towers", "compile_mode": "max-autotune", "text": "packed"},
        {"graphs": "on", "text": "packed"},
        {"name": "fsdp2", "fsdp2": {"reshard_after_forward": False}},
        {"name": "fsdp2", "fsdp2": {"replicas": 2, "cpu_offload": True, "reduce_precision": "bf16"}},
    ],
)
def test_settings_of_one_engine_or_with_others_are_no_result(engine: dict[str, Any]) -> None:
    assert hashes(changed("engine", engine)) == hashes(parse_recipe(BASE))


def test_only_an_equal_macs_control_depends_on_the_length_of_captions() -> None:
    before, after = (
        plan(recipe, controls=["equal_macs"]).jobs
        for recipe in (parse_recipe(BASE), changed("data.caption_tokens", 4.0))
    )
    different = [a.name for a, b in zip(before, after, strict=True) if a.hash != b.hash]
    assert different == ["control-equal_macs"]
    assert hashes(changed("engine.recompute", True), controls=["equal_macs"]) == [job.hash for job in before]
    for memory in ("engine.micro_batch", "engine.loss_chunk"):
        assert hashes(changed(memory, 16), controls=["equal_macs"]) == [job.hash for job in before]
        for again in (True, False):
            cost = recipe_cost(changed(memory, 16), before[0].spec, None, 1, 1, None, again=again)
            assert bool(cost.recompute_macs) == again


def test_a_changed_link_changes_what_grows_from_it_and_nothing_else() -> None:
    base = copy.deepcopy(BASE)
    base["chain"]["links"].append({"model": "vit_midi", "train": {"epochs": 2}, "warmup": {"steps": 5}})
    before = plan(parse_recipe(base), controls=()).jobs
    after = plan(changed("chain.links.1.lr", 3e-4, base), controls=()).jobs
    assert [a.name for a, b in zip(before, after, strict=True) if a.hash != b.hash] == ["2-wide", "3-vit_midi"]


def test_names_are_no_result() -> None:
    renamed = copy.deepcopy(BASE)
    renamed["family"]["members"][1]["name"] = renamed["chain"]["links"][1]["model"] = "broad"
    assert hashes(parse_recipe(renamed)) == hashes(parse_recipe(BASE))
    assert "name" in Member.model_fields


def test_the_hash_is_that_of_the_model_however_it_is_written() -> None:
    written = copy.deepcopy(BASE)
    written["family"]["members"][1] = {"name": "wide", "preset": "vit_nano", "width": 128, "text_width": 96}
    written["family"]["common"] = {"text_depth": 2, "mlp_ratio": 4}
    assert hashes(parse_recipe(written)) == hashes(parse_recipe(BASE))


def write_model(folder: Path, spec: ModelSpec, digest: str, **changes: Any) -> str:
    """The manifest of a model folder; None takes a key out."""
    values = {
        "format": "compt-model",
        "format_version": 1,
        "spec": spec.to_dict(),
        "hash": digest,
        "preprocess": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
        **changes,
    }
    folder.mkdir()
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(kept))
    return str(folder)


def test_an_existing_model_is_known_by_its_weights(tmp_path: Path) -> None:
    pico = PRESETS["vit_pico"]
    paths = [write_model(tmp_path / name, pico, digest) for name, digest in (("a", "1"), ("b", "1"), ("c", "2"))]
    first, moved, other = (plan(changed("chain.from", path), controls=()).jobs for path in paths)
    assert (first[0].start, first[0].teacher, first[0].alpha) == (tmp_path / "a", None, 500.0)
    assert first[0].cost.teacher_forward_macs > 0
    assert first[2].same_as is None
    assert [job.hash for job in first] == [job.hash for job in moved]
    assert first[0].hash != other[0].hash
    given = make_plan(changed("chain.from", "anywhere"), start=Start(pico, "1"), controls=())
    assert given.jobs[0].hash == first[0].hash
    near = make_plan(changed("chain.from", "a"), base=tmp_path, controls=())
    assert (near.jobs[0].hash, near.jobs[0].start) == (first[0].hash, Path("a"))
    same_size = write_model(tmp_path / "d", PRESETS["vit_nano"], "3")
    assert plan(changed("chain.from", same_size)).jobs[0].teacher_spec == PRESETS["vit_nano"]


def test_an_existing_model_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^mine\.yaml: chain\.from = 'none': cannot read none/manifest\.json \(No such"
    ):
        make_plan(changed("chain.from", "none"), source="mine.yaml")
    large = write_model(tmp_path / "large", PRESETS["vit_maxi"], "1")
    with pytest.raises(ConfigError, match=r"chain\.links\.0\.model = 'vit_nano': its .* 'vit_maxi'"):
        plan(changed("chain.from", large))
    with pytest.raises(ConfigError, match=r"chain\.from: is missing"):
        make_plan(parse_recipe(BASE), start=Start(PRESETS["vit_pico"], "1"))
    job = write_model(tmp_path / "job", PRESETS["vit_pico"], "1", format=None)
    with pytest.raises(ConfigError, match=r"job/manifest\.json \(format is missing; .* RUN/jobs/NAME/model\)$"):
        plan(changed("chain.from", job))
    newer = write_model(tmp_path / "newer", PRESETS["vit_pico"], "1", format_version=2)
    with pytest.raises(ConfigError, match="its format or version is not"):
        plan(changed("chain.from", newer))


def test_an_existing_model_has_to_know_the_recipe_s_colours(tmp_path: Path) -> None:
    grey = {"mean": [0.5, 0.5, 0.5], "std": OPENAI_STD}
    folder = write_model(tmp_path / "grey", PRESETS["vit_pico"], "1", preprocess=grey)
    with pytest.raises(ConfigError, match=r"^recipe: data\.mean = \[0\.48.* was trained with \[0\.5, 0\.5, 0\.5\]"):
        plan(changed("chain.from", folder))
    values = copy.deepcopy(BASE)
    values["data"]["mean"] = grey["mean"]
    values["chain"]["from"] = folder
    assert plan(parse_recipe(values)).jobs[0].teacher_spec == PRESETS["vit_pico"]


@pytest.mark.parametrize(
    ("key", "value", "own"), [("resize_mode", "squash", "shortest"), ("interpolation", "bilinear", "bicubic")]
)
def test_an_existing_model_that_expects_other_images_is_refused(tmp_path: Path, key: str, value: str, own: str) -> None:
    colours = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
    folder = write_model(tmp_path / "other", PRESETS["vit_pico"], "1", preprocess={**colours, key: value})
    said = (
        rf"chain\.from: its model expects {key} {value}, and a chain has {own}; .* set preprocess_cfg\.{key} to {own}"
    )
    with pytest.raises(ConfigError, match=said):
        plan(changed("chain.from", folder))
    known = write_model(tmp_path / "known", PRESETS["vit_pico"], "1", preprocess={**colours, key: own})
    assert plan(changed("chain.from", known)).jobs[0].teacher_spec == PRESETS["vit_pico"]


def test_a_manifest_as_it_is_written_is_read_without_torch() -> None:
    artefact = pytest.importorskip("compt.weights.artefact")
    assert (artefact.FORMAT, artefact.FORMAT_VERSION) == MODEL_FORMAT


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "chain.links.1.warmup",
            {"steps": 63},
            "chain.links.1.warmup = 63 steps: 63 steps are longer than the training",
        ),
        (
            "chain.links.1.warmup",
            {"epochs": 3},
            "chain.links.1.warmup = 3 epochs: 93 steps are longer than the training",
        ),
        ("baselines.warmup", {"steps": 999}, "baselines.warmup = 999 steps: 999 steps are longer than the training"),
        (
            "chain.links.0.train",
            {"steps": 0},
            "chain.links.0.train = 0 steps: is less than one step, at 64 images per step",
        ),
        ("chain.links.0.train", {"epochs": 0.001}, "chain.links.0.train = 0.001 epochs: is less than one step"),
        (
            "family.members.1.width",
            32,
            "chain.links.1.model = 'wide': its width 32 is smaller than the 64 of 'vit_nano'",
        ),
        ("family.members.1.head_width", 64, "chain.links.1.model = 'wide': its head_width is 64, but 'vit_nano'"),
        ("family.members.1.preset", "vit_pico", "chain.links.1.model = 'wide': its 2,039,265 parameters are not more"),
    ],
)
def test_impossible_trainings(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(changed(path, value), source="mine.yaml")
    assert str(caught.value).startswith(f"mine.yaml: {message}")


def test_too_few_images() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.batch = 64: there are only 10 images"):
        plan(images=10)


NANO = PRESETS["vit_nano"]
PAIRS = {
    "larger in everything": (NANO, PRESETS["vit_midi"], None),
    "wider text": (NANO, resolve("vit_nano", {"text_width": 96}), None),
    "other Swin": (PRESETS["swin_t"], PRESETS["swin_s"], None),
    "wider Swin": (PRESETS["swin_s"], PRESETS["swin_b"], None),
    "another architecture": (PRESETS["vit_t16"], PRESETS["swin_t"], None),
    "and back": (PRESETS["swin_t"], PRESETS["vit_b16"], None),
    "smaller": (PRESETS["vit_midi"], NANO, "parameters are not more than"),
    "less depth": (NANO, resolve("vit_midi", {"depth": 3}), "depth 3 is smaller than the 4"),
    "less text depth": (NANO, resolve("vit_midi", {"text_depth": 1}), "text_depth 1 is smaller"),
    "less text width": (PRESETS["vit_micro"], resolve("vit_maxi", {"text_width": 64}), "text_width 64 is smaller"),
    "less context": (NANO, resolve("vit_midi", {"context_length": 16}), "context_length 16 is smaller than the 32"),
    "narrower embedding": (NANO, resolve("vit_midi", {"embed_dim": 64}), "embed_dim 64 is smaller than the 128"),
    "narrower MLP": (
        NANO,
        resolve("vit_micro", {"mlp_ratio": 2.0}),
        "mlp_ratio x text_width 192 is smaller than the 256",
    ),
    "other head width": (NANO, resolve("vit_midi", {"head_width": 64}), "head_width is 64, but 'vit_nano'"),
    "smaller patches": (NANO, resolve("vit_midi", {"patch_size": 4}), None),
    "larger pictures": (NANO, resolve("vit_midi", {"image_size": 64}), None),
    "smaller pictures of smaller patches": (NANO, resolve("vit_midi", {"image_size": 20, "patch_size": 4}), None),
    "more context and words": (NANO, resolve("vit_midi", {"context_length": 40, "vocab_size": 50_000}), None),
    "wider windows": (PRESETS["swin_t"], PRESETS["swin_b384"], None),
    "a Swin of its own": (PRESETS["swin_t"], resolve("swin_t", {"width": 128, "depths": [2, 2, 8, 2]}), None),
    "fewer patches": (NANO, resolve("vit_midi", {"patch_size": 16}), "image_size / patch_size 2 is smaller than the 4"),
    "another activation": (NANO, resolve("vit_midi", {"quick_gelu": True}), "quick_gelu is True, but 'vit_nano'"),
    "other norms": (NANO, resolve("vit_midi", {"no_ln_pre": True}), "no_ln_pre is True"),
    "other architecture, smaller": (PRESETS["swin_l"], PRESETS["vit_t16"], "parameters are not more than"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_can_grow_into_what(case: str) -> None:
    teacher, student, message = PAIRS[case]
    if message is None:
        check_growth(teacher, student)
    else:
        with pytest.raises(ConfigError) as caught:
            check_growth(teacher, student)
        assert message in str(caught.value)


def test_equal_models_are_no_chain() -> None:
    with pytest.raises(ConfigError, match="go"):
        check_growth(NANO, NANO)
    check_growth(NANO, NANO, strictly=False)


@pytest.mark.parametrize("case", PAIRS)
def test_the_planner_refuses_what_the_expansion_refuses(case: str) -> None:
    expansion = pytest.importorskip("compt.expand.plan")
    teacher, student, message = PAIRS[case]
    if teacher.arch == "vit" and student.arch == "vit" and message is not None:
        with pytest.raises(ConfigError):
            expansion.make_plan(teacher, student)
    elif message is None:
        expansion.make_plan(teacher, student)


def test_a_file_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps(BASE))
    jobs: list[Job] = list(make_plan(load_recipe(path), source=str(path)).jobs)
    assert jobs[0].hash == plan().jobs[0].hash


def test_a_control_has_the_rate_and_warm_up_of_a_model_from_scratch() -> None:
    first, second = BASE["chain"]["links"]
    base = {**BASE, "chain": {**BASE["chain"], "links": [first, {**second, "lr": 3e-4}]}}
    jobs = plan(changed("baselines.lr", {"wide": 2e-3}, base), controls=["equal_epochs", "equal_macs"])
    assert jobs.links[1].lr == 3e-4
    assert {job.lr for job in jobs.jobs if job.kind == "control"} == {2e-3}
    short = plan(changed("baselines.warmup", {"steps": 70}), controls=["equal_epochs"]).job("control-equal_epochs")
    assert (short.steps, short.warmup_steps) == (62, 62)


def test_links_behind_a_model_from_outside_draw_as_if_it_had_been_the_first() -> None:
    found = make_plan(changed("chain.from", "x"), start=Start(PRESETS["vit_pico"], "1"), controls=())
    assert [job.order_seed for job in found.links] == [1, 2]
