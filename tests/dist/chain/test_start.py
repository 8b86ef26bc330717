"""Several ranks start from a model of another program."""

from __future__ import annotations

from pathlib import Path

from compt.chain.start import hash_of
from compt.dist import collectives as dist
from compt.models.presets import PRESETS
from compt.weights.artefact import Artefact
from tests.dist.spawn import run_ranks


def hashed_by() -> tuple[str, list[int]]:
    """The hash that this rank receives, and the rank if it computed the hash itself."""
    asked: list[int] = []

    def find_out() -> str:
        asked.append(dist.rank())
        return f"of rank {dist.rank()}"

    model = Artefact(Path("model.pt"), PRESETS["vit_pico"], {}, {}, {}, find_out)
    return hash_of(model), asked


def test_one_rank_reads_every_byte_of_a_model() -> None:
    assert run_ranks(hashed_by, 2) == [("of rank 0", [0]), ("of rank 0", [])]
