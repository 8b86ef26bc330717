"""Task, teacher and engine of a training job: the one place where they are made, for a run and for a timing of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.engines.base import COMPUTE_DTYPES, Engine
from compt.engines.compiler import compile_model
from compt.engines.graphs import RECORDERS
from compt.engines.open import open_engine
from compt.engines.shards import shard_frozen
from compt.models.clip import ClipModel, build, fill
from compt.models.init import DrawnState
from compt.models.presets import ModelSpec
from compt.plan.jobs import Job
from compt.recipe.chain import Distill
from compt.recipe.engine import CAPTURING, EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.recipe.schema import Recipe
from compt.train.losses import loss_of
from compt.train.task import ClipTask, DistillTask

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What the training step of one job is made from, weights aside.

    `teacher` is None when no teacher takes part; `distill.alpha` is the job's own. `base` is the folder that relative
    paths of the recipe start from. `seed` draws the projectors, and all weights that are not given.
    """

    student: ModelSpec
    teacher: ModelSpec | None = None
    distill: Distill = field(default_factory=Distill)
    optimizer: Optimizer = field(default_factory=Optimizer)
    engine: EngineConfig = field(default_factory=EngineConfig)
    base: Path = Path()
    seed: int = 0

    @classmethod
    def of(cls, job: Job, recipe: Recipe, base: Path) -> Blueprint:
        """The blueprint of a planned job."""
        return cls(
            student=job.spec,
            teacher=job.active_teacher,
            distill=recipe.chain.distill.model_copy(update={"alpha": job.alpha}),
            optimizer=recipe.optimizer,
            engine=recipe.engine_of(job.spec.name),
            base=base,
            seed=job.seed,
        )


def build_training(
    blueprint: Blueprint,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
    teacher_weights: Mapping[str, Tensor] | None = None,
) -> tuple[ClipTask, Engine]:
    """The task of a job and the engine around it. All ranks call it.

    `weights` are the student's before the first step, `teacher_weights` the teacher's; without them they are drawn.
    Raises ArtefactError for weights of another model, ConfigError for settings that contradict each other.
    """
    blueprint = replace(blueprint, engine=_captured(blueprint, device.type))
    # The student starts on the "meta" device, so that an engine that shards never holds the whole of it.
    student = build(blueprint.student, device="meta")
    teacher = None if blueprint.teacher is None else _open_teacher(blueprint, device, teacher_weights)
    task = build_task(blueprint, student, teacher)
    given = DrawnState(student, blueprint.student, blueprint.seed) if weights is None else weights
    engine = open_engine(
        task.module,
        blueprint.engine,
        blueprint.optimizer,
        device=device,
        initial=task.module.initial(given),
        caps=task.caps,
        base=blueprint.base,
    )
    return task, engine


def build_task(blueprint: Blueprint, student: ClipModel, teacher: ClipModel | None = None) -> ClipTask:
    """The task around models that are there already, with the settings of the blueprint."""
    optimizer, engine = blueprint.optimizer, blueprint.engine
    loss = loss_of(optimizer, engine)
    if teacher is None:
        return ClipTask(student, loss, text_buckets=engine.buckets, seed=blueprint.seed)
    return DistillTask(
        student,
        teacher,
        loss,
        alpha=blueprint.distill.alpha,
        reference_compatible=blueprint.distill.reference_compatible,
        teacher_dtype=COMPUTE_DTYPES[optimizer.precision],
        text_buckets=engine.buckets,
        seed=blueprint.seed,
    )


def _captured(blueprint: Blueprint, device: str) -> EngineConfig:
    """The engine's settings on a type of device, without graphs that cannot be captured; says why not, in one line."""
    asked, teacher = blueprint.engine, blueprint.teacher
    engine, why = asked.on(device), f"{device} has no CUDA graphs"
    if engine.compile_mode != asked.compile_mode and dist.is_main():
        _log.warning("engine.compile_mode: %s is %s here: %s", asked.compile_mode, engine.compile_mode, why)
    if asked.graphs == "off":
        return engine
    if device in RECORDERS:
        if teacher is None or teacher.context_length >= blueprint.student.context_length:
            return engine
        why = f"the teacher '{teacher.name}' has a shorter context than '{blueprint.student.name}'"
    if dist.is_main():
        _log.warning("engine.graphs: steps run eagerly: %s", why)
    return engine.model_copy(update={"graphs": "off"})


def _open_teacher(blueprint: Blueprint, device: torch.device, weights: Mapping[str, Tensor] | None) -> ClipModel:
    """The frozen teacher, compiled as the student is: whole on every rank, or with `engine.shard_teacher` in shards."""
    assert blueprint.teacher is not None
    model, engine = build(blueprint.teacher, device="meta"), blueprint.engine
    if engine.compile != "off":
        # Not as CUDA graphs: the next run of one overwrites features that the loss still needs.
        mode = CAPTURING.get(engine.compile_mode, engine.compile_mode)
        compile_model(model, "blocks" if engine.shard_teacher else engine.compile, mode, device)
    given = DrawnState(model, blueprint.teacher, blueprint.seed) if weights is None else weights
    if engine.shard_teacher:
        return shard_frozen(model, given, dtype=COMPUTE_DTYPES[blueprint.optimizer.precision], device=device)
    return fill(model, given, device)
