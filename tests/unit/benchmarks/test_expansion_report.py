"""The study of expansion: what it gathers of what was trained, and what its page says of that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.expansion import report as expansion_report
from benchmarks.expansion import study as expansion
from benchmarks.expansion.collect import collect
from benchmarks.expansion.report import BEGIN, END, README, RESULTS, judge, read_results, scatter, write_report
from benchmarks.expansion.run import STUDY
from benchmarks.expansion.settings import DEPTHS, EMOJI, WIDTHS, Training, Variant
from compt.errors import RunError
from compt.files import write_json
from tests.conftest import ROOT

# Gathering it


LEMON = Variant("lemon", width="lemon")


def write_job(run: Path, training: Training, correct: dict[str, np.ndarray], state: str = "done") -> None:
    """A job's folder as it is when it is finished, of invented numbers."""
    place = run / training.folder / "jobs" / training.job
    scores = {name: {"top1": 100 * float(right.mean()), "n": len(right)} for name, right in correct.items()}
    start_of = {
        "at": "2026-01-02T03:04:05Z",
        "processes": 1,
        "machine": {"device": "abacus", "threads": "2", "torch": "2"},
    }
    manifest = {
        "state": state,
        "hash": "x",
        "result": {},
        "starts": [start_of],
        "finished": "2026-01-02T04:00:00Z",
        "trained": {"device_hours": 0.25},
        "scores": scores,
        "validation_loss": 3.25,
        "parameters": 1000,
        "epochs": 2.0,
        "steps": 8,
        "lr": 2e-3 if training.variant == LEMON else 1e-3,
    }
    write_json(place / "manifest.json", manifest)
    first = {name: {"top1": 1.5} for name in correct}
    write_json(place / "step_0.json", {"validation_loss": 4.5, "scores": first})
    (place / "scores").mkdir()
    for name, right in correct.items():
        np.savez(place / "scores" / f"{name}.npz", ids=np.arange(len(right)), correct=right)
    rows = [
        {"kind": "eval", "step": 4 * k, "epoch": k, "validation_loss": 4.0 - k, "val_style/top1": 10.0 * k}
        for k in (1, 2)
    ]
    rows[0]["validation_loss"] = None  # what was not finite
    lines = [json.dumps(row) for row in ({"kind": "train", "step": 1, "loss": 9.0}, *rows)]
    (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "ev')


def invented_run(run: Path) -> dict[tuple[str, int], np.ndarray]:
    """Width insert, lemon and net2net at two seeds, the last not finished at the second; the answers by variant."""
    write_json(run / STUDY, {"setting": "emoji", "changes": ["optimizer.lr=1e-3"], "started": "2026-01-02T03:04:05Z"})
    generator, pair = np.random.default_rng(0), EMOJI.pairs[0]
    answers = {}
    for seed in (0, 1):
        write_job(run, Training(pair, seed), {name: np.ones(50, bool) for name in ("val_style", "test_style")})
        for at, name in enumerate(("insert", "lemon", "net2net")):
            # Half of the pictures are as easy or as hard for one seed as for the other.
            alike = np.random.default_rng(1 + at).random(200)
            right = np.where(np.arange(200) % 2, alike, generator.random(200)) < 0.3 + 0.2 * at
            answers[name, seed] = right
            variant = next(variant for variant in WIDTHS if variant.name == name)
            state = "training" if (name, seed) == ("net2net", 1) else "done"
            write_job(run, Training(pair, seed, variant), {"val_style": right[:40], "test_style": right}, state)
    return answers


def test_collecting(tmp_path: Path) -> None:
    answers = invented_run(tmp_path)
    results = collect(tmp_path)
    assert results["command"] == "python -m benchmarks.expansion --setting emoji --set 'optimizer.lr=1e-3'"
    assert results["finished"] == "2026-01-02T04:00:00Z"
    assert results["device_hours"] == 0.25 * 7
    assert results["seeds"] == [0, 1]
    assert [machine["device"] for machine in results["machines"]] == ["abacus"]
    names = [(item["variant"], item["seed"]) for item in results["variants"]]
    assert names == [("insert", 0), ("net2net", 0), ("lemon", 0), ("insert", 1), ("lemon", 1)]
    assert "width/net2net-s1" in results["missing"]
    assert "width/lemon-s1" not in results["missing"]
    assert len(results["missing"]) == 2 * (len(WIDTHS) + len(DEPTHS)) - 5
    record = results["variants"][0]
    assert record["curve"] == {"epoch": [0, 1, 2], "validation_loss": [4.5, None, 2.0], "val_style": [1.5, 10.0, 20.0]}
    assert record["step_0"] == {"validation_loss": 4.5, "val_style": 1.5, "test_style": 1.5}
    compared = {(item["variant"], item["set"]): item for item in results["compared"]}
    both = compared["lemon", "test_style"]
    gains = [answers["lemon", seed].mean() - answers["insert", seed].mean() for seed in (0, 1)]
    assert both["seeds"] == [0, 1]
    assert both["by_seed"] == pytest.approx([100 * gain for gain in gains], rel=1e-4)
    assert both["difference"] == pytest.approx(100 * np.mean(gains), rel=1e-4)
    by_picture = np.mean([answers["lemon", seed] * 1.0 - answers["insert", seed] for seed in (0, 1)], axis=0)
    error = 100 * by_picture.std() / math.sqrt(len(by_picture))
    assert both["high"] - both["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert compared["net2net", "test_style"]["seeds"] == [0]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_collecting_from_damaged_folders(tmp_path: Path) -> None:
    invented_run(tmp_path)
    job = tmp_path / "width/insert-s0/jobs/1-student"
    other = np.arange(200)[::-1]
    np.savez(job / "scores" / "test_style.npz", ids=other, correct=np.ones(200, bool))
    with pytest.raises(RunError, match="different 'test_style' images"):
        collect(tmp_path)
    (job / "step_0.json").unlink()
    with pytest.raises(RunError, match=r"step_0.json cannot be read"):
        collect(tmp_path)


# Reporting it


def compared(variant: str, by_seed: list[float], low: float, high: float) -> dict[str, Any]:
    mean = sum(by_seed) / len(by_seed)
    seeds = list(range(len(by_seed)))
    record = {"pair": "width", "variant": variant, "set": "test_style", "seeds": seeds, "by_seed": by_seed}
    return {**record, "difference": mean, "low": low, "high": high}


def test_which_differences_count() -> None:
    items = [
        compared("duplicate", [-3.2, -2.8], -3.9, -2.1),
        compared("net2net", [1.0, 2.0], 0.3, 2.7),
        compared("lemon", [0.6, 0.2], -0.2, 1.0),
        compared("scratch", [-20.0, -11.0], -18.0, -13.0),
    ]
    pair = {"name": "width", "reference": "insert"}
    # Variances of two values: half the square of their distance; controls do not enter.
    wanted = math.sqrt((0.4**2 + 1.0**2 + 0.4**2) / 2 / 3)
    deviation = scatter({"compared": items}, pair, "test_style")
    assert deviation == pytest.approx(wanted)
    assert [judge(item, deviation) for item in items] == ["worse", "better", "not told apart", "worse"]
    # 1.5 points are more than 2.5 x 0.47 / sqrt(2) = 0.83; neither a wider scatter nor pictures may say otherwise.
    assert judge(items[1], 0.9) == "not told apart"
    assert judge({**items[1], "low": -0.1}, deviation) == "not told apart"
    alone = [compared("lemon", [4.0], 3.0, 5.0)]
    assert scatter({"compared": alone}, pair, "test_style") is None
    assert judge(alone[0], None) == "one seed"


def test_the_page(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    answers = invented_run(run)
    write_json(out / RESULTS, collect(run))
    path = write_report(read_results(out), out)
    text = path.read_text()
    top1 = [100 * answers["lemon", seed].mean() for seed in (0, 1)]
    lines = [line for line in text.splitlines() if line.startswith("| lemon |")]
    assert len(lines) == 1
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert cells[1:5] == ["4.50 ± 0.00", "1.5 ± 0.0", "10.0 ± 0.0", "3.25 ± 0.00"]
    assert cells[6] == f"{np.mean(top1):.1f} ± {abs(top1[0] - top1[1]) / 2:.1f}"
    assert "| + IFD + IWI | 30.24 |" in text
    assert "Learning rate: 0.001; 0.002 lemon." in text
    assert "Not finished: 37 trainings, the next of them width/scratch-s0." in text
    for name in ("width_accuracy", "width_loss"):
        assert f"({name}.svg)" in text
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    assert not (out / "depth_loss.svg").exists()

    # What a person wrote stays, and the same results give the same bytes.
    changed = text.replace("Students grow", "Our students grow") + "\nTake lemon.\n"
    path.write_text(changed.replace("3.25", "99"))
    before = {item.name: item.read_bytes() for item in out.glob("*.svg")}
    write_report(read_results(out), out)
    assert path.read_text() == changed
    assert {item.name: item.read_bytes() for item in out.glob("*.svg")} == before

    path.write_text(changed.replace(END, ""))
    with pytest.raises(RunError, match="lacks the lines"):
        write_report(read_results(out), out)
    (out / RESULTS).write_text("{}")
    with pytest.raises(RunError, match="it lacks pairs"):
        read_results(out)


def test_nothing_trained_yet(tmp_path: Path) -> None:
    write_json(tmp_path / STUDY, {"setting": "emoji", "changes": [], "started": "now"})
    write_json(tmp_path / RESULTS, collect(tmp_path))
    assert "Not finished" in write_report(read_results(tmp_path), tmp_path).read_text()
    assert not list(tmp_path.glob("*.svg"))


def test_the_committed_page_matches_the_committed_results() -> None:
    folder = ROOT / expansion.RESULTS
    if not (folder / RESULTS).exists():
        pytest.skip("the study has not been committed yet")
    text = (folder / README).read_text()
    results = read_results(folder)
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == expansion_report.page(results)
    assert {path.stem for path in folder.glob("*.svg")} == set(expansion_report.plots(results))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = expansion.options([])
    assert (given.part, given.setting, given.seeds, given.changes) == ("all", "emoji", None, [])
    assert (given.run, given.out) == (Path("runs/expansion-emoji"), Path("docs/results/expansion"))
    assert expansion.options(["--setting", "tiny"]).out == Path("runs/expansion-tiny/results")
    invented_run(tmp_path)
    expansion.main(["collect", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "written: " in capsys.readouterr().out
    assert (tmp_path / "out" / README).exists()
    monkeypatch.setattr(expansion, "run_study", lambda *_, **__: ["width/lemon-s0: it cannot"])
    with pytest.raises(SystemExit) as caught:
        expansion.main(["train", "--run", str(tmp_path), "--seeds", "0"])
    assert caught.value.code == 1
    assert "left out: width/lemon-s0: it cannot" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        expansion.main(["report", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "none")])
    assert caught.value.code == RunError.exit_code
