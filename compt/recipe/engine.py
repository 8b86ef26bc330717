"""The section `engine` of a recipe, what a link says otherwise, and the table of engines.

All of it is *execution*: no engine changes the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from compt.errors import nearest
from compt.models.presets import PACKED
from compt.recipe.types import Count, Duration, OneOf, Section, execution

Part = Literal["weights", "gradients", "optimizer"]
LossChunk = Annotated[int, Field(gt=0)] | Literal["tiled"] | None


@dataclass(frozen=True)
class EngineKind:
    """What an engine shards over the processes and what it keeps: for forecasts of memory and for checks of a recipe.

    The defaults are those of an engine that holds everything on every process.
    """

    name: str
    shards: frozenset[Part] = frozenset()
    """What a process holds only its share of. `gradients` without `weights` are shares of one long vector: both
    processes keep the gradient of a tensor that the cut goes through."""
    unsharded: Literal["nothing", "vectors", "small"] = "nothing"
    """Parameters that every process holds all the same: `vectors` instead of a share of them, or all `small` tensors
    (see ds_configs) in addition to the share."""
    gathers: Literal["fp32", "compute"] = "fp32"
    """Type that sharded weights are gathered in. Those gathered in the compute type need no copy by autocast."""
    steps_copies: bool = False
    """Whether the optimizer steps fp32 copies of the weights instead of the weights."""
    sums_whole_gradients: bool = False
    """Whether several micro-batches add up whole gradients, even where these are sharded in the end."""
    buckets: int = 0
    """Buffers of DeepSpeed's `reduce_bucket_size` numbers."""
    reserved: Literal["always", "among several", "never"] = "among several"
    """When the memory of gradients is taken during the whole step, not only from their backward on. `among several`: of
    several processes."""
    settings: Literal["fsdp2", "deepspeed_config"] | None = None
    """The key of `engine` that is only for engines of this kind."""
    stage: int | None = None
    """The stage of DeepSpeed's ZeRO."""
    background: bool = True
    """Whether it can write a checkpoint while training goes on."""


def _zero(stage: int, *shards: Part, **more: Any) -> EngineKind:
    common: dict[str, Any] = {"reserved": "always", "settings": "deepspeed_config", "background": False}
    return EngineKind(f"zero{stage}", frozenset(shards), stage=stage, **common, **more)


_EVERYTHING: frozenset[Part] = frozenset(("weights", "gradients", "optimizer"))

ENGINES: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        EngineKind("ddp"),
        EngineKind("fsdp2", _EVERYTHING, unsharded="vectors", gathers="compute", reserved="never", settings="fsdp2"),
        _zero(0),
        _zero(1, "gradients", "optimizer", steps_copies=True, sums_whole_gradients=True, buckets=2),
        _zero(2, "gradients", "optimizer", steps_copies=True, buckets=2),
        _zero(3, *_EVERYTHING, unsharded="small", steps_copies=True, buckets=1),
    )
}
"""All engines by name. One from outside of compt adds itself here, and to `compt.engines.open.OPENERS`."""


def fully_sharded(*, background: bool = False) -> list[str]:
    """The engines that shard everything; with `background`, those that write checkpoints while training goes on."""
    return [name for name, kind in ENGINES.items() if kind.shards == _EVERYTHING and kind.background >= background]


LOGGERS = OneOf(
    {
        "tensorboard": "compt.train.loggers:TensorBoard",
        "wandb": "compt.train.loggers:WeightsAndBiases",
        "mlflow": "compt.train.loggers:MlFlow",
    }
)
"""Programs that show curves. To add one: write a `compt.train.loggers.Logger`, and its name and place here."""

ENGINE_NAMES = OneOf(ENGINES)
EngineName = Annotated[str, AfterValidator(ENGINE_NAMES)]


def _spelt(*names: str) -> BeforeValidator:
    """Read false and true as these names. YAML reads `off` and `on` as false and true, and older files have them."""
    return BeforeValidator(lambda value: names[value] if isinstance(value, bool) else value)


Compile = Annotated[Literal["off", "blocks", "towers"], _spelt("off", "blocks")]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CAPTURING: dict[CompileMode, CompileMode] = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes in which the compiler captures CUDA graphs, and the same without."""


class Fsdp2(Section):
    """How torch's `fully_shard` shards a model. Each block of a tower is a unit."""

    reshard_after_forward: bool = execution(True)
    """Free the gathered weights of a block after its forward pass and gather them again for its backward pass: less
    memory, 1.5 times the communication."""
    replicas: int = execution(1, gt=0)
    """Number of groups of processes that each hold the whole state in shards (hybrid sharding). With one group per
    node, weights are gathered only within nodes. It has to divide the number of processes."""
    cpu_offload: bool = execution(False)
    """Keep the shards of weights, gradients and moments in the CPU's memory, and run the optimizer there."""
    reduce_precision: Literal["fp32", "bf16"] = execution("fp32")
    """Number format in which gradients are summed over processes."""


class EngineConfig(Section):
    """How and where to run. Several ranks train data-parallel: each computes a share of every batch."""

    name: EngineName = execution("ddp")
    """How the state is sharded: `ddp` (not at all), `fsdp2` (weights, gradients, optimizer), or DeepSpeed's ZeRO:
    `zero0` (not at all), `zero1` (optimizer), `zero2` (gradients too), `zero3` (weights too)."""
    fsdp2: Fsdp2 = execution(Fsdp2())
    """For `name: fsdp2`."""
    deepspeed_config: str | None = execution(None)
    """For `name: zero…`: a JSON file for DeepSpeed. What it leaves out, or sets to `auto`, comes from this recipe; a
    contradiction is an error. Default: the file for the stage in ds_configs."""
    shard_teacher: bool = execution(False)
    """Shard the frozen teacher too, and gather it block by block."""
    teacher_cache: Count | None = execution(None, gt=0)
    """Bytes of the CPU's memory in which each rank keeps the teacher's features of captions: `20G`. A caption that a
    rank sees again is not computed again by the teacher. When the memory is full, further captions are computed
    every time. Not with `shard_teacher`. Default: none."""
    recompute: bool = execution(False)
    """Activation checkpointing: keep only the inputs of blocks and compute blocks again in backward. Less memory, a
    third more work."""
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    """`auto` uses a GPU if there is one."""
    micro_batch: int | None = execution(None, gt=0)
    """Images that a rank computes at once, to save memory. The step stays the same. Default: its whole share."""
    find_micro_batch: bool = execution(False)
    """Before training, search the largest `micro_batch` that fits into memory, up to the one given."""
    tune: bool = execution(False)
    """Before training, time `text`, `compile`, `recompute` and the micro-batch, where the recipe does not set them, and
    keep the fastest that fits. Takes at most 20 minutes for a job, besides the search for the micro-batch. The result
    is kept in the run and in the user's cache."""
    text: Literal["auto", "packed", "buckets", "padded"] = execution("auto")
    """How captions of different lengths are computed together: `packed` without any padding, in `buckets` of similar
    length, or `padded` to the longest of a batch. `auto`: buckets; on a CPU packed if `text_buckets` is not given."""
    text_buckets: int | None = execution(None, gt=0)
    """Groups of captions of similar length in a batch, each padded only to its longest, for `text: auto` and `text:
    buckets`. Default: 4."""
    loss_chunk: LossChunk = execution(None)
    """Rows of the similarity matrix that are in memory at once; `tiled`: none, by kernels in Triton on a GPU, and 64
    rows on a CPU. Default: all."""
    compile: Compile = execution("off")
    """What torch.compile compiles: nothing (`off`, as false), each of the `blocks` (as true), or whole `towers`, which
    takes longer to compile. Engines that gather weights block by block (fsdp2, zero3) compile blocks only."""
    compile_mode: CompileMode = execution("default")
    """The mode of torch.compile, for `compile: blocks` and `compile: towers`. `reduce-overhead` and `max-autotune`
    capture CUDA graphs of towers, with `text: packed`; they have not run on a GPU yet."""
    graphs: Annotated[Literal["off", "on"], _spelt("off", "on")] = execution("off")
    """Capture whole training steps as CUDA graphs, a graph for each of at most 33 sizes of packed text. For `name: ddp`
    and `text: packed`; it has not run on a GPU yet."""
    workers: int = execution(4, ge=0)
    """Loader processes, which decode images, for each rank. At most one per core is started."""
    cache: bool = execution(False)
    """Keep the encoded images of the training set in memory."""
    log_every: Duration = execution(Duration(steps=50))
    """Log this often."""
    loggers: list[Annotated[str, AfterValidator(LOGGERS)]] = execution(["tensorboard"])
    """Programs that show curves, beside `metrics.jsonl`: `tensorboard`, `wandb` (Weights & Biases), `mlflow`. Each job
    is a run there, with its settings, final scores and the contact sheet."""
    checkpoint_every: Duration = execution(Duration(steps=1000))
    """Write a checkpoint this often."""
    keep_checkpoints: int = execution(2, gt=0)
    """Number of newest checkpoints that are kept."""
    keep_every: Duration | None = execution(None)
    """Also keep a checkpoint this often, until the job is done."""
    async_checkpoints: bool = execution(False)
    """Write checkpoints while training goes on. Needs memory for a copy of the state. Not with ZeRO."""
    timeout: float = execution(600.0, gt=0)
    """Seconds without a step, or in one collective, after which a rank counts as hanging and the job ends."""

    @property
    def buckets(self) -> int:
        """Groups of captions that the text tower computes one after the other; PACKED: one, without padding."""
        return {"padded": 1, "packed": PACKED}.get(self.text, self.text_buckets or _BUCKETS)

    def on(self, device: str) -> EngineConfig:
        """With `text: auto` decided for a type of device, and with no kernels and no compiler's graphs on a CPU.

        Packed text has not run on a GPU yet.
        """
        if device != "cpu":
            return self
        packed = {"text": "packed"} if self.text == "auto" and not self.text_buckets else {}
        chunk = {"loss_chunk": 64} if self.loss_chunk == "tiled" else {}
        mode = {"compile_mode": CAPTURING.get(self.compile_mode, self.compile_mode)}
        return self.model_copy(update={**packed, **chunk, **mode})

    @property
    def loss_rows(self) -> int | None:
        """`loss_chunk` as a number of rows: tiles take less memory than one row does."""
        return 1 if self.loss_chunk == "tiled" else self.loss_chunk

    @property
    def kind(self) -> EngineKind:
        """What the named engine shards and keeps."""
        return ENGINES[self.name]

    @model_validator(mode="after")
    def _fitting(self) -> EngineConfig:
        for key in _SETTINGS:
            if getattr(self, key) != type(self).model_fields[key].default and self.kind.settings != key:
                fitting = ", ".join(name for name, kind in ENGINES.items() if kind.settings == key)
                raise ValueError(f"{key} is for name {fitting}, not for '{self.name}'")
        if self.compile == "towers" and "weights" in self.kind.shards:
            raise ValueError(f"compile: {self.name} gathers weights block by block; write blocks instead of towers")
        if self.compile_mode != "default" and self.compile == "off":
            raise ValueError(f"compile_mode: '{self.compile_mode}' needs compile: blocks or towers")
        if self.teacher_cache and self.shard_teacher:
            raise ValueError(
                "teacher_cache: a teacher with shard_teacher computes on all processes together, and one that has all "
                "captions in its cache would not take part; leave out one of the two"
            )
        if self.compile_mode in CAPTURING:
            other = "write max-autotune-no-cudagraphs or default"
            self._check_captured(f"compile_mode: '{self.compile_mode}'", other)
            if self.compile != "towers":
                raise ValueError(f"compile_mode: '{self.compile_mode}' captures graphs of towers only; {other}")
        if self.graphs == "on":
            self._check_captured("graphs: on", "write graphs: off")
            if self.name != "ddp" or self.shard_teacher:
                why = "a sharded teacher" if self.name == "ddp" else f"'{self.name}'"
                raise ValueError(f"graphs: {why} communicates within a step; write name: ddp, or graphs: off")
            if self.teacher_cache:
                raise ValueError("graphs: teacher_cache looks captions up on the CPU; leave out one of the two")
            if self.compile_mode in CAPTURING:
                raise ValueError(f"graphs: compile_mode '{self.compile_mode}' captures graphs too; leave one out")
        if self.async_checkpoints and not self.kind.background:
            raise ValueError(f"async_checkpoints: {self.name} writes while training waits; leave it out")
        return self

    def _check_captured(self, what: str, other: str) -> None:
        """Raise ValueError for what no CUDA graph works with."""
        if self.micro_batch or self.find_micro_batch or self.recompute or self.tune:
            raise ValueError(
                f"{what} captures CUDA graphs, which does not work with micro-batches, recompute or tune; {other}"
            )
        if self.text != "packed":
            raise ValueError(f"{what} captures CUDA graphs, which needs the few sizes of text: packed; or {other}")


_BUCKETS = 4
"""Text buckets where a recipe wants buckets and does not say how many."""
_SETTINGS = ("fsdp2", "deepspeed_config")
"""Keys that are for one kind of engine each."""


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
        kept = {key: value for key, value in kept.items() if key not in _SETTINGS}
    both = {**kept, **own}
    if isinstance(own.get("fsdp2"), dict):
        both["fsdp2"] = {**kept.get("fsdp2", {}), **own["fsdp2"]}
    return EngineConfig.model_validate(both)
