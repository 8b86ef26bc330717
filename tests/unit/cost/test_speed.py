"""Devices, throughput files, and the projection that is fitted to the paper's hours: against arithmetic by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.paper.printed import TABLE_G
from compt.cost.gpus import DEVICES, PAPER_DEVICE, find_device, match_device
from compt.cost.paper import TABLE_2
from compt.cost.published import paper_cost
from compt.cost.speed import (
    Conditions,
    Measurement,
    Projection,
    Speed,
    Throughput,
    Work,
    channels,
    fit,
    fitted,
    published_times,
    relative_error,
    speed,
    work,
)
from compt.cost.training import exact_breakdown
from compt.errors import ConfigError
from compt.models.presets import PRESETS
from compt.plan.hours import family_hours, published_rows
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe

T, S, L = PRESETS["vit_t16"], PRESETS["vit_s16"], PRESETS["vit_l16"]
MODEL = Projection(fixed_seconds=1e-3, efficiency=0.5, bytes_per_channel=100.0, error=0.1)
WORK = Work(flops=312e9, channels=2.039e6)  # on an A100 80 GB: 2 ms of computing, 0.1 ms of traffic, 1 ms fixed


DATASHEETS = {  # TFLOP/s of bf16, tf32 and fp32 (Hopper's are printed with sparsity, at twice that), TB/s
    "a100-40": (312, 156, 19.5, 1.555),
    "a100-80": (312, 156, 19.5, 2.039),
    "h100": (989.4, 494.7, 66.9, 3.35),
    "h200": (989.4, 494.7, 66.9, 4.8),
}
CAPACITIES = {"a100-40": 39.39, "a100-80": 79.15, "h100": 79.10, "h200": 139.80}  # GiB, as PyTorch's messages have it


@pytest.mark.parametrize("name", list(DEVICES))
def test_devices_are_those_of_the_datasheets(name: str) -> None:
    device, (half, tf32, fp32, bandwidth) = DEVICES[name], DATASHEETS[name]
    assert device.name == name
    assert {key: value / 1e12 for key, value in device.peak_flops.items()} == pytest.approx(
        {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}
    )
    assert device.bandwidth_bytes / 1e12 == pytest.approx(bandwidth)
    assert device.memory_bytes / 2**30 == pytest.approx(CAPACITIES[name], abs=1e-6)
    assert "datasheet" in device.source


def test_devices_are_found_by_name() -> None:
    assert find_device("a100") is find_device("a100-80") is DEVICES["a100-80"]


@pytest.mark.parametrize(
    ("name", "gigabytes", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80"),
        ("NVIDIA A100 80GB PCIe", 85, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 85, "h100"),
        ("NVIDIA H200", 150, "h200"),
        ("NVIDIA H100 PCIe", 85, None),  # lower clocks, another peak
        ("NVIDIA H100 NVL", 100, None),
        ("NVIDIA H200 MIG 1g.18gb", 18, None),  # a seventh of the multiprocessors
        ("NVIDIA A10", 24, None),
        ("Tesla V100-SXM2-32GB", 34, None),
    ],
)
def test_devices_are_matched_by_what_cuda_calls_them(name: str, gigabytes: float, key: str | None) -> None:
    found = match_device(name, gigabytes * 1e9)
    assert (found and found.name) == key


def test_channels_by_hand() -> None:
    assert channels(T, 6, 77) == 197 * 192 * 12 + 6 * 77 * 256 * 12
    assert channels(T, 4, {20: 3.0, 40: 1.0}) == 197 * 192 * 12 + 4 * 25 * 256 * 12
    assert channels(T, 1, 500) == channels(T, 1) == 197 * 192 * 12 + 77 * 256 * 12
    image = 56**2 * 96 * 2 + 28**2 * 192 * 2 + 14**2 * 384 * 6 + 7**2 * 768 * 2
    assert channels(PRESETS["swin_t"], 4, 10) == image + 4 * 10 * 256 * 12


def test_work_counts_passes() -> None:
    own, teacher = channels(S, 4, 30), channels(T, 4, 30)
    asked = {"batch": 64, "captions": 4, "tokens": 30}
    plain = work(S, None, exact_breakdown(S, None, **asked).of_steps(1), 4, 30)
    assert plain.channels == 3 * own
    link = exact_breakdown(S, T, **asked).of_steps(1)
    assert work(S, T, link, 4, 30) == Work(2 * link.sample_macs, 3 * own + teacher)
    again = work(S, T, exact_breakdown(S, T, recompute=True, **asked).of_steps(1), 4, 30)
    assert again.channels == pytest.approx(4 * own + teacher)
    # A teacher that is not distilled from costs nothing, and the published accounting has its own captions.
    assert work(S, T, exact_breakdown(S, None, **asked).of_steps(1), 4, 30) == plain
    paper = paper_cost(S, T, samples=1, steps=1)
    assert work(S, T, paper, 4, 30) == work(S, T, paper, 6, 77)
    assert work(S, T, paper, 4, 30).channels == 3 * channels(S, 6, 77) + channels(T, 6, 77)


def test_the_projection_by_hand() -> None:
    assert MODEL.parts(WORK, PAPER_DEVICE) == pytest.approx((2e-3, 1e-4, 1e-3))
    assert MODEL.bounds(WORK, PAPER_DEVICE) == pytest.approx((3.1e-3 * 0.9, 3.1e-3 * 1.1))
    # H200: 989.4 / 312 = 3.171 times the peak, 4.8 / 2.039 = 2.354 times the bandwidth, the fixed part as it was.
    assert MODEL.seconds(WORK, DEVICES["h200"]) == pytest.approx(2e-3 / 3.1712 + 1e-4 / 2.3541 + 1e-3, rel=1e-4)
    low, high = MODEL.bounds(WORK, DEVICES["h200"])
    assert low == pytest.approx(0.9 * (2e-3 / 3.1712 + 1e-4 / 2.3541 + 1e-3 / 2.3541), rel=1e-4)
    assert high == pytest.approx(1.1 * (2e-3 / 2.3541 + 1e-4 / 2.3541 + 1e-3), rel=1e-4)
    # fp32: 19.5 TFLOP/s, and channels of twice the bytes.
    assert MODEL.parts(WORK, PAPER_DEVICE, "fp32") == pytest.approx((32e-3, 2e-4, 1e-3))
    # Less bandwidth than the paper's device at the same peak: computing and the fixed part stay.
    assert MODEL.bounds(WORK, DEVICES["a100-40"])[1] == pytest.approx(1.1 * (2e-3 + 1e-4 * 2.039 / 1.555 + 1e-3))


def test_below_the_published_sizes_the_fixed_part_is_open() -> None:
    least = min(row.work.flops for row in published_times())
    low, high = MODEL.bounds(Work(least / 1e9, 0.0), PAPER_DEVICE)
    assert low < 1e-6
    assert high == pytest.approx(1.1e-3, rel=1e-3)
    assert MODEL.bounds(Work(least, 0.0), PAPER_DEVICE)[0] > 0.9e-3


def test_published_times_are_hours_over_samples() -> None:
    rows = published_times()
    assert len(rows) == 3 * (4 + 3)
    first = rows[0]
    assert (first.family, first.model, first.teacher, first.hours) == ("cc3m_vit", "vit_t16", None, 154)
    assert first.seconds_per_sample == pytest.approx(154 * 3600 / (2_753_427 * 128))
    for row in rows:
        published = TABLE_G[row.model].training_gmacs + (TABLE_G[row.teacher].forward_gmacs if row.teacher else 0)
        share = 2e9 * published / row.seconds_per_sample / 312e12
        assert row.utilisation == pytest.approx(share, rel=0.04), row.model
        assert 0.07 < row.utilisation < 0.28


def test_the_fit_finds_what_made_the_times() -> None:
    truth = Projection(0.7e-3, 0.6, 250.0, 0.0)
    rows = tuple(replace(row, seconds_per_sample=truth.seconds(row.work, PAPER_DEVICE)) for row in published_times())
    found = fit(rows)
    assert found.fixed_seconds == pytest.approx(0.7e-3)
    assert found.efficiency == pytest.approx(0.6)
    assert found.bytes_per_channel == pytest.approx(250.0)
    assert max(abs(relative_error(found, row)) for row in rows) < 1e-9


def _normal_equations(rows: list) -> np.ndarray:
    design = np.array([[1.0, row.work.flops, row.work.channels] for row in rows])
    design /= np.array([row.seconds_per_sample for row in rows])[:, None]
    scale = design.max(axis=0)
    scaled = design / scale
    return np.linalg.solve(scaled.T @ scaled, scaled.T @ np.ones(len(rows))) / scale


def test_the_fit_holds_on_every_published_row() -> None:
    rows, model = list(published_times()), fitted()
    fixed, per_flop, per_channel = _normal_equations(rows)
    assert model.fixed_seconds == pytest.approx(fixed)
    assert model.efficiency == pytest.approx(1 / per_flop / 312e12)
    assert model.bytes_per_channel == pytest.approx(per_channel * 2.039e12)
    assert model.fixed_seconds > 0
    assert 0 < model.efficiency < 1
    errors = [relative_error(model, row) for row in rows]
    assert max(map(abs, errors)) < 0.091
    assert float(np.sqrt(np.mean(np.square(errors)))) < 0.051


def test_the_error_is_that_of_rows_held_out() -> None:
    rows = list(published_times())
    errors = []
    for row in rows:
        constants = _normal_equations([other for other in rows if other is not row])
        errors.append(abs(constants @ [1.0, row.work.flops, row.work.channels] / row.seconds_per_sample - 1))
    assert fitted().error == pytest.approx(max(errors))
    # Each family of the table is predicted from the two others.
    for family in TABLE_2:
        model = fit(tuple(row for row in rows if row.family != family))
        assert max(abs(relative_error(model, row)) for row in rows if row.family == family) < fitted().error


def test_simpler_forms_hold_less_well(root: Path) -> None:
    rows = published_times()
    seconds = np.array([row.seconds_per_sample for row in rows])
    columns = {
        "fixed": np.ones(len(rows)),
        "flops": np.array([row.work.flops for row in rows]),
        "channels": np.array([row.work.channels for row in rows]),
    }

    def worst(*names: str) -> float:
        design = np.stack([columns[name] for name in names], axis=1) / seconds[:, None]
        constants = np.linalg.pinv(design) @ np.ones(len(rows))
        return float(np.abs(design @ constants - 1).max())

    blocks = max(
        abs(relative_error(fit(tuple(row for row in rows if row.family != family)), row))
        for family in TABLE_2
        for row in rows
        if row.family == family
    )
    text = " ".join((root / "docs" / "hardware.md").read_text(encoding="utf-8").split())
    assert f"the fixed part alone, the error on these rows is up to {100 * worst('fixed', 'flops'):.0f} %" in text
    assert f"FLOPs and traffic alone, up to {100 * worst('flops', 'channels'):.0f} %" in text
    assert f"a row that is left out of the fit is predicted within {100 * fitted().error:.1f} %" in text
    assert f"a family of the table within {100 * blocks:.1f} % from the other two" in text
    assert worst("fixed", "flops", "channels") < 0.1 < worst("flops", "channels")


def a_file(*entries: Measurement, **other: object) -> Throughput:
    values = {
        "device": "NVIDIA H200",
        "kind": "h200",
        "precision": "bf16",
        "seed": 0,
        "date": "2026-01-02T03:04:05Z",
        "command": "compt bench throughput",
        "versions": {"torch": "2"},
        "entries": entries,
    }
    return Throughput(**{**values, **other})


def entry(**other: object) -> Measurement:
    values = {
        "student": S,
        "teacher": T,
        "captions": 4,
        "tokens": 30.0,
        "batch": 8,
        "repeats": 3,
        "seconds_per_sample": 2e-3,
        "low": 1e-3,
        "high": 3e-3,
    }
    return Measurement(**{**values, **other})


AS_MEASURED = Conditions(captions=4, tokens=30.0, batch=8)


def found_in(file: Throughput, student=S, teacher=T, distilled=True, **other: object) -> Speed:
    asked = replace(AS_MEASURED, **other)
    given = {"captions": asked.captions, "tokens": asked.tokens}
    cost = exact_breakdown(student, teacher if distilled else None, batch=8, **given).of_steps(1)
    found = speed(student, teacher, cost, DEVICES["h200"], asked, file)
    assert found.low <= found.seconds_per_sample <= found.high
    return found


def kind_of(file: Throughput, **other: object) -> str:
    return found_in(file, **other).kind


def test_measured_only_for_the_very_job() -> None:
    file = a_file(entry())
    found = found_in(file)
    assert (found.seconds_per_sample, found.low, found.high, found.kind) == (2e-3, 1e-3, 3e-3, "measured")
    assert found.source == "NVIDIA H200, 2026-01-02"
    assert kind_of(file, student=replace(S, name="mine")) == "measured"
    assert kind_of(file, tokens={20: 1.0, 40: 1.0}) == "measured"
    assert kind_of(file, student=replace(S, depth=13)) == "projected"
    assert kind_of(file, teacher=None) == "projected"
    assert kind_of(file, teacher=PRESETS["vit_c16"]) == "projected"
    assert kind_of(file, captions=6) == "projected"
    assert kind_of(file, tokens=40) == "projected"
    assert kind_of(file, precision="fp16") == "projected"
    assert kind_of(file, micro_batch=4) == "projected"
    assert kind_of(file, loss_chunk=4) == "projected"
    assert kind_of(file, compile="blocks") == "projected"
    assert kind_of(a_file(entry(seconds_per_sample=None, low=None, high=None, failure="no"))) == "projected"
    # A predecessor without distillation takes no time.
    assert kind_of(file, distilled=False) == "projected"
    assert kind_of(a_file(entry(teacher=None)), distilled=False) == "measured"


def test_measured_with_the_settings_of_the_plan() -> None:
    for key, value in (("micro_batch", 4), ("loss_chunk", 4), ("compile", "towers")):
        file = a_file(entry(**{key: value}), entry(seconds_per_sample=1.5e-3))
        assert found_in(file, **{key: value}).seconds_per_sample == 2e-3
        assert found_in(file).seconds_per_sample == 1.5e-3


def test_what_counts_is_what_was_computed() -> None:
    file = a_file(entry(tokens=25.0, computed_tokens=30.0))
    assert kind_of(file) == "measured"
    assert kind_of(file, tokens=25.0) == "projected"
    # Captions of one bucket have a whole number of tokens, which is off by a half at most.
    file = a_file(entry(tokens=7.4, computed_tokens=7.0))
    assert kind_of(file, tokens=7.4) == kind_of(file, tokens=7.5) == "measured"
    assert kind_of(file, tokens=7.6) == "projected"


def test_another_batch_is_said() -> None:
    file = a_file(entry())
    found = found_in(file, batch=1280)
    assert found.kind == "measured"
    assert found.source == "NVIDIA H200, 2026-01-02 (measured at batch 8; this plan has 1,280 per GPU)"
    buckets = found_in(file, text_buckets=4).source
    assert buckets.endswith(" (measured at 1 text buckets; this plan has 4 text buckets)")
    # Of several the very batch, or the nearest.
    file = a_file(entry(), entry(batch=64, seconds_per_sample=1.5e-3), entry(batch=256, seconds_per_sample=1.2e-3))
    assert found_in(file, batch=64).seconds_per_sample == 1.5e-3
    assert found_in(file, batch=160).seconds_per_sample == 1.2e-3
    assert found_in(file, batch=100).seconds_per_sample == 1.5e-3
    both = a_file(entry(), entry(text_buckets=4, seconds_per_sample=1.5e-3))
    assert found_in(both, text_buckets=4).seconds_per_sample == 1.5e-3


def test_conditions_are_those_of_a_process(root: Path) -> None:
    changes = ["engine.micro_batch=64", "engine.loss_chunk=128", "engine.compile=true", "data.caption_tokens=20"]
    recipe = load_recipe(root / "recipes" / "cc3m_vit.yaml", changes)
    assert Conditions.of(recipe, 4, "vit_t16") == Conditions(4, 20.0, "bf16", 256, 64, 128, "blocks", 4)
    assert Conditions.of(recipe, 8, "vit_t16") == Conditions(4, 20.0, "bf16", 128, 64, None, "blocks", 4)
    assert Conditions.of(recipe, 16, "vit_t16") == Conditions(4, 20.0, "bf16", 64, None, None, "blocks", 4)
    own = load_recipe(
        root / "recipes" / "cc3m_vit.yaml",
        ["chain.links.1.engine={name: fsdp2, recompute: true, micro_batch: 32}", "engine.text_buckets=1"],
    )
    model = own.chain.links[1].model
    found = Conditions.of(own, 8, model)
    assert (found.engine, found.recompute, found.micro_batch) == ("fsdp2", True, 32)
    assert Conditions.of(own, 8, own.chain.links[0].model).engine == "ddp"


def test_published_accounting_is_measured_with_its_own_captions() -> None:
    cost = paper_cost(S, T, samples=1, steps=1)
    for captions, tokens, kind in ((6, 77.0, "measured"), (4, 77.0, "projected"), (6, 30.0, "projected")):
        file = a_file(entry(captions=captions, tokens=tokens))
        found = speed(S, T, cost, DEVICES["h200"], Conditions(captions, tokens, batch=8), file)
        assert found.kind == kind


def test_a_projection_names_its_device() -> None:
    cost = paper_cost(L, None, samples=1, steps=1)
    found = speed(L, None, cost, PAPER_DEVICE, Conditions())
    row = next(row for row in published_times() if row.family == "cc3m_vit" and row.model == "vit_l16")
    assert found.kind == "projected"
    assert found.source == "for A100 80 GB from the A100 hours of the paper's Table 2"
    assert found.low < row.seconds_per_sample < found.high


def write(path: Path, file: Throughput) -> Path:
    path.write_text(json.dumps(file.model_dump(mode="json")))
    return path


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    file = a_file(entry(), entry(teacher=None, seconds_per_sample=None, low=None, high=None, failure="does not fit"))
    path = write(tmp_path / "t.json", file)
    assert Throughput.read(path) == Throughput.read(path, DEVICES["h200"]) == file


def test_a_file_of_another_device_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", a_file())
    with pytest.raises(ConfigError, match=r"t\.json was measured on NVIDIA H200, not on A100 80 GB \(a100-80\)"):
        Throughput.read(path, DEVICES["a100-80"])
    path = write(tmp_path / "cpu.json", a_file(device="A CPU", kind=None))
    with pytest.raises(ConfigError, match="measured on A CPU, not on H200"):
        Throughput.read(path, DEVICES["h200"])


def _changed(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        place = values["entries"][0] if key in values["entries"][0] else values
        if value is ...:
            del place[key]
        else:
            place[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": ...}, "device: Field required"),
        ({"format": 2}, "format = 2: should be 1"),
        ({"captions": 0}, r"entries\.0\.captions = 0: should be greater than or equal to 1"),
        ({"seconds_per_sample": -1.0}, r"entries\.0\.seconds_per_sample = -1\.0: should be greater than 0"),
        ({"seconds_per_sample": "fast"}, r"seconds_per_sample = 'fast': should be a valid number"),
        ({"seconds_per_sample": math.inf}, r"entries\.0\.seconds_per_sample = .* a finite number"),
        ({"high": math.nan}, r"entries\.0\.high = .* a finite number"),
        ({"low": 2.5e-3}, r"entries\.0: low, seconds_per_sample and high have to be in this order"),
        ({"high": 1.5e-3}, r"entries\.0: low, seconds_per_sample and high have to be in this order"),
        ({"batch": None}, r"entries\.0: batch is missing beside seconds_per_sample"),
        ({"kind": "v100"}, r"kind = \'v100\': should be null or one of a100-40, a100-80, h100, h200"),
        ({"wings": 2}, "wings = 2: Extra inputs are not permitted"),
        ({"student": {}}, "entries.0.student"),
        ({"student": {**T.to_dict(), "width": 190}}, "width 190 is not 3 x 64"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = write(tmp_path / "t.json", a_file(entry()))
    _changed(path, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        Throughput.read(path)
    assert str(error.value).startswith(f"{path} is not a throughput file")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "device": "NVI', "[]", "\x00\x01"])
def test_a_torn_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not a throughput file"):
        Throughput.read(path)
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json: No such file"):
        Throughput.read(tmp_path / "none.json")


@pytest.mark.parametrize("name", list(TABLE_2))
def test_the_published_table_comes_back(root: Path, name: str) -> None:
    plan = make_plan(load_recipe(root / "recipes" / f"{name}.yaml", []))
    rows, paper = family_hours(plan, "paper", DEVICES["a100-80"]), published_rows(plan)
    table = TABLE_2[name]
    for at, (row, published) in enumerate(zip(rows, paper, strict=True)):
        assert published["individual_hours"] == pytest.approx(100 * table.baseline[at].hours)
        assert published["chain_accumulated_hours"] == pytest.approx(100 * table.chain[at].accumulated_hours)
        assert row.individual is not None
        assert row.individual.kind == "projected"
        assert row.individual.gpu_hours == pytest.approx(
            published["individual_hours"] * (1 + published["individual_error"]), rel=1e-9
        )
        assert row.chain_accumulated is not None
        assert row.chain_accumulated.gpu_hours == pytest.approx(published["chain_accumulated_hours"], rel=0.1)
        assert row.accumulated_speedup == pytest.approx(published["accumulated_speedup"], rel=0.06)
    assert sum(row.individual.gpu_hours for row in rows) == pytest.approx(rows[-1].individual_accumulated.gpu_hours)


def test_other_chains_have_no_published_rows(root: Path) -> None:
    recipe = root / "recipes" / "cc3m_vit.yaml"
    assert published_rows(make_plan(load_recipe(root / "recipes" / "cc3m_vit_3.yaml", []))) == []
    assert published_rows(make_plan(load_recipe(recipe, ["data.images=3000000"]))) == []


def test_sums_say_what_their_terms_are(root: Path) -> None:
    plan = make_plan(load_recipe(root / "recipes" / "cc3m_vit.yaml", []), world_size=4)
    as_planned = {"tokens": 77.0, "batch": 256, "text_buckets": 4}
    file = a_file(entry(student=T, teacher=None, **as_planned), entry(**as_planned))
    first, second, third, _ = family_hours(plan, "exact", DEVICES["h200"], file, 4)
    assert first.chain.kind == first.individual.kind == second.chain_accumulated.kind == "measured"
    assert second.individual.kind == "projected"
    assert second.individual_accumulated.kind == third.chain_accumulated.kind == "measured and projected"
    assert first.chain.gpu_hours == pytest.approx(2e-3 * plan.links[0].samples / 3600)
    assert (first.chain.low, first.chain.high) == pytest.approx(
        (first.chain.gpu_hours / 2, first.chain.gpu_hours * 1.5)
    )
    for end in ("low", "gpu_hours", "high", "wall_hours"):
        terms = (first.chain, second.chain, third.chain)
        assert getattr(third.chain_accumulated, end) == pytest.approx(sum(getattr(term, end) for term in terms))
    assert third.chain_accumulated.wall_hours == pytest.approx(third.chain_accumulated.gpu_hours / 4)
    assert first.chain.sources == ("measured NVIDIA H200, 2026-01-02",)
    assert [source.partition(" ")[0] for source in third.chain_accumulated.sources] == ["measured", "projected"]
    # Where nothing is known of the device, nothing is projected.
    first, second, third, _ = family_hours(plan, "exact", None, file, 4)
    assert first.speedup == 1.0
    assert second.chain_accumulated is not None
    assert (second.individual, second.individual_accumulated, second.speedup, third.chain) == (None, None, None, None)
