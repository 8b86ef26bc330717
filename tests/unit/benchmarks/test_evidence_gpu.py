"""The study for a GPU: its recipe, and that calls go on where the last one stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.evidence import gpu
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe

CHAIN = """
import signal, sys, time, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--run-folder") + 1])
folder.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
(folder / "options").write_text(" ".join(sys.argv[1:]))
if folder.name == "s1" and not (folder / "saved").exists():
    (folder / "started").touch()
    time.sleep(60)
"""


def test_the_recipe_is_a_plan_of_the_paper_s_chain(root: Path) -> None:
    plan = make_plan(load_recipe(root / gpu.RECIPE, []), baselines=True)
    assert [job.spec.name for job in plan.links] == ["vit_t16", "vit_s16", "vit_b16", "vit_l16"]
    assert [round(job.epochs) for job in plan.links] == [80, 20, 16, 13]
    assert {(job.spec.image_size, job.spec.patch_size) for job in plan.jobs} == {(64, 8)}
    assert len([job for job in plan.jobs if job.kind == "baseline"]) == 4
    acceleration = plan.acceleration()
    assert acceleration is not None
    assert acceleration > 4


def test_a_call_stops_in_time_and_the_next_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 0 is done at once; seed 1 is asked to save and stop; the second call finishes it and seed 2."""
    (tmp_path / "chain.py").write_text(CHAIN)
    monkeypatch.setattr(gpu, "COMMAND", (sys.executable, str(tmp_path / "chain.py")))
    monkeypatch.setattr(gpu, "RUNS", tmp_path)
    monkeypatch.setattr(gpu, "SAVING", 10.0)
    assert gpu.main(["--budget", "25", "--set", "engine.device=cpu"]) == 75
    assert (tmp_path / "s1" / "saved").exists()
    assert not (tmp_path / "s2").exists()
    assert gpu.main(["--budget", "60"]) == 0
    assert "--baselines" in (tmp_path / "s0" / "options").read_text()
    assert "--set seed=2" in (tmp_path / "s2" / "options").read_text()
    assert gpu.main(["--budget", "5"]) == 75, "no time to save"


def test_options_are_those_of_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chain.py").write_text(CHAIN.replace("s1", "none"))
    monkeypatch.setattr(gpu, "COMMAND", (sys.executable, str(tmp_path / "chain.py")))
    monkeypatch.setattr(gpu, "RUNS", tmp_path)
    assert gpu.main(["--set", "engine.device=cpu"]) == 0
    assert (tmp_path / "s0" / "options").read_text().endswith("--set engine.device=cpu")
