"""One rank at the end of a link and the start of the next, or of a control that gathers; run under a limit of memory.

Prints the largest anonymous memory of the process as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.handoff_process import Memory, status
from benchmarks.handoff_run import Random
from compt import checkpoint, dist
from compt.artefact import read_artefact, write_artefact
from compt.engines.base import Finish
from compt.engines.frozen import shard_frozen
from compt.engines.state_dcp import load_state, save_state
from compt.expand import ExpandConfig, expand, make_plan
from compt.expand.axes import parameters
from compt.models import build
from compt.presets import PRESETS

TEACHER = replace(PRESETS["vit_l16"], name="vit_300m", depth=15)
STUDENT = replace(TEACHER, name="vit_310m", depth=16)
FILE_BYTES = 100_000_000


class Drawn(Random):
    """Random weights of one row each, soon drawn, whose shapes are known without drawing."""

    def __getitem__(self, name: str) -> Tensor:
        at, shape = self.names[name]
        return torch.randn(shape[-1:], generator=torch.Generator().manual_seed(at)).expand(shape).contiguous()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.names[name][1]


class Shards:
    """What checkpoints ask of an engine that has weights in torch's shards and nothing else."""

    format: Literal["dcp", "deepspeed"] = "dcp"

    def __init__(self) -> None:
        self.rank, self.world_size, self.device = dist.rank(), dist.world_size(), torch.device("cpu")
        model = build(TEACHER, device="meta")
        self.unwrapped: nn.Module = shard_frozen(model, Drawn(TEACHER), dtype=torch.float32, device="cpu")

    def state(self) -> dict[str, Tensor]:
        return {f"model.model.{name}": value.detach() for name, value in self.unwrapped.state_dict().items()}

    def save(self, folder: Path, *, asynchronous: bool = False) -> Finish:
        return save_state(self.state(), folder, asynchronous=asynchronous)

    def load(self, folder: Path) -> None:
        load_state(self.state(), folder)


def end_a_link(folder: Path) -> None:
    """Save, resume, and write the link's model from the checkpoint."""
    engine: Any = Shards()
    checkpoint.Saver(folder / "checkpoints").save(engine, 1, {})
    path = folder / "checkpoints" / "step-00000001"
    checkpoint.load(path, engine)
    write_artefact(
        folder / "model", checkpoint.open_weights(path), TEACHER, {}, max_shard_bytes=FILE_BYTES, together=True
    )


def begin_the_next(folder: Path) -> None:
    """Expand the link's model into the next one's first weights."""
    teacher = read_artefact(folder / "model", verify=False)
    plan = make_plan(teacher.spec, STUDENT, ExpandConfig.both("insert"))
    state = expand(plan, teacher.state, 0)
    write_artefact(folder / "initial", state, STUDENT, {}, max_shard_bytes=FILE_BYTES, together=True)


def gather(_: Path) -> None:
    """The control: rank 0 comes to hold the whole model, as a state dict for one file needs it."""
    whole = {}
    for name, value in Shards().state().items():
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.is_main():
            whole[name] = gathered
    dist.barrier()
    assert len(whole) == (len(parameters(TEACHER)) if dist.is_main() else 0)


ACTIONS: dict[str, Callable[[Path], None]] = {
    action.__name__: action for action in (end_a_link, begin_the_next, gather)
}


def main() -> None:
    """ACTION FOLDER, as a rank of the process group that the environment describes."""
    dist.init("cpu", timeout_seconds=300)
    before, memory = status()["RssAnon"], Memory()
    memory.start()
    ACTIONS[sys.argv[1]](Path(sys.argv[2]))
    memory.ended.set()
    memory.join()
    print(json.dumps({"before": before, "peak": memory.peak}))
    dist.barrier()
    dist.shutdown()


if __name__ == "__main__":
    main()
