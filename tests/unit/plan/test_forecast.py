"""What a plan needs of machines: sums, properties, memory that fits, and disk against a real run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.cost.counts import parameters
from compt.cost.gpus import DEVICES, Device
from compt.cost.memory import ENGINES
from compt.cost.speed import Measurement, Throughput
from compt.errors import ConfigError
from compt.models.presets import PRESETS, ModelSpec
from compt.plan.forecast import Forecast, Machine, check_shares, default_gpus, make_forecast, memory_of
from compt.plan.jobs import make_plan
from compt.plan.links import Start, read_start
from compt.recipe.read import parse_recipe
from compt.recipe.schema import Recipe

A100, H100 = DEVICES["a100-80"], DEVICES["h100"]
NODE = Machine(A100, 8)

VALUES: dict[str, Any] = {
    "name": "three",
    "data": {"train": "shards/*.tar", "images": 64_000, "captions": 2},
    "family": {
        "members": [
            {"name": "one", "preset": "vit_t16"},
            {"name": "two", "preset": "vit_s16"},
            {"name": "three", "preset": "vit_b16"},
        ]
    },
    "chain": {
        "links": [
            {"model": "one", "train": {"epochs": 8}, "warmup": {"steps": 10}},
            {"model": "two", "train": {"epochs": 4}, "warmup": {"steps": 10}},
            {"model": "three", "train": {"epochs": 2}, "warmup": {"steps": 10}},
        ]
    },
    "baselines": {"train": {"epochs": 8}, "warmup": {"steps": 10}, "controls": ["equal_macs"]},
    "optimizer": {"batch": 640},
}


def recipe(**changes: Any) -> Recipe:
    """`VALUES` with fields replaced: data__images=10 for data.images."""
    values = copy.deepcopy(VALUES)
    for path, value in changes.items():
        place: Any = values
        *parents, last = path.split("__")
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = value
    return parse_recipe(values)


def forecast(machine: Machine | None = NODE, *, more: bool = False, **changes: Any) -> Forecast:
    """Of the links and controls, and with `more` of the baselines too."""
    return make_forecast(recipe(**changes), machine, baselines=more)


def measured(seconds: dict[str, float], kind: str = "a100-80", **changes: Any) -> Throughput:
    """A throughput file with seconds a sample for links by position, and for members trained alone by name."""
    specs = recipe(**changes).family.specs()
    names = list(specs)
    entries = []
    for name, value in seconds.items():
        alone = name in specs
        at = names.index(name) if alone else int(name)
        entries.append(
            Measurement(
                student=specs[names[at]],
                teacher=None if alone or not at else specs[names[at - 1]],
                captions=2,
                tokens=77,
                batch=80,
                text_buckets=4,
                repeats=3,
                seconds_per_sample=value,
                low=value * 0.9,
                high=value * 1.2,
            )
        )
    return Throughput(
        device="NVIDIA A100-SXM4-80GB",
        kind=kind,
        precision="bf16",
        seed=0,
        date="2026-01-02",
        command="compt bench throughput",
        versions={},
        entries=tuple(entries),
    )


# What follows by hand: samples x seconds / 3600.
SECONDS = {"one": 1e-3, "two": 2e-3, "three": 5e-3, "1": 2.5e-3, "2": 6e-3}
SAMPLES = {"1-one": 8 * 64_000, "2-two": 4 * 64_000, "3-three": 2 * 64_000}


def test_measured_hours_are_samples_times_seconds() -> None:
    found = forecast(Machine(A100, 4, measured(SECONDS)))
    hours = {item.job.name: item.hours for item in found.links}
    told = " (measured at batch 80; this plan has 160 per GPU)"
    for name, seconds in (("1-one", 1e-3), ("2-two", 2.5e-3), ("3-three", 6e-3)):
        one = hours[name]
        assert one is not None
        assert one.gpu_hours == pytest.approx(SAMPLES[name] * seconds / 3600)
        assert (one.low, one.high) == pytest.approx((0.9 * one.gpu_hours, 1.2 * one.gpu_hours))
        assert one.wall_hours == pytest.approx(one.gpu_hours / 4)
        assert (one.kind, one.sources) == ("measured", (f"measured NVIDIA A100-SXM4-80GB, 2026-01-02{told}",))
    chain = [512 * 1.0, 256 * 2.5, 128 * 6.0]  # in thousands of milliseconds: what the links take
    alone = [512 * 1.0, 512 * 2.0, 512 * 5.0]
    wanted = [(alone[at] / chain[at], sum(alone[: at + 1]) / sum(chain[: at + 1])) for at in range(3)]
    assert found.speedups() == [pytest.approx(pair) for pair in wanted]
    total = found.totals(found.links).hours
    assert total is not None
    assert total.gpu_hours == pytest.approx(sum(chain) / 3600)
    assert total.kind == "measured"


def test_what_was_not_measured_is_projected_and_said_so() -> None:
    found = forecast(Machine(A100, 8, measured({"one": 1e-3})))
    kinds = [item.hours.kind for item in found.links if item.hours]
    assert kinds == ["measured", "projected", "projected"]
    total = found.totals(found.links).hours
    assert total is not None
    assert total.kind == "measured and projected"
    assert len(total.sources) == 2


def test_sums_and_accumulated_costs() -> None:
    found = forecast(more=True)
    rows = found.plan.rows()
    assert [item.job.name for item in found.estimates if item.job.same_as] == ["baseline-one-s0"]
    own = [row["total_macs"] for row in rows[:3]]
    assert [row["accumulated_macs"] for row in rows[:3]] == pytest.approx([sum(own[: at + 1]) for at in range(3)])
    everything = found.totals(found.trained)
    assert everything.models == len(rows) - 1
    assert everything.macs["exact"] == pytest.approx(sum(item.job.cost.total_macs for item in found.trained))
    alone = found.totals(found.individual)
    assert alone.samples == 3 * 512_000
    assert alone.parameters == sum(parameters(PRESETS[name]) for name in ("vit_t16", "vit_s16", "vit_b16"))
    assert alone.macs["exact"] / found.totals(found.links).macs["exact"] == pytest.approx(found.plan.acceleration())


def test_a_share_of_the_teacher() -> None:
    row = forecast().plan.rows()[1]
    cost = forecast().links[1].job.cost
    assert row["teacher_share"] == pytest.approx(cost.samples * cost.teacher_forward_macs / cost.total_macs)
    assert 0.05 < row["teacher_share"] < 0.2
    assert forecast(chain__links__1__alpha=0).plan.rows()[1]["teacher_share"] == 0


def test_without_a_machine_there_are_neither_hours_nor_memory() -> None:
    found = forecast(None)
    assert found.speedups() == []
    values = found.to_json()
    assert values["machine"] is None
    assert {job["hours"] for job in values["jobs"]} == {job["memory"] for job in values["jobs"]} == {None}
    assert values["totals"]["chain"]["hours"] is None
    assert values["acceleration"]["gpu_hours"] is values["acceleration"]["own_gpu_hours"] is None
    assert {job["own_hours"] for job in values["jobs"]} == {None}
    assert values["disk"]["peak_bytes"] > 0


def test_a_forecast_is_plain_data() -> None:
    found = forecast(more=True, data__caption_tokens={9: 0.5, 20: 0.5})
    values = json.loads(json.dumps(found.to_json()))
    assert values["caption_tokens"] == {"9": 0.5, "20": 0.5}
    assert values["jobs"][1]["teacher"] == "1-one"
    assert ModelSpec.from_dict(values["jobs"][1]["spec"]).width == 384
    assert values["jobs"][1]["parameters"] == parameters(found.plan.jobs[1].spec)
    assert values["jobs"][1]["macs"]["exact"]["total_macs"] == values["jobs"][1]["cost"]["total_macs"]
    assert values["jobs"][1]["macs"]["paper"]["total_macs"] != values["jobs"][1]["cost"]["total_macs"]
    assert set(values["jobs"][0]["memory"]) == set(ENGINES)
    assert values["jobs"][-1]["macs"]["exact"]["speedup"] is None
    assert values["acceleration"]["exact_macs"] == found.plan.acceleration()
    assert values["totals"]["run"]["models"] == len(found.trained)


def test_a_recipe_without_baselines() -> None:
    found = forecast(baselines=None)
    values = found.to_json()
    assert values["totals"]["individual"] is None
    assert values["acceleration"] == {"exact_macs": None, "paper_macs": None, "gpu_hours": None, "own_gpu_hours": None}


# Memory


def small(gigabytes: float) -> Machine:
    """A GPU with this many GB for a training run."""
    return Machine(Device("x", "X", A100.peak_flops, 2e12, (gigabytes * (1 + 1e-9) + 1) * 1e9 / 0.95, "test"), 8)


def test_what_fits_depends_on_the_room_of_the_gpu() -> None:
    need = forecast().links[2].memory["ddp"]
    for machine, fits in (
        (small(need.stored.total_bytes / 1e9), True),
        (small(need.stored.total_bytes / 1.0001e9), False),
    ):
        found = forecast(machine)
        assert found.links[2].memory["ddp"].fits(False) is fits
        assert (found.remedy is None) is fits
    assert need.recomputed.activations < need.stored.activations


def test_the_named_micro_batch_is_the_largest_that_fits() -> None:
    most = forecast().links[1].memory["ddp"].stored.total_bytes / 1e9 * 0.9
    found = forecast(small(most))
    assert found.remedy is not None
    assert found.remedy.jobs == ("2-two", "3-three", "control-equal_macs")
    size = found.remedy.micro_batch
    assert size is not None
    assert forecast(small(most), engine__micro_batch=size).remedy is None
    larger = next(n for n in range(size + 1, 81) if 80 % n == 0)
    assert forecast(small(most), engine__micro_batch=larger).remedy is not None


def test_where_nothing_helps_nothing_is_named() -> None:
    found = forecast(small(0.1)).remedy
    assert found is not None
    assert (found.micro_batch, found.recompute, found.engine, found.engine_recomputed) == (None, False, None, None)


def test_remedies_hold_for_all_jobs_that_need_one() -> None:
    links = forecast().links
    kept = {engine: max(link.memory[engine].stored.total_bytes for link in links) for engine in ENGINES}
    others = [engine for engine in ENGINES if engine != "ddp"]
    least = min(kept[engine] for engine in others)
    found = forecast(small(least / 1e9), baselines__controls=[]).remedy
    assert found is not None
    assert found.recompute
    assert found.engine == next(engine for engine in others if kept[engine] <= least)


def test_no_change_is_named_that_the_recipe_refuses() -> None:
    def named(**changes: Any) -> tuple[Any, ...]:
        found = forecast(room, **changes).remedy
        assert found is not None
        return found.micro_batch, found.recompute, found.engine, found.engine_recomputed

    last = forecast().links[2].memory
    room = small(last["zero1"].stored.total_bytes / 1e9)
    assert last["fsdp2"].stored.total_bytes < last["zero1"].stored.total_bytes < last["ddp"].stored.total_bytes
    assert named() == (40, True, "fsdp2", "fsdp2")
    assert named(engine__compile="towers") == (40, True, "zero1", "zero0")
    assert named(engine__graphs="on", engine__text="packed") == (None, False, None, None)


@pytest.mark.parametrize(
    "engine",
    [
        {"find_micro_batch": True},
        {"tune": True},
        {"name": "fsdp2", "fsdp2": {"cpu_offload": True}},
        {"name": "zero2", "deepspeed_config": "mine.json"},
    ],
)
def test_no_warning_for_what_may_need_less(engine: dict[str, Any]) -> None:
    plain = {key: value for key, value in engine.items() if key == "name"}
    assert forecast(small(1), engine=plain).remedy is not None
    assert forecast(small(1), engine=engine).remedy is None
    own = forecast(small(1), chain__links__2__engine=engine, baselines__controls=[]).remedy
    assert own is not None
    assert own.jobs == ("1-one", "2-two")


def test_the_engine_is_that_of_each_link() -> None:
    """What fits, and what recomputation costs, follow `engine` and what links say otherwise."""
    own = {"name": "zero2", "recompute": True, "micro_batch": 20}
    found = forecast(chain__links__2__engine=own)
    assert [(item.engine, item.recompute) for item in found.links] == [("ddp", False)] * 2 + [("zero2", True)]
    last, plain = found.links[2], forecast().links[2]
    assert last.needed_bytes == memory_of(found.plan.recipe, last.job, "zero2", 8, recompute=True).total_bytes
    assert last.needed_bytes < plain.needed_bytes
    between = small((last.needed_bytes + plain.needed_bytes) / 2e9)
    assert forecast(between).remedy is not None
    assert forecast(between, chain__links__2__engine=own, baselines__controls=[]).remedy is None
    again = last.job.cost.recompute_macs / plain.job.cost.student_forward_macs
    assert plain.job.cost.recompute_macs == 0
    assert 1.5 < again < 2, "each micro-batch runs forward twice, and most of its blocks once more"
    only = forecast(engine__recompute=True).links[2].job.cost
    assert 0.5 < only.recompute_macs / only.student_forward_macs < 1
    with pytest.raises(ConfigError, match=r"link \w+: engine\.micro_batch 7 does not divide"):
        forecast(chain__links__2__engine={"micro_batch": 7})


def test_a_teacher_in_shards_needs_less() -> None:
    job = forecast().links[2].job
    whole, shared = (memory_of(recipe(engine__shard_teacher=on), job, "ddp", 8) for on in (False, True))
    assert 0.1 * whole.teacher < shared.teacher < 0.8 * whole.teacher


def test_memory_is_that_of_the_recipe_as_it_runs() -> None:
    plain, job = recipe(), forecast().links[1].job
    whole = memory_of(plain, job, "ddp", 8)
    averaged = memory_of(recipe(optimizer__ema={"decay": 0.9}), job, "ddp", 8)
    assert averaged.weights == pytest.approx(whole.weights + 4 * parameters(job.spec), rel=1e-3)
    in_pieces = memory_of(recipe(engine__micro_batch=20), job, "ddp", 8)
    assert 4 * in_pieces.activations == pytest.approx(whole.activations)
    assert memory_of(plain, job, "ddp", 8, micro_batch=20) == in_pieces
    assert memory_of(recipe(optimizer__precision="fp32"), job, "ddp", 8).activations > 1.5 * whole.activations
    assert memory_of(recipe(data__caption_tokens=20), job, "ddp", 8).activations < whole.activations
    assert memory_of(recipe(engine__loss_chunk=8), job, "ddp", 8).loss != whole.loss
    alone = memory_of(plain, forecast(chain__links__1__alpha=0).links[1].job, "ddp", 8)
    assert whole.teacher > alone.teacher == 0


# What GPUs and batches go together


def test_the_batch_has_to_be_shared_evenly() -> None:
    with pytest.raises(ConfigError, match=r"^r\.yaml: optimizer\.batch 640 .* by 7 processes; 5 or 8 can share it$"):
        make_forecast(recipe(), Machine(A100, 7), source="r.yaml")
    with pytest.raises(ConfigError, match=r"engine\.micro_batch 48 does not divide the 80 images .* take 40$"):
        check_shares(recipe(engine__micro_batch=48), 8, "r.yaml")
    check_shares(recipe(engine__micro_batch=100), 8, "r.yaml")
    with pytest.raises(ConfigError, match="does not divide the 640 images of a process"):
        forecast(None, engine__micro_batch=48)


@pytest.mark.parametrize(("batch", "gpus"), [(1024, 8), (640, 8), (12, 6), (14, 7), (13, 1), (9, 3), (4, 4)])
def test_the_gpus_of_a_node_or_fewer(batch: int, gpus: int) -> None:
    assert default_gpus(batch) == gpus


def test_recomputed_micro_batches_cost_hours() -> None:
    def hours(**changes: Any) -> float:
        found = forecast(**changes).links[0].hours
        assert found is not None
        return found.gpu_hours

    assert hours(engine__micro_batch=40) > hours()
    assert hours(engine__micro_batch=80) == hours()


# Properties


LENGTHS = st.lists(st.integers(1, 12), min_size=3, max_size=3)
FEW = settings(max_examples=15, deadline=None)


def with_epochs(epochs: list[int], **changes: Any) -> dict[str, Any]:
    return {**{f"chain__links__{at}__train": {"epochs": value} for at, value in enumerate(epochs)}, **changes}


def totals(machine: Machine | None = NODE, **changes: Any) -> tuple[float, float, int]:
    """MACs, GPU-hours and samples of the chain."""
    found = forecast(machine, **changes)
    total = found.totals(found.links)
    return total.macs["exact"], total.hours.gpu_hours if total.hours else 0.0, total.samples


@FEW
@given(epochs=LENGTHS, at=st.integers(0, 2), more=st.integers(1, 5))
def test_more_epochs_cost_more(epochs: list[int], at: int, more: int) -> None:
    longer = [value + more * (place == at) for place, value in enumerate(epochs)]
    before, after = totals(**with_epochs(epochs)), totals(**with_epochs(longer))
    assert all(b > a for a, b in zip(before, after, strict=True))


@FEW
@given(heads=st.integers(3, 12), captions=st.integers(1, 6), kind=st.sampled_from(sorted(DEVICES)))
def test_wider_models_and_more_captions_cost_more(heads: int, captions: int, kind: str) -> None:
    machine = Machine(DEVICES[kind], 8)
    sizes = {"family__members__0__width": 192, "family__members__1__width": 64 * heads, "data__captions": captions}
    before = totals(machine, **{**sizes, "family__members__2__width": 768})
    wider = totals(machine, **{**sizes, "family__members__2__width": 832})
    talkative = totals(machine, **{**sizes, "family__members__2__width": 768, "data__captions": captions + 1})
    assert wider[0] > before[0]
    assert wider[1] > before[1]
    assert talkative[0] > before[0]
    assert talkative[1] > before[1]


@FEW
@given(epochs=LENGTHS, gpus=st.sampled_from([1, 2, 4, 5, 8, 64]), times=st.integers(2, 4))
def test_hours_follow_samples_and_gpus(epochs: list[int], gpus: int, times: int) -> None:
    machine = Machine(H100, gpus)
    one = forecast(machine, **with_epochs(epochs))
    many = forecast(machine, **with_epochs([times * value for value in epochs]))
    for before, after in zip(one.links, many.links, strict=True):
        assert before.hours is not None
        assert after.hours is not None
        assert after.job.samples == times * before.job.samples
        assert after.hours.gpu_hours == pytest.approx(times * before.hours.gpu_hours)
        assert before.hours.wall_hours == pytest.approx(before.hours.gpu_hours / gpus)
        assert before.hours.low <= before.hours.gpu_hours <= before.hours.high
    assert totals(machine, **with_epochs(epochs))[1] == pytest.approx(
        totals(Machine(H100, 1), **with_epochs(epochs))[1]
    )


@FEW
@given(epochs=LENGTHS, more=st.booleans(), keep=st.integers(1, 4), every=st.integers(1, 900))
def test_totals_are_the_sums_of_their_rows(epochs: list[int], more: bool, keep: int, every: int) -> None:
    values = forecast(
        more=more,
        **with_epochs(epochs, engine__keep_checkpoints=keep, engine__checkpoint_every={"steps": every}),
    ).to_json()
    jobs = [job for job in values["jobs"] if not job["same_as"]]
    for name, group in (("run", jobs), ("chain", [job for job in jobs if job["kind"] == "link"])):
        total = values["totals"][name]
        for key in ("parameters", "samples", "steps"):
            assert total[key] == sum(job[key] for job in group)
        for mode in ("exact", "paper"):
            assert total["macs"][mode] == pytest.approx(sum(job["macs"][mode]["total_macs"] for job in group))
        for key in ("gpu_hours", "low", "high", "wall_hours"):
            assert total["hours"][key] == pytest.approx(sum(job["hours"][key] for job in group))
    links = [job for job in jobs if job["kind"] == "link"]
    assert links[-1]["macs"]["exact"]["accumulated_macs"] == pytest.approx(values["totals"]["chain"]["macs"]["exact"])
    assert values["disk"]["end_bytes"] == sum(job["disk"]["end_bytes"] for job in jobs)
    assert values["disk"]["peak_bytes"] >= max(
        values["disk"]["end_bytes"], *(job["disk"]["peak_bytes"] for job in jobs)
    )
    for job in jobs:
        parts = job["memory"]["zero2"]["stored"]
        summed = sum(value for key, value in parts.items() if key not in ("total_bytes", "fits", "overlap"))
        assert parts["total_bytes"] == pytest.approx(summed - parts["overlap"])


# Disk, against a run


def test_disk_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compt.chain import job as jobs
    from compt.train import checkpoint
    from compt.weights.artefact import read_artefact
    from tests.helpers import recipe as small_run

    changes = ("evaluation=null", "optimizer.ema={decay: 0.5}")
    run = tmp_path / "run"
    seen: list[int] = []

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def watched(module: Any, name: str) -> None:
        original = getattr(module, name)

        def look(*arguments: Any, **options: Any) -> Any:
            seen.append(size(run / "jobs"))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, look)

    watched(checkpoint, "_prune")
    watched(jobs.JobRun, "_finish")
    small_run.chain(small_run.make_data(tmp_path), run, *changes)
    found = make_forecast(small_run.recipe_of(*changes), None)
    assert max(seen) == pytest.approx(found.disk_peak_bytes(), rel=0.02)
    assert size(run / "jobs") == pytest.approx(found.disk_end_bytes(), rel=0.02)
    for item in found.links:
        folder = run / "jobs" / item.job.name
        assert size(folder) == pytest.approx(item.disk.end_bytes, rel=0.02)
        assert size(folder / "model") == pytest.approx(item.disk.model_bytes, rel=0.02)
    model = run / "jobs" / "1-small" / "model"
    whole = read_artefact(model)
    assert read_start(model) == Start(whole.spec, whole.hash, whole.preprocess, averaged=True)
    assert size(run / "jobs" / "2-large" / "initial") == pytest.approx(found.links[1].disk.initial_bytes, rel=0.02)


def test_checkpoints_of_a_short_training_are_few() -> None:
    def disk(**engine: Any) -> Any:
        return forecast(None, **{f"engine__{key}": value for key, value in engine.items()}).links[1].disk

    steps = make_plan(recipe()).links[1].steps
    one, model, initial = disk().checkpoint_bytes, disk().model_bytes, disk().initial_bytes
    assert disk(checkpoint_every={"steps": steps}).checkpoints == 1
    assert disk(checkpoint_every={"steps": steps}).peak_bytes == initial + one + model
    assert disk(checkpoint_every={"steps": steps - 1}).checkpoints == 2
    assert disk(checkpoint_every={"steps": steps - 1}).peak_bytes == initial + 2 * one + model
    assert disk(checkpoint_every={"steps": 1}, keep_checkpoints=3).peak_bytes == initial + max(4 * one, 3 * one + model)


def test_checkpoints_are_kept_as_each_link_s_engine_says() -> None:
    def counted(every: int, besides: int, keep: int) -> tuple[int, int]:
        """Step by step: the peak while a checkpoint is written, and the checkpoints left."""
        kept: list[int] = []
        most = 0
        for step in range(1, steps + 1):
            if step % every and step % besides and step != steps:
                continue
            most = max(most, len(kept) + 1)
            kept.append(step)
            kept = [old for old in kept if old in kept[-keep:] or old % besides == 0]
        return most, len(kept)

    steps = make_plan(recipe()).links[1].steps
    for every, besides, keep in ((10, 30, 2), (7, 5, 1), (50, 1, 2), (13, 1000, 3), (steps // 2, steps, 1)):
        engine = {"checkpoint_every": {"steps": every}, "keep_every": {"steps": besides}, "keep_checkpoints": keep}
        found = forecast(None, chain__links__1__engine=engine)
        disk, (most, left) = found.links[1].disk, counted(every, besides, keep)
        assert disk.checkpoints == left
        one = disk.checkpoint_bytes
        assert disk.peak_bytes == disk.initial_bytes + max(most * one, left * one + disk.model_bytes)
        assert found.links[0].disk == forecast(None).links[0].disk


def test_memory_knows_replicas_and_weights_that_stay_gathered() -> None:
    def memory(**fsdp2: Any) -> Any:
        found = forecast(engine__name="fsdp2", engine__fsdp2=fsdp2)
        return found.links[2].memory

    plain = memory()
    # Two groups of four GPUs hold what four GPUs do; eight groups of one what one does, as with DDP.
    four = memory_of(recipe(engine__name="fsdp2", optimizer__batch=320), forecast().links[2].job, "fsdp2", 4)
    halves = memory(replicas=2)["fsdp2"].stored
    assert (halves.optimizer, halves.gradients) == (four.optimizer, four.gradients)
    assert halves.weights == pytest.approx(four.weights)
    alone = memory(replicas=8)
    assert alone["fsdp2"].stored.optimizer == pytest.approx(plain["ddp"].stored.optimizer, rel=1e-3)
    gathered = memory(reshard_after_forward=False)["fsdp2"].stored
    spec = forecast().links[2].job.spec
    blocks = 2 * (parameters(spec) - spec.vocab_size * spec.text_width)
    assert 0.8 * blocks < gathered.weights - plain["fsdp2"].stored.weights < blocks
    # What other engines would need is as before.
    assert all(memory(replicas=2)[name] == plain[name] for name in ENGINES if name != "fsdp2")


def test_checkpoints_are_those_of_each_link_s_engine() -> None:
    links = forecast(None, chain__links__1__engine={"name": "zero1"}).links
    plain = [link.disk for link in forecast(None).links]
    more = 4 * parameters(links[1].job.spec)
    assert [link.disk.checkpoint_bytes - old.checkpoint_bytes for link, old in zip(links, plain, strict=True)] == [
        0,
        more,
        0,
    ]
    assert links[1].disk.peak_bytes > plain[1].peak_bytes


def test_projectors_are_in_the_checkpoints_alone() -> None:
    def disk(**changes: Any) -> Any:
        return forecast(None, **changes).links[1].disk

    wider = {
        "family__members__0__embed_dim": 512,
        "family__members__1__embed_dim": 640,
        "family__members__2__embed_dim": 640,
    }
    distilled, plain = disk(**wider), disk(**wider, chain__links__1__alpha=0)
    # Two linear layers from 640 to 512 with a bias: weights and two moments in fp32, and a count of steps a tensor.
    assert distilled.checkpoint_bytes - plain.checkpoint_bytes == 12 * 2 * (640 * 512 + 512) + 4 * 4
    assert (distilled.model_bytes, distilled.initial_bytes) == (plain.model_bytes, plain.initial_bytes)
    assert disk() == disk(chain__links__1__alpha=0)
