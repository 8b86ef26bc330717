"""Every mutation turns its cell red, and the page says by how much."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines import mutations, page
from benchmarks.engines.broken import MUTATIONS
from benchmarks.engines.cells import ENGINES
from benchmarks.engines.oracle import TOLERANCES
from tests.helpers.cases import matrix

pytestmark = pytest.mark.dist

GROUPS = mutations.groups()


def name_of(group: list[mutations.Mutation]) -> str:
    return f"{group[0].cell.engine}-{group[0].cell.world_size}"


@pytest.mark.parametrize("group", matrix(GROUPS, GROUPS[:1]), ids=name_of)
def test_every_mutation_is_caught(group: list[mutations.Mutation]) -> None:
    assert mutations.misses(mutations.run(group)) == []


def test_every_engine_and_every_mutation_is_in_one_group() -> None:
    assert sorted(MUTATIONS.index(one) for group in GROUPS for one in group) == list(range(len(MUTATIONS)))
    assert {mutation.cell.engine for mutation in MUTATIONS} == set(ENGINES)
    assert len({(mutation.claim, mutation.change) for mutation in MUTATIONS}) == len(MUTATIONS)


def test_uncaught_mutations_and_failing_cells_are_reported() -> None:
    mutation = MUTATIONS[0]
    exact = dict.fromkeys(TOLERANCES, 0.0)
    wrong = {**exact, "norm": 2 * TOLERANCES["norm"], "parameters": 1.5 * TOLERANCES["parameters"]}
    quiet, loud = (
        mutations._record(mutation, [(exact, exact)]),
        mutations._record(mutation, [(exact, exact), (exact, wrong)]),
    )
    assert (loud["quantity"], loud["mutated"], loud["caught"]) == ("norm", wrong["norm"], True)
    assert mutations.misses([loud]) == []
    assert mutations.misses([quiet, mutations._record(mutation, [(wrong, wrong)])]) == [
        f"not caught: {mutation.claim}: {mutation.change} ({mutation.cell})",
        f"fails without a mutation: {mutation.cell}",
    ]
    nothing = {**exact, "loss": float("inf")}
    assert mutations._record(mutation, [(exact, nothing)])["caught"]


def test_the_page_shows_the_committed_results(root: Path) -> None:
    results = page.read_results(mutations.FILE)
    assert mutations.misses(results["mutations"]) == []
    found = [(record["claim"], record["mutation"], record["cell"]) for record in results["mutations"]]
    wanted = [(mutation.claim, mutation.change, str(mutation.cell)) for group in GROUPS for mutation in group]
    assert found == wanted
    text = (root / "docs" / "engines.md").read_text(encoding="utf-8")
    assert page.shown(text, mutations.FILE) == page.section(mutations.FILE, results, mutations.tables(results))
