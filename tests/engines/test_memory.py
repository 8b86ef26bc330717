"""What each engine holds on a rank, counted, is what `compt.memory` says."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from benchmarks.engines import memory, page
from benchmarks.engines.cells import ENGINES, WORLDS

pytestmark = pytest.mark.dist


@pytest.mark.slow
@pytest.mark.parametrize(("world", "pair"), [*((world, "vit") for world in WORLDS), (2, "swin")])
def test_every_engine_holds_what_is_predicted(world: int, pair: str) -> None:
    assert memory.misses(memory.run(world, pairs=[pair])) == []


def test_a_part_that_differs_is_told() -> None:
    parts = dict.fromkeys(memory.PARTS, 1000)
    record = {"models": "vit", "engine": "ddp", "world_size": 2, "counted_bytes": parts, "predicted_bytes": dict(parts)}
    assert memory.misses([record]) == []
    record["predicted_bytes"] = {**parts, "weights": 1060}
    assert memory.misses([record]) == ["vit, ddp on 2: weights counted 1,000, predicted 1,060 bytes"]
    record["predicted_bytes"] = {**parts, "teacher": 0}
    assert len(memory.misses([record])) == 1


def test_the_page_shows_what_was_counted(root: Path) -> None:
    results = page.read_results(memory.FILE)
    assert memory.misses(results["records"]) == []
    found = [
        tuple(record[key] for key in ("world_size", "models", "engine", "shard_teacher"))
        for record in results["records"]
    ]
    assert found == list(product(WORLDS, memory.PAIRS, ENGINES, (False, True)))
    text = (root / "docs" / "engines.md").read_text(encoding="utf-8")
    assert page.shown(text, memory.FILE) == page.section(memory.FILE, results, memory.tables(results))
