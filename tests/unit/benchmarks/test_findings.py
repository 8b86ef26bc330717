"""The findings that the design is held against: points really held out, costs of the right chains, honest verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.paper import findings
from benchmarks.paper.accounting import MACS_UNIT, chain, counters, individual
from benchmarks.paper.findings_tables import Finding, Prediction, family_table, finding_table
from compt.cost.paper import IMAGES
from compt.design.epochs import Range
from compt.models.presets import PRESETS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(("held_out", "left"), [("ViTs on CC3M", 6), ("figure 8", 8), ("Merged-15M", 8), ("none", 11)])
def test_points_are_held_out(held_out: str, left: int) -> None:
    model = findings.model_without(held_out)
    assert len(model.points) == left
    assert not any(findings.HELD_OUT[held_out](match) for match in model.points)
    full = findings.model_without("none").posterior
    assert (model.posterior.rate == full.rate) == (held_out == "none")


def test_every_point_is_in_one_family() -> None:
    rows = findings.families()
    assert len(rows) == 11
    assert all(row.inside == (row.low <= row.published <= row.high) for row in rows)


def test_costs_are_those_of_the_published_accounting() -> None:
    model, names = findings.model_without("none"), findings.LADDER
    specs = findings.presets(names)
    links = model.links(specs, images=IMAGES["cc3m"], baseline_epochs=128)
    epochs = [128.0, *(model.epochs(link) for link in links)]
    found = findings.predict(model, specs, IMAGES["cc3m"], 128)
    unit = IMAGES["cc3m"] / MACS_UNIT
    assert found.macs * unit == pytest.approx(sum(chain(counters, names, epochs, "cc3m")))
    assert found.alone * unit == pytest.approx(sum(individual(counters, names, 128, "cc3m")))
    assert found.last_alone * unit == pytest.approx(individual(counters, names, 128, "cc3m")[-1])
    assert found.speedup.low < found.speedup.middle < found.speedup.high
    # The paper's epochs give 5.68x; the fit's are close to them.
    assert found.speedup.middle == pytest.approx(5.68, rel=0.05)


def test_chains_of_figure_6() -> None:
    found = findings.starts(findings.model_without("none"), IMAGES["cc3m"], 128)
    assert list(found)[:4] == ["vit_l16", "vit_b16", "vit_s16", "vit_t16"]
    assert found["vit_l16"].macs == found["vit_l16"].last_alone
    small = findings.smaller_than_t()
    assert list(found)[4] == small.name
    assert 2.5 < PRESETS["vit_t16"].width ** 2 * 12 / (small.width**2 * small.depth) < 4.5


def verdict(published: float, least: bool = False, given: str = "") -> str:
    found = findings._number("1", "x", "none", published, Range(2.0, 1.0, 3.0), findings.times, least)
    return Finding(**{**vars(found), "given": given}).verdict


def test_verdicts() -> None:
    assert [verdict(value) for value in (0.9, 1.0, 2.9, 3.1)] == ["MISS", "HIT", "HIT", "MISS"]
    assert [verdict(value, least=True) for value in (1.9, 2.1)] == ["HIT", "MISS"]
    assert [verdict(value, given="put in") for value in (2.0, 9.0)] == ["put in", "MISS"]
    assert verdict(3.9, least=True, given="by construction") == "MISS"
    rows = [findings._number("1", "x", "none", value, Range(2.0, 1.0, 3.0), findings.times) for value in (2.0, 9.0)]
    assert "1 of 2." in finding_table("t", rows).notes[0]


def test_a_wide_range_says_nothing_and_counts_neither_way() -> None:
    def rows(low: float, high: float) -> list[Finding]:
        found = Range(2.0, low, high)
        return [findings._number("1", "x", "none", value, found, findings.times) for value in (2.0, 90.0)]

    assert [row.verdict for row in rows(1.0, 3.1)] == ["says nothing", "MISS"]
    assert [row.verdict for row in rows(-0.1, 2.1)] == ["says nothing", "MISS"]
    assert [row.verdict for row in rows(1.0, 3.0)] == ["HIT", "MISS"]
    assert "0 of 2." in finding_table("t", [*rows(1.0, 3.1), rows(1.0, 3.0)[1]]).notes[0]
    wide = Prediction("f", "l", "s", 2.0, 2.0, 0.5, 3.0, True)
    assert wide.verdict == "says nothing"
    assert "1 of 2 inside" in family_table([wide, replace(wide, low=1.0), replace(wide, inside=False)]).notes[0]


def test_figure_9a_is_one_row_that_cannot_miss() -> None:
    (row,) = findings.figure_9a("ViTs on CC3M")
    assert row.verdict == "by construction"
    assert "32, 64, 128" in row.statement


def test_the_cheapest_start_of_all_candidates() -> None:
    """Never dearer than the cheapest of figure 6's starts, and what the search of a plan begins with."""
    (row,) = findings.figure_6_of_all("none", findings.START)
    assert row.published == "vit_t16"
    best = row.predicted.split()[0]
    assert row.hit == (best == "vit_t16")
    paid = [float(part.split()[1]) for part in row.predicted.split(", ")]
    assert paid[0] <= paid[1]
    design = ROOT / "docs" / "design.md"
    named = f"Least MACs: 6 models ({best},"
    assert named in design.read_text(encoding="utf-8"), "the best chain, beside the simpler one that a plan takes"


def test_the_page_shows_what_was_printed(root: Path) -> None:
    page = (root / "docs" / "design.md").read_text(encoding="utf-8")
    table = (RESULTS / "findings" / "table.md").read_text(encoding="utf-8")
    for part in table.split("### ")[1:]:
        if "no test" not in part.splitlines()[0]:
            rows = [line for line in part.splitlines() if line.startswith("|")]
            assert "\n".join(rows) in page, part.splitlines()[0]
