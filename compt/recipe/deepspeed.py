"""DeepSpeed's JSON files: read strictly, filled in from the recipe, refused where they contradict it. No torch in here.

A recipe says what is computed; such a file says how DeepSpeed cuts the state up and sends it around. Whatever else it
may say has to be what the recipe says, or what DeepSpeed does unasked: nothing in it is passed over in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from compt.errors import ConfigError, nearest
from compt.recipe.engine import EngineConfig
from compt.recipe.read import split_batch
from compt.recipe.schema import Optimizer, Recipe

AUTO = "auto"
"""A value that is left to the recipe or, below zero_optimization, to the file of ds_configs."""

_ELSEWHERE = {
    "scheduler": "the learning rate follows the recipe: a warm-up and a cosine",
    "activation_checkpointing": "set engine.recompute in the recipe instead",
    "flops_profiler": "compt plan and the metrics have these numbers",
    "tensorboard": "compt writes its own curves",
    "wandb": "compt writes its own metrics",
    "comet": "compt writes its own metrics",
    "csv_monitor": "compt writes its own metrics",
    "comms_logger": "DeepSpeed's log is not shown",
    "steps_per_print": "DeepSpeed's log is not shown; set engine.log_every in the recipe instead",
    "timers": "DeepSpeed's log is not shown",
    "autotuning": "set engine.find_micro_batch in the recipe instead",
    "compile": "set engine.compile in the recipe instead",
    "checkpoint": "compt's checkpoints are set in the recipe: engine.checkpoint_every and its neighbours",
    "datastates_ckpt": "compt writes the files of checkpoints itself",
    "elasticity": "DeepSpeed has it no more; compt resumes on any number of processes without it",
    "aio": "offloading to NVMe is not supported",
    "data_efficiency": "the recipe says what is trained on",
    "curriculum_learning": "the recipe says what is trained on",
    "hybrid_engine": "it is for generating text",
    "pipeline": "models are not cut up into stages",
    "tensor_parallel": "tensors are cut up by ZeRO alone",
    "expert_parallel": "there are no experts in these models",
    "sequence_parallel_size": "sequences are not cut up",
    "data_parallel_size": "all processes are data-parallel",
    "weight_quantization": "it changes the numbers",
    "amp": "set optimizer.precision in the recipe instead",
    "seq_parallel_communication_data_type": "sequences are not cut up",
    "log_level": "DeepSpeed's log is not shown",
}
"""DeepSpeed's sections and settings that have no place here. Empty, or with `enabled` false, they are accepted."""

_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "communication_data_type": (None, "fp32"),
    "prescale_gradients": (False,),
    "gradient_predivide_factor": (1,),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "disable_allgather": (False,),
    "disable_python_gc": (False,),
    "dataloader_drop_last": (False,),
    "dump_state": (False,),
    "wall_clock_breakdown": (False,),
    "memory_breakdown": (False,),
    "use_data_before_expert_parallelism": (False,),
    "zero_allow_untested_optimizer": (False, True),
    "zero_force_ds_cpu_optimizer": (False,),
}
"""Settings that may stand there with the value that holds anyway."""

_COMPARED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "bfloat16",
    "fp16",
    "torch_autocast",
    "data_types",
    "zero_optimization",
)

_COUNTS = {
    "reduce_bucket_size": (1, 2),
    "allgather_bucket_size": (1, 2),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
}
_SWITCHES = {
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "overlap_comm": (1, 2, 3),
    "allgather_partitions": (1, 2),
    "use_multi_rank_bucket_allreduce": (1, 2),
    "ignore_unused_parameters": (2,),
    "round_robin_gradients": (1, 2),
    "parameter_alignment": (1, 2),
    "stage3_use_all_reduce_for_fetch_params": (3,),
    "stage3_allgather_sequential": (3,),
    "enable_sanity_checks": (3,),
}
_COUNTS["reduce_bucket_size"] = (1, 2, 3)
_OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
_ZERO_AS_IT_IS: dict[str, tuple[Any, ...]] = {
    "compute_grad_norm": (True,),
    "load_from_fp32_weights": (True,),
    "elastic_checkpoint": (False,),
    "legacy_stage1": (False,),
    "zero_hpz_partition_size": (1,),
    "zero_quantized_weights": (False,),
    "zero_quantized_gradients": (False,),
    "zero_quantized_nontrainable_weights": (False,),
    "memory_efficient_linear": (False,),
    "pipeline_loading_checkpoint": (False,),
    "override_module_apply": (True,),
    "log_trace_cache_warnings": (False,),
    "stage3_gather_16bit_weights_on_model_save": (False,),
    "stage3_module_granularity_threshold": (0,),
    "zenflow": (None,),
}
_RENAMED = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
}


def deepspeed_config(
    engine: EngineConfig, optimizer: Optimizer, world_size: int | None, base: Path = Path()
) -> dict[str, Any]:
    """What DeepSpeed is told for `engine.name`: the file that the recipe names, or compt's own for the stage.

    A relative path starts at `base`. Without `world_size`, what depends on it is left out. Raises ConfigError naming
    the file, the key, its value and the recipe's.
    """
    stage = engine.kind.stage
    assert stage is not None
    own = _parse(_own_text(stage), f"ds_configs/zero{stage}.json")
    if engine.deepspeed_config is None:
        given, source = own, f"ds_configs/zero{stage}.json"
    else:
        path = base / engine.deepspeed_config
        given, source = _parse(_read(path), str(path)), str(path)
    file = _File(source)
    file.known(given)
    filled = _batches(file, given, engine, optimizer, world_size)
    _clipping(file, given, optimizer)
    _optimizer(file, file.section(given, "optimizer"), optimizer)
    _precision(file, given, optimizer)
    zero = _zero(file, file.section(given, "zero_optimization"), stage, own["zero_optimization"])
    return {**filled, "zero_optimization": zero}


def _own_text(stage: int) -> str:
    return (resources.files("compt") / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: engine.deepspeed_config cannot be read ({reason})") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise ConfigError(f"{source}: the key '{key}' stands twice")
            found[key] = value
        return found

    def constant(word: str) -> Any:
        raise ConfigError(f"{source}: {word} is no number of JSON")

    try:
        found = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: should be an object of DeepSpeed's settings, not {_shown(found)}")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(one: Any, other: Any) -> bool:
    """Equal, where true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


class _File:
    """Says of a value in a file what is wrong with it."""

    def __init__(self, source: str) -> None:
        self.source = source

    def error(self, key: str, value: Any, should: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: {_shown(value)}: {should}")

    def section(self, given: Mapping[str, Any], key: str, place: str = "") -> dict[str, Any]:
        value = given.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(place + key, value, "should be a section: {...}")
        return value

    def unknown(self, place: str, key: str, choices: Mapping[str, Any] | tuple[str, ...]) -> ConfigError:
        return ConfigError(f"{self.source}: {place}{key}: unknown key{nearest(key, choices)}")

    def compare(self, key: str, value: Any, name: str, recipe: Any, equal: Callable[[Any, Any], bool] = _same) -> None:
        if value is not None and value != AUTO and not equal(value, recipe):
            raise self.error(key, value, f'the recipe has {name} {_shown(recipe)}; make them the same, or say "auto"')

    def fixed(self, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if value != AUTO and not any(_same(value, one) for one in allowed):
            raise self.error(key, value, f"not supported here; only {' or '.join(map(_shown, allowed))} is")

    def known(self, given: Mapping[str, Any]) -> None:
        """Only keys of DeepSpeed's, and of those that are not used here only what changes nothing."""
        for key, value in given.items():
            if key in _ELSEWHERE:
                off = isinstance(value, dict) and (not value or value.get("enabled") is False)
                switched = isinstance(value, dict) and value and not any(value.values())
                if value not in (None, AUTO) and not off and not switched:
                    raise self.error(key, value, f"not used here: {_ELSEWHERE[key]}; leave it out")
            elif key in _AS_IT_IS:
                self.fixed(key, value, _AS_IT_IS[key])
            elif key not in _COMPARED:
                raise self.unknown("", key, (*_COMPARED, *_ELSEWHERE, *_AS_IT_IS))


def _batches(
    file: _File, given: Mapping[str, Any], engine: EngineConfig, optimizer: Optimizer, world_size: int | None
) -> dict[str, Any]:
    file.compare("train_batch_size", given.get("train_batch_size"), "optimizer.batch", optimizer.batch)
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for key in keys if engine.find_micro_batch else ():
        if given.get(key) not in (None, AUTO):
            raise file.error(key, given[key], 'the recipe looks for it (engine.find_micro_batch); say "auto"')
    if world_size is None:
        return {"train_batch_size": optimizer.batch}
    per_rank, micro = split_batch(optimizer.batch, world_size, engine.micro_batch)
    name = f"engine.micro_batch, which over {world_size} processes of {per_rank} pictures each is"
    file.compare(keys[0], given.get(keys[0]), name, micro)
    name = f"optimizer.batch {optimizer.batch} over {world_size} processes in pieces of {micro}, which makes"
    file.compare(keys[1], given.get(keys[1]), name, per_rank // micro)
    return {"train_batch_size": optimizer.batch, keys[0]: micro, keys[1]: per_rank // micro}


def _clipping(file: _File, given: Mapping[str, Any], optimizer: Optimizer) -> None:
    value, recipe = given.get("gradient_clipping"), optimizer.clip_grad_norm
    if value not in (None, AUTO) and not _number(value):
        raise file.error("gradient_clipping", value, 'should be a number, or "auto"')
    file.compare(
        "gradient_clipping", value, "optimizer.clip_grad_norm", recipe, lambda one, other: one == (other or 0.0)
    )


def _optimizer(file: _File, given: Mapping[str, Any], optimizer: Optimizer) -> None:
    for key in given:
        if key not in ("type", "params", "legacy_fusion"):
            raise file.unknown("optimizer.", key, ("type", "params"))
    file.fixed("optimizer.legacy_fusion", given.get("legacy_fusion", False), (False,))
    kind = given.get("type", "AdamW")
    params = file.section(given, "params", "optimizer.")
    if not isinstance(kind, str) or kind.lower() not in ("adamw", "adam", AUTO):
        raise file.error("optimizer.type", kind, "the optimizer of recipes is AdamW")
    for key, value in params.items():
        place = f"optimizer.params.{key}"
        if key in ("lr", "eps", "weight_decay"):
            file.compare(place, value, f"optimizer.{key}", getattr(optimizer, key))
        elif key == "betas":
            file.compare(place, value, "optimizer.betas", list(optimizer.betas))
        elif key in ("adam_w_mode", "bias_correction", "fp32_optimizer_states"):
            file.fixed(place, value, (True,))
        elif key == "amsgrad":
            file.fixed(place, value, (False,))
        elif key == "torch_adam":
            file.fixed(place, value, (True, False))
        else:
            raise file.unknown("optimizer.params.", key, ("lr", "betas", "eps", "weight_decay", "torch_adam"))


def _precision(file: _File, given: Mapping[str, Any], optimizer: Optimizer) -> None:
    recipe = optimizer.precision
    for key in ("bf16", "bfloat16", "fp16"):
        enabled = file.section(given, key).get("enabled", False)
        kind = key.replace("bfloat16", "bf16")
        if enabled not in (True, False, AUTO):
            raise file.error(f"{key}.enabled", enabled, 'should be true, false or "auto"')
        if enabled is True and recipe != kind:
            raise file.error(f"{key}.enabled", True, f"the recipe has optimizer.precision {recipe}")
        if enabled is True:
            should = (
                f"would keep the weights themselves in {kind}, the logit scale too; with optimizer.precision {recipe} "
                f'they are fp32, and {kind} is what is computed in: leave the section out, or say "auto"'
            )
            raise file.error(f"{key}.enabled", True, should)
    autocast = file.section(given, "torch_autocast")
    for key in autocast:
        if key not in ("enabled", "dtype", "lower_precision_safe_modules"):
            raise file.unknown("torch_autocast.", key, ("enabled", "dtype"))
    name = f"optimizer.precision {recipe}, which makes it"
    file.compare("torch_autocast.enabled", autocast.get("enabled"), name, recipe != "fp32")
    long = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[recipe]
    dtype = autocast.get("dtype")
    if dtype not in (None, AUTO, recipe, long, f"torch.{long}") and autocast.get("enabled") is not False:
        raise file.error("torch_autocast.dtype", dtype, f"the recipe has optimizer.precision {recipe}")
    file.fixed("torch_autocast.lower_precision_safe_modules", autocast.get("lower_precision_safe_modules"), (None, []))
    for key, value in file.section(given, "data_types").items():
        if key not in ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"):
            raise file.unknown("data_types.", key, ("grad_accum_dtype", "param_dtype", "buffer_dtype"))
        file.fixed(f"data_types.{key}", value, (None, "fp32") if key.endswith("dtype") else (None,))


def _zero(file: _File, given: Mapping[str, Any], stage: int, own: Mapping[str, Any]) -> dict[str, Any]:
    file.compare("zero_optimization.stage", given.get("stage"), f"engine.name zero{stage}, which is stage", stage)
    if given.get("stage") is None:
        raise ConfigError(
            f"{file.source}: zero_optimization.stage: missing; with engine.name zero{stage} it is {stage}"
        )
    result = dict(own)
    choices = {**_COUNTS, **_SWITCHES, **_OFFLOADS}
    for key, value in given.items():
        place = f"zero_optimization.{key}"
        if key == "stage":
            continue
        if key in _RENAMED:
            raise file.error(place, value, f"write it as zero_optimization.{_RENAMED[key]}")
        if key in _ZERO_AS_IT_IS:
            file.fixed(place, value, _ZERO_AS_IT_IS[key])
            continue
        if key not in choices:
            raise file.unknown("zero_optimization.", key, {"stage": 0, **choices, **_ZERO_AS_IT_IS})
        if stage not in choices[key] and value not in (None, AUTO):
            stages = " and ".join(map(str, choices[key]))
            raise file.error(place, value, f"is for stage {stages}, not for engine.name zero{stage}")
        if value in (None, AUTO):
            continue
        result[key] = _zero_value(file, place, key, value)
    return result


def _zero_value(file: _File, place: str, key: str, value: Any) -> Any:
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise file.error(place, value, 'should be true, false or "auto"')
        return value
    if key in _COUNTS:
        lowest = 2 if key.endswith("_bucket_size") else 0
        if not _number(value) or value != int(value) or value < lowest or (key[:9] == "allgather" and value % 2):
            even = " even" if key.startswith("allgather") else ""
            raise file.error(place, value, f"should be a whole{even} number of elements, at least {lowest}")
        return int(value)
    if not isinstance(value, dict):
        raise file.error(place, value, "should be a section: {...}")
    for name, setting in value.items():
        if name == "device":
            if setting == "nvme":
                raise file.error(f"{place}.device", setting, "NVMe is not supported; take cpu")
            file.fixed(f"{place}.device", setting, ("cpu", "none"))
        elif name == "pin_memory":
            if not isinstance(setting, bool):
                raise file.error(f"{place}.pin_memory", setting, "should be true or false")
        elif name == "ratio":
            file.fixed(f"{place}.ratio", setting, (1,))
        elif name in ("pipeline_read", "pipeline_write", "fast_init", "super_offload"):
            file.fixed(f"{place}.{name}", setting, (False,))
        else:
            raise file.unknown(f"{place}.", name, ("device", "pin_memory"))
    return dict(value)


def check_engines(recipe: Recipe, models: Iterable[str], world_size: int | None, base: Path, where: str) -> None:
    """Raise ConfigError, beginning with `where`, for the engine of a model that cannot run on `world_size` processes.

    Files are read and held against the recipe; relative paths start at `base`. None: the number is not known yet, and
    what depends on it is left out.
    """
    for model in dict.fromkeys(models):
        engine = recipe.engine_of(model)
        try:
            if world_size is not None:
                split_batch(recipe.optimizer.batch, world_size, engine.micro_batch)
                if world_size % engine.fsdp2.replicas:
                    raise ConfigError(
                        f"engine.fsdp2.replicas = {engine.fsdp2.replicas} does not divide the {world_size} processes"
                    )
            if engine.kind.stage is not None:
                deepspeed_config(engine, recipe.optimizer, world_size, base)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
