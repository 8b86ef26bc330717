"""Run folders of compt at commit 0fef4a8: stopped runs resume as if nothing had happened, and all can be reported.

tests/fixtures/make_runs.py made them, and says how.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from compt.cli.main import app
from compt.train.metrics import read_metrics
from tests.dist.spawn import run_ranks
from tests.helpers.recipe import TIMES, largest_difference

RUNS = Path(__file__).resolve().parents[2] / "fixtures" / "runs"
EXPECTED: dict[str, Any] = json.loads((RUNS / "expected.json").read_text())
ENGINES = tuple(EXPECTED["runs"])
FIRST, SECOND = "1-small", "2-large"
STEPS, STOPPED_AT = 8, 5
PADDED = ("--set", "engine.text=padded")
"""How captions were computed when these runs were made. Packed text differs in the last bits."""
KINDS = ("model", "model/ema")

TOLERANCE = 1e-5
LATER_CAUSES = ("empty", "missing", "not_text", "encoding")
"""Causes of captions left out that lines of metrics did not have then."""
"""Of weights on another kind of processor than the one they were first computed on, where sums round otherwise."""


def unpack(target: Path, *names: str) -> Path:
    """The folder in which the commands run: the recipe, and the contents of the archives."""
    shutil.copy(RUNS / "recipe.yaml", target)
    for name in names:
        with tarfile.open(RUNS / f"{name}.tar.gz") as archive:
            archive.extractall(target, filter="data")
    return target


def compt(base: Path, *words: str) -> str:
    """The output of a command. Raises its errors."""
    before = Path.cwd()
    os.chdir(base)
    try:
        done = CliRunner().invoke(app, list(words), env={"COLUMNS": "160"})
    finally:
        os.chdir(before)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def resume(base: Path, engine: str) -> str:
    return compt(base, "chain", "recipe.yaml", "--set", f"engine.name={engine}", *PADDED, "--run-folder", engine)


def job_manifest(run: Path, job: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "jobs" / job / "manifest.json").read_text())
    return values


def weights(run: Path, kind: str) -> dict[str, Tensor]:
    (file,) = (run / "jobs" / SECOND / kind).glob("*.safetensors")
    return load_file(file)


def hash_of(tensors: dict[str, Tensor]) -> str:
    """As make_runs.py computes it."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def last_line(run: Path, kind: str) -> dict[str, Any]:
    row = read_metrics(run / "jobs" / SECOND / "metrics.jsonl", kind)[-1]
    # The rest does not depend on the machine.
    return {key: value for key, value in row.items() if key not in TIMES}


def same_machine() -> bool:
    """Whether torch gives the same bits here as on the machine that made the runs."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = hashlib.sha256(" ".join(sorted(facts.get("flags", "").split())).encode()).hexdigest()[:16]
    here = {"torch": torch.__version__, "cpu": facts.get("model name", ""), "flags": flags}
    return here == EXPECTED["computed_on"] and torch.get_num_threads() == 1


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stopped_run_goes_on_as_if_it_had_never_been_stopped(engine: str, tmp_path: Path) -> None:
    wanted = EXPECTED["runs"][engine]
    base = unpack(tmp_path, "data", engine, "finished")
    run = base / engine
    metrics = run / "jobs" / SECOND / "metrics.jsonl"
    logged, first = metrics.read_text(), files_of(run / "jobs" / FIRST / "model")
    assert [row["step"] for row in read_metrics(metrics, "train")] == list(range(1, STOPPED_AT + 1))
    if wanted["processes"] == 1:
        said = resume(base, engine)
    else:
        said = run_ranks(resume, wanted["processes"], base, engine, timeout=240)[0]
    assert f"{engine}: 1 of 2 models are done; continuing with {SECOND}." in said

    # The lines from before the stop are still there, with their times: these steps were not repeated.
    assert metrics.read_text().startswith(logged)
    assert [row["step"] for row in read_metrics(metrics, "train")] == list(range(1, STEPS + 1))
    assert files_of(run / "jobs" / FIRST / "model") == first

    manifest = job_manifest(run, SECOND)
    assert manifest["state"] == "done"
    assert [start["engine"] for start in manifest["starts"]] == [engine] * 2
    assert [start["processes"] for start in manifest["starts"]] == [wanted["processes"]] * 2
    assert (manifest["trained"]["steps"], manifest["trained"]["moments_anew"]) == (STEPS, [])

    # Without a stop the result is the same under every engine, up to rounding; `finished` was made under ddp.
    for kind in KINDS:
        found = weights(run, kind)
        assert largest_difference(found, weights(base / "finished", kind)) < TOLERANCE
        assert hash_of(found) == wanted["weights"][kind] or not same_machine()
    for kind in ("train", "eval"):
        here, there = last_line(run, kind), dict(wanted[f"last_{kind}"])
        assert here.pop("kind") == there.pop("kind") == kind
        for cause in LATER_CAUSES if kind == "train" else ():
            assert here.pop(f"skipped_{cause}") == 0
        if kind == "train":
            # The former version counted every caption as long as the context.
            assert there.pop("macs") > here.pop("macs") == pytest.approx(manifest["cost"]["total_macs"])
        assert here == (there if same_machine() else pytest.approx(there, rel=5e-4, abs=2e-6))
    scores = dict(manifest["scores"]["held_out"])
    assert scores.pop("account")["unused"] == {}
    scores.pop("scored_by", None)  # later versions have both
    low, high = scores.pop("mean_per_class_interval")
    assert low <= scores["mean_per_class"] <= high
    assert scores == wanted["scores"]
    assert "2 of 2 models trained" in (run / "report.md").read_text()


def test_a_stopped_run_is_reported_on(tmp_path: Path) -> None:
    base = unpack(tmp_path, "ddp")
    compt(base, "report", "ddp")
    page = (base / "ddp" / "report.md").read_text()
    assert "1 of 2 models trained" in page
    assert f"{SECOND}: training, step {STOPPED_AT} of {STEPS}" in page


def numbers(page: str) -> Counter[str]:
    """Every number of a report but the date and versions of its last line. Tables may be laid out in another way."""
    body, _, _ = page.rpartition("Written ")
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", body.replace("**", "")))


def test_a_finished_run_is_reported_on_as_it_was(tmp_path: Path) -> None:
    base = unpack(tmp_path, "finished")
    page = base / "finished" / "report.md"
    before = numbers(page.read_text())
    page.unlink()
    compt(base, "report", "finished")
    after = numbers(page.read_text())
    assert before.total() > 100
    assert [number for number in before - after if len(number) > 1] == [], "a digit alone may be a count in a text"
