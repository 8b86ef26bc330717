"""Memory of a GPU for a job of a plan, as its recipe trains it. No torch in here."""

from __future__ import annotations

from compt.cost.memory import Engine, Memory, memory_per_gpu
from compt.plan.jobs import Job
from compt.recipe.read import EngineConfig, Recipe


def memory_of(
    recipe: Recipe,
    job: Job,
    engine: Engine,
    gpus: int,
    *,
    micro_batch: int | None = None,
    recompute: bool = False,
    config: EngineConfig | None = None,
) -> Memory:
    """Bytes of each of `gpus` GPUs that train `job`; `micro_batch` and `config` replace the recipe's."""
    config = config or recipe.engine_of(job.spec.name)
    return memory_per_gpu(
        job.spec,
        job.teacher_spec if job.alpha else None,
        engine=engine,
        world_size=gpus,
        batch=recipe.optimizer.batch,
        captions=recipe.data.captions,
        tokens=recipe.data.caption_tokens,
        precision=recipe.optimizer.precision,
        micro_batch=micro_batch or config.micro_batch,
        recompute=recompute,
        loss_chunk=config.loss_chunk,
        shard_teacher=config.shard_teacher,
        ema=recipe.optimizer.ema is not None,
        replicas=config.fsdp2.replicas if engine == config.name else 1,
        reshard=config.fsdp2.reshard_after_forward or engine != config.name,
    )


def not_modelled(config: EngineConfig) -> tuple[str, ...]:
    """Settings of an engine that change what it holds, and that its memory here does not know."""
    given = {
        "engine.fsdp2.cpu_offload, which takes weights, gradients and moments off the GPU": config.fsdp2.cpu_offload,
        "whole gradients between micro-batches, with engine.fsdp2.reshard_after_forward: false": (
            not config.fsdp2.reshard_after_forward and config.micro_batch is not None
        ),
        "the buckets and offloading of engine.deepspeed_config": config.deepspeed_config is not None,
        "what engine.compile keeps otherwise": config.compile,
    }
    return tuple(text for text, there in given.items() if there)
