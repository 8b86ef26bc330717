"""The bytes that each engine holds on a rank are those that `compt.cost.memory` predicts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from benchmarks.engines import memory, page
from benchmarks.engines.cells import ENGINES, WORLDS
from tests.helpers.cases import matrix

pytestmark = pytest.mark.dist


CELLS = [*((world, "vit", ENGINES) for world in WORLDS), (2, "swin", ("fsdp2", "zero2"))]


@pytest.mark.parametrize(("world", "pair", "engines"), matrix(CELLS, CELLS[1:2]))
def test_every_engine_holds_the_predicted_bytes(world: int, pair: str, engines: tuple[str, ...]) -> None:
    assert memory.misses(memory.run(world, engines, pairs=[pair])) == []


def test_a_part_that_differs_is_reported() -> None:
    parts = dict.fromkeys(memory.PARTS, 1000)
    record = {"models": "vit", "engine": "ddp", "world_size": 2, "counted_bytes": parts, "predicted_bytes": dict(parts)}
    assert memory.misses([record]) == []
    record["predicted_bytes"] = {**parts, "weights": 1060}
    assert memory.misses([record]) == ["vit, ddp on 2: weights counted 1,000, predicted 1,060 bytes"]
    record["predicted_bytes"] = {**parts, "teacher": 0}
    assert len(memory.misses([record])) == 1


def test_zero1_and_zero2_hold_whole_gradients_of_tensors_in_their_slice() -> None:
    (record,) = (
        one
        for one in page.read_results(memory.FILE)["records"]
        if (one["models"], one["engine"], one["world_size"], one["shard_teacher"]) == ("swin", "zero2", 4, False)
    )
    counted, predicted = (record[key]["gradients"] for key in ("counted_bytes", "predicted_bytes"))
    assert counted > 1.1 * predicted  # the planner's is of the embedding alone
    assert memory.misses([record]) == []
    for key, wrong in (
        ("counted_bytes", 0.97 * counted),
        ("counted_bytes", predicted),
        ("predicted_bytes", 1.2 * counted),
    ):
        (told,) = memory.misses([{**record, key: {**record[key], "gradients": wrong}}])
        assert told.startswith("swin, zero2 on 4: gradients counted ")


def test_the_page_shows_the_committed_results(root: Path) -> None:
    results = page.read_results(memory.FILE)
    assert memory.misses(results["records"]) == []
    found = [
        tuple(record[key] for key in ("world_size", "models", "engine", "shard_teacher"))
        for record in results["records"]
    ]
    assert found == list(product(WORLDS, memory.PAIRS, ENGINES, (False, True)))
    text = (root / "docs" / "engines.md").read_text(encoding="utf-8")
    assert page.shown(text, memory.FILE) == page.section(memory.FILE, results, memory.tables(results))
