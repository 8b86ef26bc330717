"""The section `engine` of a recipe, and what a link says otherwise. No torch in here.

All of it is *execution*: no engine changes the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from compt.errors import nearest
from compt.recipe.types import Duration, Section, execution

EngineName = Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]


class Fsdp2(Section):
    """How torch's `fully_shard` cuts a model up; each block of a tower is a unit."""

    reshard_after_forward: bool = execution(True)
    """Whether the gathered weights of a block are given up after its forward and gathered again for its backward: less
    memory, half as much communication again."""
    replicas: int = execution(1, gt=0)
    """Groups of processes that each hold the whole state in shards and average gradients with each other (hybrid
    sharding): with one a node, weights are gathered within nodes only. Has to divide the processes."""
    cpu_offload: bool = execution(False)
    """Whether shards of weights, gradients and moments lie in the CPU's memory, and the optimizer steps there."""
    reduce_precision: Literal["fp32", "bf16"] = execution("fp32")
    """Type that gradients are summed over processes in."""


class EngineConfig(Section):
    """How and where to run. Several processes share the work data-parallel."""

    name: EngineName = execution("ddp")
    """How the state is shared out: `ddp` (all of it on every GPU), `fsdp2` (shards of everything), or DeepSpeed's ZeRO:
    `zero0` (nothing in shards), `zero1` (the optimizer), `zero2` (gradients too), `zero3` (weights too)."""
    fsdp2: Fsdp2 = execution(Fsdp2())
    """For `name: fsdp2`."""
    deepspeed_config: str | None = execution(None)
    """For `name: zero…`: a JSON file of DeepSpeed's. What it leaves out, or calls `auto`, comes from this recipe; what
    contradicts it is an error. Without it ds_configs' file for the stage."""
    shard_teacher: bool = execution(False)
    """Whether the frozen teacher lies in shards too, gathered block by block."""
    recompute: bool = execution(False)
    """Whether blocks keep only their inputs and are computed again in backward: less memory, a third more work."""
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    """`auto` takes a GPU where there is one."""
    micro_batch: int | None = execution(None, gt=0)
    """Pictures of a process that are computed at once, against a lack of memory; the step stays the same."""
    find_micro_batch: bool = execution(False)
    """Whether a training first looks for the largest `micro_batch`, up to the one given, that its memory holds."""
    text_buckets: int = execution(1, gt=0)
    """Groups of captions of similar length, each trimmed to its longest."""
    loss_chunk: int | None = execution(None, gt=0)
    """Rows of the similarity matrix that are held at once; without it all."""
    compile: bool = execution(False)
    """Whether torch compiles the model."""
    workers: int = execution(4, ge=0)
    """Processes that decode pictures, for each training process."""
    cache: bool = execution(False)
    """Whether the training set's raw files are kept in memory."""
    log_every: Duration = execution(Duration(steps=50))
    """Distance of log lines."""
    checkpoint_every: Duration = execution(Duration(steps=1000))
    """Distance of checkpoints to resume from."""
    keep_checkpoints: int = execution(2, gt=0)
    """Newest checkpoints that are kept."""
    keep_every: Duration | None = execution(None)
    """Distance of checkpoints that are kept besides, until the model is done."""
    async_checkpoints: bool = execution(False)
    """Whether checkpoints go to the disk while training goes on; they need memory for a copy of the state. Not with
    ZeRO."""
    timeout: float = execution(600.0, gt=0)
    """Seconds without a step, or in a collective, after which a process counts as hanging and the job is ended."""

    @model_validator(mode="after")
    def _fitting(self) -> EngineConfig:
        zero = self.name.startswith("zero")
        if self.deepspeed_config is not None and not zero:
            raise ValueError(f"deepspeed_config is for zero0 to zero3, not for name '{self.name}'")
        if self.name != "fsdp2" and self.fsdp2 != Fsdp2():
            raise ValueError(f"fsdp2 is for name 'fsdp2', not for '{self.name}'")
        if zero and self.async_checkpoints:
            raise ValueError("async_checkpoints: DeepSpeed writes while training waits; leave it out")
        return self


@contextlib.contextmanager
def placed(key: str) -> Iterator[None]:
    """Say which key an error is about that pydantic knows no place for."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *map(str, first["loc"])])
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            section: type[Section] = Fsdp2 if first["loc"][0] == "fsdp2" else EngineConfig
            text = f"unknown key{nearest(str(first['loc'][-1]), section.model_fields)}"
        raise ValueError(f"{where}: {text}") from None


def changed_engine(common: EngineConfig, own: dict[str, Any]) -> EngineConfig:
    """`common` with what `own` says otherwise. Raises ValidationError where that does not fit together.

    Another name leaves behind what is for the common kind of engine only.
    """
    kept = common.model_dump(exclude_unset=True)
    if own.get("name", common.name) != common.name:
        kept = {key: value for key, value in kept.items() if key not in ("fsdp2", "deepspeed_config")}
    both = {**kept, **own}
    if isinstance(own.get("fsdp2"), dict):
        both["fsdp2"] = {**kept.get("fsdp2", {}), **own["fsdp2"]}
    return EngineConfig.model_validate(both)
