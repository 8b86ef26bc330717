"""The page of findings: points really left out, costs of the right chains, honest verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.paper import findings
from benchmarks.paper.accounting import MACS_UNIT, chain, counters, individual
from compt.cost.paper import IMAGES
from compt.design.curves import LinkEpochs
from compt.design.epochs import Range


def test_each_link_is_predicted_without_itself() -> None:
    rows = findings.predictions()
    assert [one.published for one in rows] == [match.epochs for match in findings.LINKS]
    errors = [math.log(one.published / one.without_it) for one in rows]
    # The smallest step, left out, is predicted as if it were as large as the next.
    assert errors == pytest.approx(findings.LINE.errors.tolist(), abs=0.03)
    assert all(one.without_family != one.without_it for one in rows)
    assert math.exp(max(map(abs, errors))) == pytest.approx(findings.LINE.factor())


def test_costs_are_those_of_the_published_accounting() -> None:
    names, specs = findings.LADDER, findings.presets(findings.LADDER)
    links = [LinkEpochs(specs[at], specs[at - 1], at, IMAGES["cc3m"], 128) for at in range(1, 4)]
    epochs = [128.0, *(findings.LINE.predict(link).middle for link in links)]
    found = findings.predict(specs, IMAGES["cc3m"], 128)
    unit = IMAGES["cc3m"] / MACS_UNIT
    assert found.macs.middle * unit == pytest.approx(sum(chain(counters, names, epochs, "cc3m")))
    assert found.alone * unit == pytest.approx(sum(individual(counters, names, 128, "cc3m")))
    assert found.last_alone * unit == pytest.approx(individual(counters, names, 128, "cc3m")[-1])
    assert found.speedup.low < found.speedup.middle < found.speedup.high
    # The paper's epochs give 5.68x; the line's are close to them.
    assert found.speedup.middle == pytest.approx(5.68, rel=0.06)


def test_verdicts() -> None:
    def agrees(published: float) -> bool:
        return findings._number("1", "x", published, Range(2.0, 3.0, 1.0), findings.times).agrees

    assert [agrees(value) for value in (0.9, 0.999, 1.0, 2.9, 3.1)] == [False, True, True, True, False]


def test_a_chain_that_is_in_the_fit_is_no_test_of_it() -> None:
    fitted = [one.statement for one in findings.figure_7() if one.fitted]
    assert fitted == ["steps of 4x, 4 models"]
    assert [one.statement for one in findings.figure_9() if one.fitted] == ["any baseline epochs", "207 M pairs"]


def test_the_page_shows_what_was_printed(root: Path) -> None:
    page = (root / "docs" / "design.md").read_text(encoding="utf-8")
    table = (RESULTS / "findings" / "table.md").read_text(encoding="utf-8")
    parts = table.split("### ")[1:]
    assert len(parts) == 3
    for part in parts[:2]:
        rows = [line for line in part.splitlines() if line.startswith("|")]
        assert "\n".join(rows) in page, part.splitlines()[0]
