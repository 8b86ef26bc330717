"""The engine matrix: a diagonal of it in `make test`, all of it in `make test-full`, its tables on docs/engines.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines import matrix, page
from benchmarks.engines.cells import (
    ARCHITECTURES,
    ENGINES,
    MAX_NORM,
    SIGLIP,
    STEPS,
    TASKS,
    WORLDS,
    Cell,
    Trained,
    cells,
    option_cells,
    train,
)
from benchmarks.engines.oracle import TOLERANCES, differences, reference
from compt.errors import RunError
from tests.dist.spawn import run_ranks

pytestmark = pytest.mark.dist

DIAGONAL = (
    Cell("ddp", 2, 4, "projector", "swin"),
    Cell("fsdp2", 2, 4, "sharded teacher", "vit"),
    Cell("zero0", 2, 4, "projector", "vit"),
    Cell("zero1", 2, 4, "distillation", "vit"),
    Cell("zero2", 2, 4, "projector", "swin"),
    Cell("zero3", 2, 4, "sharded teacher", "vit"),
    *(Cell(engine, 2, 4, SIGLIP, "vit") for engine in ("ddp", "fsdp2", "zero2")),
)
BF16 = {"loss": 2e-3, "norm": 2e-2}
"""Largest relative difference from ddp's in bf16: it rounds at other places, eight bits of precision."""


@pytest.mark.slow
def test_a_diagonal_of_the_matrix() -> None:
    assert matrix.misses(matrix.run(DIAGONAL)) == []


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_every_option(engine: str) -> None:
    assert matrix.misses(matrix.run(option_cells(engine))) == []


@pytest.mark.full
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_whole_matrix(engine: str, world: int) -> None:
    assert matrix.misses(matrix.run(cells(engine, world))) == []


def bf16() -> dict[str, Trained]:
    return {engine: train(Cell(engine, 2, 4, "projector", "vit"), "bf16") for engine in ENGINES}


@pytest.mark.slow
def test_every_engine_in_bf16_is_close_to_ddp() -> None:
    exact = reference(Cell("ddp", 2, 4, "projector", "vit")).trained
    for found in run_ranks(bf16, 2, timeout=300):
        for engine, trained in found.items():
            assert trained.losses == pytest.approx(found["ddp"].losses, rel=BF16["loss"]), engine
            assert trained.norms == pytest.approx(found["ddp"].norms, rel=BF16["norm"]), engine
            assert trained.losses != pytest.approx(exact.losses, rel=1e-6), f"{engine} computed in fp32"


def test_the_oracle_clips_and_moves_weights() -> None:
    """Every step clips gradients, and every tensor has a gradient and moves."""
    for architecture in ARCHITECTURES:
        for task in TASKS:
            found = reference(Cell("ddp", 1, 1, task, architecture))
            assert len(found.trained.norms) == STEPS >= 3
            assert min(found.trained.norms) > MAX_NORM
            assert len(set(found.trained.norms)) == STEPS
            for gradients in found.trained.gradients:
                assert min(gradient.norm().item() for gradient in gradients.values()) > 1e-5
            for name, value in found.trained.weights.items():
                assert not value.equal(found.start[name]), name


def test_missing_tensors_and_nans_count_as_infinite() -> None:
    expected = reference(Cell("ddp", 1))
    exact = expected.trained
    assert max(differences(exact, expected).values()) == 0.0
    fewer = {name: value for name, value in exact.weights.items() if "ln_final" not in name}
    without = Trained(exact.losses, exact.norms, exact.gradients, fewer, exact.average)
    assert differences(without, expected)["parameters"] == float("inf")
    wrong = Trained([float("nan"), *exact.losses[1:]], exact.norms, exact.gradients, exact.weights, exact.average)
    found = differences(wrong, expected)
    assert found["loss"] == float("inf")
    record = {**vars(Cell("ddp", 1)), **found}
    assert matrix.misses([record]) == [
        "ddp, 1 process, contrastive, vit: loss differs by inf, more than 1e-05",
    ]


def test_the_page_shows_the_committed_results(root: Path) -> None:
    results = page.read_results(matrix.FILE)
    assert matrix.misses(results["cells"]) == []
    assert results["tolerances"] == TOLERANCES
    found = [tuple(record[key] for key in Cell.__dataclass_fields__) for record in results["cells"]]
    wanted = [
        tuple(vars(cell).values())
        for engine in ENGINES
        for world in WORLDS
        for cell in (*cells(engine, world), *(option_cells(engine) if world == 2 else ()))
    ]
    assert found == wanted
    text = (root / "docs" / "engines.md").read_text(encoding="utf-8")
    assert page.shown(text, matrix.FILE) == page.section(matrix.FILE, results, matrix.tables(results))


def test_results_replace_only_the_text_between_the_marks(tmp_path: Path) -> None:
    begin, end = page.marks(matrix.FILE)
    target = tmp_path / "page.md"
    target.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    results = {**page.about(), "cells": [{**vars(Cell("ddp", 1)), **dict.fromkeys(TOLERANCES, 1e-7)}]}
    page.write_results(matrix.FILE, results, matrix.tables(results), tmp_path, target)
    text = target.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{begin}\n### ")
    assert text.endswith(f"\n{end}\nafter\n")
    assert "| ddp | 1 | 1 | 1.0e-07 |" in text
    target.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(RunError, match="matrix: begin"):
        page.write_results(matrix.FILE, results, matrix.tables(results), tmp_path, target)
