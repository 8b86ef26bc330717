"""The cells of the engine matrix: small models, their tasks and batches, and training with one engine on one rank."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.engines.base import Engine, Precision
from compt.models.clip import build
from compt.models.presets import ModelSpec, resolve
from compt.recipe.chain import Distill
from compt.recipe.engine import ENGINES as KINDS
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Ema, Optimizer
from compt.train.accumulate import cached_backward
from compt.train.build import Blueprint, build_training
from compt.train.task import ClipTask

ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
WORLDS = (1, 2, 4)
ACCUMULATIONS = (1, 4)
TASKS = {
    "contrastive": None,
    "distillation": 16,
    "projector": 24,
    "sharded teacher": 24,
}
"""Width of the teacher's embedding, or None without a teacher. The student's width is 16."""
SIGLIP = "siglip"
"""Another task, of the sigmoid loss without a teacher. The tests run cells of it; the measured matrix has none."""
ARCHITECTURES = ("vit", "swin")

OPTIONS: dict[str, dict[str, Any]] = {
    "text: padded": {"text": "padded"},
    "text: buckets": {"text": "buckets", "text_buckets": 2},
    "text: packed": {"text": "packed"},
    "loss_chunk: 4": {"loss_chunk": 4},
    "recompute": {"recompute": True},
    "compile: blocks": {"compile": "blocks"},
    "compile: towers": {"compile": "towers"},
}
"""Fields of `engine` that change how a step is computed. Each is tried on two processes."""
OPTION_TASKS = ("contrastive", "projector")

DS_CONFIGS = {f"zero{stage}": f"zero{stage}.json" for stage in (1, 2, 3)}
"""Files of `benchmarks/engines/ds_configs`. The files for real models would put a tiny model in one bucket and never
partition its weights."""

STEPS = 3
SAMPLES, CAPTIONS, TOKENS = 16, 2, 10
"""The global batch: images, captions per image, tokens of the longest caption."""
SEED = 0
LR = (2e-3, 3e-3, 3e-3)
MAX_NORM = 4.0
"""Below every gradient norm here, so that every step clips."""
ALPHA = 500.0
EMA_DECAY = 0.5
OPTIMIZER = Optimizer(
    batch=SAMPLES, eps=1e-4, weight_decay=0.1, clip_grad_norm=MAX_NORM, precision="fp32", ema=Ema(decay=EMA_DECAY)
)
"""The eps is large: the exact gradient of a key bias is zero, and a small eps would turn its noise into steps."""

_SIZES = {
    "image_size": 16,
    "context_length": TOKENS,
    "vocab_size": 64,
    "embed_dim": 16,
    "text_width": 32,
    "text_head_width": 16,
    "text_depth": 2,
}
SPECS: dict[str, ModelSpec] = {
    "vit": resolve("vit_pico", {**_SIZES, "head_width": 16}),
    # Windows of 4 on a side of 8: the second block has shifted windows, and one patch merging follows.
    "swin": resolve("swin_t", {**_SIZES, "patch_size": 2, "width": 16, "head_width": 8, "window": 4, "depths": (2, 1)}),
}


@dataclass(frozen=True)
class Cell:
    """One engine, number of processes, number of micro-batches (`accumulation`), task, architecture and option."""

    engine: str
    world_size: int
    accumulation: int = 1
    task: str = "contrastive"
    architecture: str = "vit"
    option: str = ""

    def __str__(self) -> str:
        processes = "process" if self.world_size == 1 else "processes"
        pieces = f", {self.accumulation} micro-batches" if self.accumulation > 1 else ""
        option = f", {self.option}" if self.option else ""
        return f"{self.engine}, {self.world_size} {processes}{pieces}, {self.task}, {self.architecture}{option}"


def cells(engine: str, world_size: int) -> list[Cell]:
    """All cells that one group of processes runs."""
    return [
        Cell(engine, world_size, accumulation, task, architecture)
        for architecture in ARCHITECTURES
        for task in TASKS
        for accumulation in ACCUMULATIONS
    ]


def option_cells(engine: str) -> list[Cell]:
    """The cells of every option that works with this engine."""
    fitting = [option for option in OPTIONS if not (option == "compile: towers" and "weights" in KINDS[engine].shards)]
    return [Cell(engine, 2, 1, task, option=option) for option in fitting for task in OPTION_TASKS]


def start(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """A model's initial fp32 values by name, with biases and norms moved away from 0 and 1.

    Zeros and ones hide mistakes: weight decay does not change a bias of 0.
    """
    generator = torch.Generator().manual_seed(seed + 100)
    values = {name: value.detach().clone() for name, value in build(spec, seed=seed).state_dict().items()}
    for name, value in values.items():
        if value.ndim == 1 and "logit_scale" not in name:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return values


def specs(cell: Cell) -> tuple[ModelSpec, ModelSpec | None]:
    """Student and teacher."""
    width = TASKS.get(cell.task)
    student = SPECS[cell.architecture]
    if cell.task == SIGLIP:
        student = replace(student, loss="siglip")
    return student, None if width is None else replace(student, embed_dim=width)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """The global batch of each step: images [N, 3, H, W], captions [N, M, T] of 3 to T tokens."""
    generator = torch.Generator().manual_seed(SEED + 5)
    positions = torch.arange(TOKENS)
    for _ in range(STEPS):
        images = torch.randn(SAMPLES, 3, _SIZES["image_size"], _SIZES["image_size"], generator=generator)
        tokens = torch.randint(1, 62, (SAMPLES, CAPTIONS, TOKENS), generator=generator)
        lengths = torch.randint(3, TOKENS + 1, (SAMPLES, CAPTIONS, 1), generator=generator)
        yield images, tokens.masked_fill(positions >= lengths, 0).masked_fill(positions == lengths - 1, 63)


def blueprint(cell: Cell, precision: Precision = "fp32", **settings: Any) -> Blueprint:
    """The blueprint of a cell. `settings` are more fields of the recipe's `engine`."""
    student, teacher = specs(cell)
    if cell.engine in DS_CONFIGS:
        settings["deepspeed_config"] = DS_CONFIGS[cell.engine]
    # The text of a ViT's cells is packed, that of a Swin's is in buckets.
    text = {"text": "packed"} if cell.architecture == "vit" else {"text_buckets": 2}
    settings |= text | OPTIONS.get(cell.option, {})
    settings |= {"name": cell.engine, "micro_batch": SAMPLES // cell.world_size // cell.accumulation}
    return Blueprint(
        student=student,
        teacher=teacher,
        distill=Distill(alpha=ALPHA),
        optimizer=OPTIMIZER.model_copy(update={"precision": precision, "loss": student.loss}),
        engine=EngineConfig(device="cpu", shard_teacher=cell.task == "sharded teacher", **settings),
        base=Path(__file__).parent / "ds_configs",
        seed=SEED,
    )


def open_cell(cell: Cell, precision: Precision = "fp32", **settings: Any) -> tuple[ClipTask, Engine]:
    """Build task and engine as a run does; `settings` as in `blueprint`."""
    plan = blueprint(cell, precision, **settings)
    teacher = None if plan.teacher is None else start(plan.teacher, SEED + 1)
    return build_training(plan, torch.device("cpu"), start(plan.student, SEED), teacher)


@dataclass
class Trained:
    """What one rank saw: loss and norm of each step, gradients of the first and last step, the final weights."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


def train(cell: Cell, precision: Precision = "fp32", **settings: Any) -> Trained:
    """Train a cell for STEPS steps on this rank's share of each batch. All ranks must call it."""
    task, engine = open_cell(cell, precision, **settings)
    share = SAMPLES // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    micro = share // cell.accumulation
    found = Trained([], [], [], {}, {})
    for step, (images, tokens) in enumerate(batches()):
        loss, _ = cached_backward(task, engine, images[own], tokens[own], micro)
        found.losses.append(dist.all_reduce_sum(loss.item()) / dist.world_size())
        if step in (0, STEPS - 1):
            found.gradients.append(dict(engine.gradients()))
        found.norms.append(float(engine.step(LR[step], MAX_NORM)))
    found.weights = dict(engine.weights())
    found.average = dict(engine.weights(average=True))
    del engine, task
    gc.collect()  # DeepSpeed's objects refer to each other in cycles
    return found
