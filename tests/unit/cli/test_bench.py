"""`compt bench`: runs on small models, and its tables agree with the paper."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from compt.bench import throughput
from compt.cli import bench as bench_command
from compt.cli.main import app
from compt.cli.options import read_tokens
from compt.cost.gpus import DEVICES
from compt.cost.paper import TABLE_2
from compt.cost.speed import Measurement, Throughput
from compt.dist import child
from compt.errors import ConfigError
from compt.models.presets import PRESETS
from tests.helpers.process import KILLED, die, ended, finish, start

PICO, NANO = PRESETS["vit_pico"], PRESETS["vit_nano"]
QUICK = [
    "--captions",
    "2",
    "--tokens",
    "6",
    "--max-batch",
    "2",
    "--seconds",
    "0",
    "--device",
    "cpu",
    "--precision",
    "fp32",
]


def compt(*words: str, width: int = 120) -> str:
    done = CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["bench", *words])
    if done.exception is not None:
        raise done.exception
    return done.stdout


def hours(root: Path, name: str, *words: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(compt("gpu-hours", str(root / "recipes" / f"{name}.yaml"), "--json", *words))
    return made


@pytest.mark.parametrize("name", list(TABLE_2))
def test_gpu_hours_stand_beside_the_papers(root: Path, name: str) -> None:
    made = hours(root, name, "--mode", "paper")
    table = TABLE_2[name]
    assert (made["recipe"], made["device"], made["kind"], made["gpus"]) == (name, "A100 80 GB", "a100-80", 8)
    for at, row in enumerate(made["rows"]):
        paper = made["paper"][at]
        assert row["model"] == paper["model"] == table.models[at]
        assert row["individual"]["kind"] == row["chain_accumulated"]["kind"] == "projected"
        assert row["individual"]["low"] < 100 * table.baseline[at].hours < row["individual"]["high"]
        assert row["chain"]["low"] < 100 * table.chain[at].hours < row["chain"]["high"]
        assert row["accumulated_speedup"] == pytest.approx(table.speedup[at].accumulated_hours, rel=0.06)
        assert (paper["speedup"], paper["chain_hours"]) == (table.speedup[at].hours, 100 * table.chain[at].hours)


def test_hardware_changes_hours_and_says_so(root: Path) -> None:
    recipe = str(root / "recipes" / "cc3m_vit.yaml")
    by_kind = {kind: hours(root, "cc3m_vit", "--kind", kind) for kind in ("a100-40", "a100", "h100", "h200")}
    totals = [made["rows"][-1]["chain_accumulated"]["gpu_hours"] for made in by_kind.values()]
    assert totals == sorted(totals, reverse=True)
    assert by_kind["h100"]["device"] == "H100 80 GB SXM"
    text = compt("gpu-hours", recipe, "--kind", "h100", "--gpus", "8", width=80)
    assert "on H100 80 GB SXM, mode 'exact'" in text
    assert len(re.findall(r" projected( +[\d.]+ h)? *$", text, re.MULTILINE)) == 4 * 4
    assert "The paper's A100 hours (Table 2)" in text
    walls = re.findall(r"projected +([\d.]+) h *$", text[text.index("On 8 GPUs") :], re.MULTILINE)
    eight = hours(root, "cc3m_vit", "--kind", "h100", "--gpus", "8")
    assert [row["chain_accumulated"]["wall_hours"] for row in eight["rows"]] == pytest.approx(
        [row["chain_accumulated"]["gpu_hours"] / 8 for row in by_kind["h100"]["rows"]]
    )
    accumulated = [row["chain_accumulated"]["gpu_hours"] for row in by_kind["h100"]["rows"]]
    assert [float(wall) for wall in walls] == pytest.approx([hours / 8 for hours in accumulated], abs=0.006)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(root: Path, width: int) -> None:
    for name in ("merged15m_vit", "emoji"):
        text = compt("gpu-hours", str(root / "recipes" / f"{name}.yaml"), "--gpus", "8", width=width)
        assert max(map(len, text.splitlines())) <= width


def test_gpu_hours_need_no_torch(root: Path) -> None:
    code = (
        "import sys; from compt.cli.main import app\n"
        "try: app(['bench', 'gpu-hours', 'recipes/cc3m_vit.yaml'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'open_clip', 'timm', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def entry(student: str, teacher: str | None, seconds: float) -> Measurement:
    return Measurement(
        student=PRESETS[student],
        teacher=PRESETS[teacher] if teacher else None,
        captions=4,
        tokens=77,
        batch=128,
        text_buckets=4,
        repeats=3,
        seconds_per_sample=seconds,
        low=seconds,
        high=seconds,
    )


def file_of(path: Path, kind: str | None, *entries: Measurement) -> Path:
    header = {"precision": "bf16", "seed": 0, "date": "2026-01-02T03:04:05Z", "command": "", "versions": {}}
    made = Throughput(device="A machine", kind=kind, entries=entries, **header)
    path.write_text(made.model_dump_json())
    return path


def test_measured_hours_by_hand(root: Path, tmp_path: Path) -> None:
    file = file_of(tmp_path / "t.json", "h200", entry("vit_t16", None, 1e-3), entry("vit_s16", "vit_t16", 2e-3))
    made = hours(root, "cc3m_vit", "--throughput", str(file))
    assert (made["device"], made["kind"]) == ("H200 141 GB SXM", "h200")
    first, second, third, _ = made["rows"]
    seen = 1024 * (2_753_427 // 1024)  # of each epoch, in whole batches
    assert first["chain"] == first["individual"]
    assert (first["chain"]["kind"], first["chain"]["sources"]) == ("measured", ["measured A machine, 2026-01-02"])
    assert first["chain"]["wall_hours"] == pytest.approx(first["chain"]["gpu_hours"] / 8)
    assert first["chain"]["gpu_hours"] == pytest.approx(128 * seen * 1e-3 / 3600)
    assert second["chain_accumulated"]["gpu_hours"] == pytest.approx(seen * (128 * 1e-3 + 24 * 2e-3) / 3600)
    assert second["chain_accumulated"]["kind"] == "measured"
    assert [second["individual"]["kind"], third["chain"]["kind"]] == ["projected"] * 2
    text = compt("gpu-hours", str(root / "recipes" / "cc3m_vit.yaml"), "--throughput", str(file), width=80)
    rows = [line for line in text.splitlines() if re.search(r" (baseline|chain) ", line)]
    bases = [re.search(r"(part projected|measured|projected) *([\d.,]+ h)? *$", row) for row in rows[:16]]
    assert [
        sum(found[1] == kind for found in bases if found) for kind in ("measured", "part projected", "projected")
    ] == [
        6,
        5,
        5,
    ]
    flat = " ".join(text.split())
    assert "Hours are measured A machine, 2026-01-02; projected for H200" in flat
    assert "of the authors' program, host and loaders included; this one may be faster or slower" in flat
    assert "has no measurement in bf16 with 4 captions of the whole context of vit_b16, vit_l16, vit_s16 alone" in flat


def test_what_the_file_does_not_have_is_said(root: Path, tmp_path: Path) -> None:
    file = str(file_of(tmp_path / "t.json", "h200", entry("vit_t16", None, 1e-3), entry("vit_s16", "vit_t16", 2e-3)))
    recipe = str(root / "recipes" / "cc3m_vit.yaml")

    def told(*words: str) -> str:
        return " ".join(compt("gpu-hours", recipe, "--throughput", file, *words).split())

    assert "Hours are measured A machine, 2026-01-02;" in told()
    assert "2026-01-02 (measured at batch 128; this plan has 256 per GPU);" in told("--gpus", "4")
    assert "(measured at 4 text buckets; this plan has 2 text buckets)" in told("--set", "engine.text_buckets=2")
    for change, said in (
        ("optimizer.precision=fp16", "The throughput file, which is of bf16, has no measurement in fp16 with 4"),
        (
            "engine.micro_batch=32",
            "in bf16 with 4 captions of the whole context, micro-batches of 32 of vit_t16,",
        ),
        ("engine.loss_chunk=32", "captions of the whole context, chunks of the loss of 32 of vit_t16,"),
        ("engine.recompute=true", "captions of the whole context, recomputed blocks of vit_t16,"),
        ("engine.name=zero2", "captions of the whole context, the engine zero2 of vit_t16,"),
        ("engine.compile=true", "captions of the whole context, compiled blocks of vit_t16,"),
        ("data.caption_tokens=20", "in bf16 with 4 captions of 20 tokens of vit_t16,"),
    ):
        text = told("--set", change)
        assert said in text, change
        assert " measured " not in text, change
    assert "in bf16 with 6 captions of 77 tokens of vit_t16," in told("--mode", "paper")


@pytest.mark.parametrize("gpus", ["1", "4", "8"])
def test_gpu_hours_are_those_of_the_plan(root: Path, gpus: str) -> None:
    words = ["--gpus", gpus, "--set", "engine.micro_batch=128", "--set", "engine.loss_chunk=256"]
    accumulated = hours(root, "cc3m_vit", *words)["rows"][-1]["chain_accumulated"]
    recipe = str(root / "recipes" / "cc3m_vit.yaml")
    done = CliRunner().invoke(app, ["plan", recipe, "--json", *words])
    total = json.loads(done.stdout)["totals"]["chain"]["hours"]
    assert accumulated == total


def test_a_device_without_a_peak_has_only_measurements(root: Path, tmp_path: Path) -> None:
    file = str(file_of(tmp_path / "t.json", None, entry("vit_t16", None, 1e-3)))
    recipe = str(root / "recipes" / "cc3m_vit.yaml")
    text = compt("gpu-hours", recipe, "--throughput", file, width=80)
    assert "on A machine" in text
    assert "measure with --family" in " ".join(text.split())
    assert not re.search(r" projected( +[\d.]+ h)? *$", text, re.MULTILINE)
    made = hours(root, "cc3m_vit", "--throughput", file)
    assert made["kind"] is None
    assert [row["chain"] is None for row in made["rows"]] == [False, True, True, True]
    with pytest.raises(ConfigError, match=r"measured on A machine, not on H100 80 GB SXM \(h100\)"):
        compt("gpu-hours", recipe, "--throughput", file, "--kind", "h100")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu-hours", "{recipe}", "--throughput", "none.json"], "--throughput: cannot read none.json"),
        (
            ["gpu-hours", "{recipe}", "--gpus", "3"],
            r"cc3m_vit\.yaml: optimizer\.batch 1024 cannot be shared evenly by 3 processes; 2 or 4 can share it",
        ),
        (["gpu-hours", "{recipe}", "--gpus", "5000"], "--gpus 5000: should be from 1 to the 1024"),
        (["gpu-hours", "{recipe}", "--gpus", "0"], "--gpus 0: should be from 1 to the 1024"),
        (["profile", "{recipe}", "--link", "5"], r"--link 5: the chain of .*cc3m_vit\.yaml has 4 links"),
        (["profile", "{recipe}", "--out", "nowhere/t.json"], "--out nowhere/t.json: there is no folder nowhere"),
        (["profile", "{recipe}", "--out", "."], "--out .: is a folder; name the file to write"),
        (["throughput", "--family", "{recipe}", "--gpus", "3"], "cannot be shared evenly by 3 processes"),
        (["throughput", "--family", "{recipe}", "--gpus", "2", "--batch", "8"], "--gpus 2: needs --family"),
        (["throughput", "vit_pico", "--gpus", "2"], "--gpus 2: needs --family"),
        (
            ["throughput", "vit_pico", "--tokens", "{{7: 0.8}}"],
            r"--tokens \{7: 0\.8\}: should be a length, lengths",
        ),
        (["throughput", "vit_pico", "--tokens", "7:1,7:2"], "--tokens 7:1,7:2: a length occurs twice"),
        (["throughput", "vit_l"], r"unknown model 'vit_l' \(did you mean"),
        (
            ["throughput", "vit_c16", "--family", "{recipe}"],
            r"cc3m_vit\.yaml: no link 'vit_c16' .* has vit_t16, vit_s16",
        ),
        (["throughput", "vit_pico", "--captions", "4,x"], "--captions 4,x: should be numbers from 1, as in 4,6"),
        (["throughput", "vit_pico", "--captions", "0"], "--captions 0"),
        (["throughput", "vit_pico", "--tokens", "20:0.7,40"], "--tokens 20:0.7,40: should be a length"),
        (["throughput", "vit_pico", "--tokens", "-3"], "--tokens -3: should be a length"),
        (["throughput", "vit_pico", "--batch", "0"], "--batch 0: should be auto or a number from 1"),
        (["throughput", "vit_pico", "--device", "tpu"], "device 'tpu' is not supported"),
    ],
)
def test_bad_options_get_one_clear_error(root: Path, words: list[str], message: str) -> None:
    recipe = str(root / "recipes" / "cc3m_vit.yaml")
    with pytest.raises(ConfigError, match=message) as error:
        compt(*(word.format(recipe=recipe) for word in words))
    assert "\n" not in str(error.value)


def test_the_chains_are_those_of_the_presets() -> None:
    assert [name for chain in bench_command.CHAINS for name in chain] != []
    assert {name for chain in bench_command.CHAINS for name in chain} == set(PRESETS)
    pairs = [(spec.name, teacher and teacher.name) for spec, teacher in bench_command._jobs([], None).pairs]
    assert len(pairs) == len(PRESETS)
    assert {("vit_t16", None), ("vit_s16", "vit_c16"), ("vit_l16", "vit_xb16"), ("swin_l", "swin_b")} <= set(pairs)


def test_a_recipe_is_measured_as_it_trains(root: Path) -> None:
    jobs = bench_command._jobs(["vit_b16"], root / "recipes" / "cc3m_vit.yaml")
    recipe = jobs.recipe
    assert recipe is not None
    assert bench_command._captions(None, recipe) == [4, 6]
    assert bench_command._captions(
        None, recipe.model_copy(update={"data": recipe.data.model_copy(update={"captions": 6})})
    ) == [6]
    assert read_tokens("context") is None
    assert read_tokens("20:0.7,40:0.3") == {20: 0.7, 40: 0.3}
    setups = bench_command._setups(jobs, [4, 6], None, "bf16", {}, 0)
    assert [(setup.student.name, setup.teacher and setup.teacher.name, setup.captions) for setup in setups] == [
        ("vit_b16", None, 4),
        ("vit_b16", None, 6),
        ("vit_b16", "vit_s16", 4),
        ("vit_b16", "vit_s16", 6),
    ]
    assert {setup.engine.text_buckets for setup in setups} == {recipe.engine.text_buckets}
    for device, gpus, batch in (("cuda", None, 128), ("cuda", 4, 256), ("cpu", None, 1024), ("cpu", 2, 512)):
        assert bench_command._batch(None, gpus, jobs, "r.yaml", device) == batch
    assert bench_command._batch("auto", None, jobs, "r.yaml", "cuda") is None
    assert bench_command._batch("9", None, jobs, "r.yaml", "cuda") == 9
    assert bench_command._batch(None, None, bench_command._jobs([], None), "", "cuda") is None
    setups = bench_command._setups(jobs, [4], None, None, {"name": "zero2", "recompute": True}, 0)
    assert {(setup.engine.name, setup.engine.recompute) for setup in setups} == {("zero2", True)}


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        (
            {"compile": "towers"},
            ["--engine", "fsdp2"],
            "--engine fsdp2: does not go with the recipe's engine of vit_b16: compile: fsdp2 gathers weights block by",
        ),
        (
            {"graphs": "on", "text": "packed"},
            ["--recompute"],
            "--recompute: does not go with the recipe's engine of vit_b16: graphs: on captures CUDA graphs",
        ),
        (
            {"compile": "towers", "compile_mode": "reduce-overhead", "text": "packed"},
            ["--compile", "--engine", "zero3"],
            "--engine zero3 --compile: does not go with the recipe's engine of vit_b16: compile_mode: 'reduce",
        ),
    ],
)
def test_an_option_that_does_not_go_with_the_recipe_is_refused(
    tmp_path: Path, root: Path, own: dict[str, Any], options: list[str], message: str
) -> None:
    values = yaml.safe_load((root / "recipes" / "cc3m_vit.yaml").read_text(encoding="utf-8"))
    values["chain"]["links"][2]["engine"] = own
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    words = ["throughput", "--family", str(tmp_path / "r.yaml"), "--device", "cpu", *options]
    with pytest.raises(ConfigError) as error:
        compt(*words, "--out", str(tmp_path / "t.json"))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "threads", "grown"), [(None, 2, True), (None, None, False), ("h200", None, False)])
def test_only_a_cpu_s_memory_is_what_the_process_grew_by(kind: str | None, threads: int | None, grown: bool) -> None:
    header = {"precision": "bf16", "seed": 0, "date": "2026-01-02T03:04:05Z", "command": "", "versions": {}}
    made = Throughput(device="A machine", kind=kind, threads=threads, **header)
    notes = " ".join(bench_command._throughput_table(made, [], False, 8).notes)
    assert ("GiB is what the process grew by" in notes) is grown
    assert ("No MFU" in notes) is (kind is None)


def test_each_link_is_measured_with_its_own_engine(tmp_path: Path, root: Path) -> None:
    values = yaml.safe_load((root / "recipes" / "cc3m_vit.yaml").read_text(encoding="utf-8"))
    own = {"name": "fsdp2", "recompute": True, "micro_batch": 32, "text_buckets": 2}
    values["chain"]["links"][1]["engine"] = own
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    setups = bench_command._setups(bench_command._jobs([], tmp_path / "r.yaml"), [4], None, None, {}, 0)
    for setup in setups:
        engine = setup.engine
        found = (engine.name, engine.recompute, engine.micro_batch, engine.text_buckets)
        other = ("ddp", False, None, values["engine"]["text_buckets"])
        assert found == (tuple(own.values()) if setup.student.name == "vit_s16" else other)
    file = str(file_of(tmp_path / "t.json", "h200", entry("vit_t16", None, 1e-3), entry("vit_s16", "vit_t16", 2e-3)))
    told = " ".join(compt("gpu-hours", str(tmp_path / "r.yaml"), "--throughput", file).split())
    lacking = "micro-batches of 32, recomputed blocks, the engine fsdp2 of vit_s16"
    assert f"no measurement in bf16 with 4 captions of the whole context, {lacking}, vit_s16 alone; nor in bf16" in told


def test_a_plan_takes_what_was_measured_of_its_recipe(tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "t.json"
    link = {"train": {"epochs": 2}, "warmup": {"steps": 1}}
    values = {
        "name": "small",
        "data": {"train": "x.tar", "images": 64, "captions": 2, "caption_tokens": {7: 0.8, 9: 0.2}},
        "family": {"members": ["vit_pico", "vit_nano"]},
        "chain": {"links": [{"model": "vit_pico", **link}, {"model": "vit_nano", **link}]},
        "optimizer": {"batch": 8, "precision": "fp32"},
        "engine": {"micro_batch": 2, "loss_chunk": 2, "text_buckets": 2, "device": "cpu"},
    }
    recipe.write_text(yaml.safe_dump(values))
    words = ["--family", str(recipe), "--gpus", "2", "--captions", "2", "--seconds", "0", "--device", "cpu"]
    compt("throughput", *words, "--out", str(out))
    entries = Throughput.read(out).entries
    assert [(entry.batch, entry.micro_batch, entry.loss_chunk) for entry in entries] == [(4, 2, 2)] * 3
    assert all(entry.computed_tokens == pytest.approx(7.4, abs=0.26) for entry in entries)
    made = json.loads(compt("gpu-hours", str(recipe), "--throughput", str(out), "--gpus", "2", "--json"))
    for row, found in zip(made["rows"], (entries[0], entries[2]), strict=True):
        assert row["chain"]["sources"] == [f"measured {made['device']}, {Throughput.read(out).date[:10]}"]
        assert row["chain"]["gpu_hours"] == pytest.approx(2 * 64 * found.seconds_per_sample / 3600)


def test_a_profile_shows_every_part_of_a_step_and_writes_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "t.json"
    link = {"train": {"epochs": 2}, "warmup": {"steps": 1}}
    values = {
        "name": "small",
        "data": {"train": "x.tar", "images": 64, "captions": 2, "caption_tokens": 6},
        "family": {"members": ["vit_pico", "vit_nano"]},
        "chain": {"links": [{"model": "vit_pico", **link}, {"model": "vit_nano", **link}]},
        "optimizer": {"batch": 8, "precision": "fp32"},
    }
    recipe.write_text(yaml.safe_dump(values))
    text = compt("profile", str(recipe), "--link", "2", "--batch", "4", "--device", "cpu", "--out", str(out))
    assert "A step of vit_nano with vit_pico, 4 images, fp32, on cpu" in text
    rows = dict(re.findall(r"^(\w+) +([\d,]+) +[\d,.]+ +\d+$", text, re.MULTILINE))
    assert list(rows) == ["input", "teacher", "forward", "loss", "backward", "optimizer", "step"]
    counts = [int(count.replace(",", "")) for count in rows.values()]
    assert sum(counts[:-1]) == counts[-1]
    assert "aten::mm" in text
    events = json.loads(out.read_text())["traceEvents"]
    found = {event["name"]: event["dur"] for event in events if event.get("ph") == "X"}
    assert found["compt backward"] > 0
    assert found.keys() >= {"compt teacher", "compt forward", "compt loss", "compt optimizer", "aten::addmm"}
    out.unlink()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = compt("profile", str(recipe), "--link", "2", "--device", "cuda", "--out", str(out))
    assert "4 images" not in text
    assert re.search(r"^step +\d+ +- +-", text, re.MULTILINE)
    assert not out.exists()


def measure_until_killed(words: Sequence[str], told: Path) -> None:
    """The command, killed while it waits for its second measurement; writes the pid of the process that measures."""
    child.METHOD = "fork"
    started: list[int] = []

    def start_child(*arguments: Any) -> Any:
        process, receiver = child.start_child(*arguments)
        started.append(process.pid)
        if len(started) == 2:
            told.write_text(str(process.pid))
            die()
        return process, receiver

    throughput.start_child = start_child  # type: ignore[attr-defined]
    compt(*words)


def test_throughput_is_measured_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    words = ["throughput", "vit_pico", "vit_nano", *QUICK, "--out", str(out)]
    assert finish(start(measure_until_killed, words, tmp_path / "pid")) == KILLED
    assert ended([int((tmp_path / "pid").read_text())]), "the process that measured outlives the command"
    before = Throughput.read(out)
    assert len(before.entries) == 1
    text = compt(*words)
    assert text.count("from an earlier run") == 1
    made = Throughput.read(out)
    assert made.entries[:1] == before.entries
    jobs = [(entry.student, entry.teacher, entry.captions, entry.tokens, entry.batch) for entry in made.entries]
    assert jobs == [(PICO, None, 2, 6.0, 2), (NANO, None, 2, 6.0, 2), (NANO, PICO, 2, 6.0, 2)]
    for entry in made.entries:
        assert entry.failure is None
        assert entry.mfu is None
        assert 0 < entry.low <= entry.seconds_per_sample <= entry.high
    assert made.kind is None
    assert "No MFU: the peak of this device is not known" in text
    again = compt(*words, "--recompute")
    assert again.count("6, recomputed, batch 2") == 3
    assert "from an earlier run" not in again
    assert [entry.recompute for entry in Throughput.read(out).entries] == [False] * 3 + [True] * 3
    assert "2 at most" in text
    table = compt(*words, width=60).split("Throughput of")[1].split("Wrote ")[0]
    assert max(map(len, table.splitlines())) <= 60


def test_the_document_shows_what_the_command_prints(root: Path) -> None:
    text = (root / "docs" / "hardware.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n\$ compt bench (gpu-hours [^\n]*)\n…\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for command, shown in blocks:
        words = [str(root / word) if word.startswith("recipes/") else word for word in command.split()]
        printed = "\n".join(line.rstrip() for line in compt(*words).splitlines())
        assert shown.strip() in printed, command
    for device in DEVICES.values():
        peaks = rf"{device.peak_flops['bf16'] / 1e12:g} TFLOP/s \| {device.peak_flops['fp32'] / 1e12:g} TFLOP/s"
        sizes = rf"{device.bandwidth_bytes / 1e12:g} TB/s \| {device.memory_bytes / 2**30:.2f} GiB"
        assert re.search(rf"\| `{device.name}`.* \| {peaks} \| {sizes} \|", text), device.name


def ignores_interrupts(pid: int) -> bool:
    (mask,) = re.findall(r"SigIgn:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


def test_ctrl_c_ends_a_measurement_without_a_trace(tmp_path: Path) -> None:
    words = ["bench", "throughput", "vit_pico", "--batch", "2", "--seconds", "600", "--device", "cpu"]
    words += ["--precision", "fp32", "--out", str(tmp_path / "speeds.json")]
    # What a shell starts in the background ignores SIGINT, and so does what that starts.
    listening = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [sys.executable, "-m", "compt", *words], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        signal.signal(signal.SIGINT, listening)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        # The resource tracker, then the process that measures; it starts without listening to SIGINT.
        while process.poll() is None and (len(children.read_text().split()) < 2 or ignores_interrupts(process.pid)):
            time.sleep(0.05)
        measuring = children.read_text().split()[-1]
        time.sleep(1)  # it is importing torch, or timing
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not Path(f"/proc/{measuring}").exists()
