"""A first-pair test on two processes: rank 0 decides, and both continue in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest

from compt.files import read_json
from tests.dist.spawn import run_ranks
from tests.helpers.calibrate import LAST, calibrate, calibrate_scored, scored
from tests.helpers.recipe import SECOND, largest_difference, make_data, manifest, weights

TOLERANCE = 2e-5
"""Of weights after a link: a step of AdamW at eps 1e-4 carries the rounding of another order of summation on."""


def refused(base: Path, run: Path) -> str:
    """The message on this rank if no length is lossless. The first is 10 of 12 steps, and no second one is shorter."""
    from compt.chain.calibrate import NotLossless

    with scored({10: 0.1}), pytest.raises(NotLossless) as caught:
        calibrate(base, run, "chain.links.1.train={steps: 10}")
    return str(caught.value)


@pytest.mark.slow
def test_two_processes_decide_as_one(tmp_path: Path) -> None:
    base = make_data(tmp_path)
    said = calibrate_scored(base, tmp_path / "one")
    first, second = run_ranks(calibrate_scored, 2, base, tmp_path / "two")
    assert first == second == said
    one, two = (read_json(tmp_path / name / "run.json")["calibration"] for name in ("one", "two"))
    keys = ("number", "job", "factor", "steps", "difference", "low", "high", "lossless")
    assert [[item[key] for key in keys] for item in one["tries"]] == [
        [item[key] for key in keys] for item in two["tries"]
    ]
    assert one["factor"] == two["factor"] == 1.25**2
    for name in (SECOND, LAST, "try-1-large"):
        assert manifest(tmp_path / "two", name)["processes"] == 2
        assert largest_difference(weights(tmp_path / "one", name), weights(tmp_path / "two", name)) < TOLERANCE


@pytest.mark.slow
def test_two_processes_end_alike(tmp_path: Path) -> None:
    base = make_data(tmp_path)
    first, second = run_ranks(refused, 2, base, tmp_path / "run")
    assert first == second
    assert "not lossless at any acceleration" in first
