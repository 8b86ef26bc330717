"""DeepSpeed's JSON file: the recipe's values are filled in, contradictions are errors, the rest goes to DeepSpeed.

The recipe says what is computed. The file says how DeepSpeed shards the state and sends it between processes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from compt.errors import ConfigError
from compt.files import read_text
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.recipe.read import split_batch
from compt.recipe.schema import Recipe

AUTO = "auto"
"""A value that is left to the recipe or, below zero_optimization, to compt's own file for the stage."""

_FILLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "bf16",
    "bfloat16",
    "fp16",
    "torch_autocast",
)
"""Top-level settings that the recipe decides: compared with it, then set by compt."""

_ZERO = "zero_optimization"
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "scheduler": ((), "the learning rate follows the recipe: warmup, then optimizer.schedule"),
    "amp.enabled": ((False,), "set optimizer.precision in the recipe"),
    "torch_autocast.lower_precision_safe_modules": (([],), "optimizer.precision holds for all modules"),
    "communication_data_type": (("fp32",), "gradients are summed in fp32"),
    **dict.fromkeys((f"data_types.{key}_dtype" for key in ("grad_accum", "param", "buffer")), (("fp32",), "fp32 only")),
    "gradient_predivide_factor": ((1,), "it changes sums of gradients"),
    "prescale_gradients": ((False,), "it changes sums of gradients"),
    "gradient_allreduce_op": (("mean",), "the loss is a mean over all processes"),
    "managed_gradient_accumulation": ((True,), "compt says which backward pass is the last of a step"),
    "optimizer.params.adam_w_mode": ((True,), "recipes use AdamW"),
    "optimizer.params.bias_correction": ((True,), "recipes use AdamW"),
    "optimizer.params.amsgrad": ((False,), "recipes use AdamW"),
    "curriculum_learning.enabled": ((False,), "the recipe says what to train on"),
    "data_efficiency.enabled": ((False,), "the recipe says what to train on"),
    "elasticity.enabled": ((False,), "the batch is optimizer.batch, on any number of processes"),
    **dict.fromkeys(("compression_training", "sparse_attention", "weight_quantization"), ((), "it changes the model")),
    "progressive_layer_drop.enabled": ((False,), "it changes the model"),
    **dict.fromkeys(("pipeline", "tensor_parallel", "expert_parallel"), ((), "only ZeRO shards the model")),
    **dict.fromkeys(("sequence_parallel_size", "data_parallel_size"), ((1,), "all processes are data-parallel")),
    **dict.fromkeys(("checkpoint", "datastates_ckpt"), ((), "compt says how checkpoints are written")),
    # DeepSpeed would read it and do nothing, as its own checkpointing function is never called.
    "activation_checkpointing": ((), "set engine.recompute in the recipe instead"),
    "nebula.enabled": ((False,), "compt says how checkpoints are written"),
    f"{_ZERO}.compute_grad_norm": ((True,), "compt skips steps with a norm that is not finite"),
    f"{_ZERO}.elastic_checkpoint": ((False,), "compt resumes on any number of processes without it"),
    f"{_ZERO}.load_from_fp32_weights": ((True,), "compt resumes from fp32 weights"),
    f"{_ZERO}.zero_quantized_weights": ((False,), "it rounds weights"),
    f"{_ZERO}.zero_quantized_nontrainable_weights": ((False,), "it rounds weights"),
    f"{_ZERO}.zero_quantized_gradients": ((False,), "it rounds gradients"),
    f"{_ZERO}.memory_efficient_linear": ((False,), "it replaces torch's linear function in the whole process"),
    f"{_ZERO}.zero_hpz_partition_size": ((1,), "compt cannot save a second copy of the shards"),
    f"{_ZERO}.zenflow": ((), "it updates weights late"),
    # Blocks are called once for each text bucket, and DeepSpeed keeps the gradients of one call of a leaf module alone.
    f"{_ZERO}.leaf_module": ((), "gradients of blocks that are called several times would be lost"),
    **dict.fromkeys(
        (f"{_ZERO}.stage3_module_granularity_threshold", f"{_ZERO}.module_granularity_threshold"),
        ((0,), "gradients of blocks that are called several times would be lost"),
    ),
    f"{_ZERO}.offload_optimizer.device": (("cpu", "none"), "compt cannot save state on NVMe"),
    f"{_ZERO}.offload_param.device": (("cpu", "none"), "compt cannot save state on NVMe"),
    f"{_ZERO}.offload_optimizer.ratio": ((1,), "compt cannot save state of which a part is offloaded"),
    f"{_ZERO}.offload_optimizer.super_offload": ((False,), "it replaces the optimizer"),
}
"""Values of the engine's contract (docs/engines.md), and why. null, "auto" and an empty section are always accepted."""

_OF_STAGE_3 = (f"{_ZERO}.leaf_module", f"{_ZERO}.stage3_", f"{_ZERO}.module_granularity")
"""How settings of the contract begin that other stages do not read."""


SHIPPED = ("ds_configs/zero2_offload.json", "ds_configs/zero3_offload.json")
"""Files that `engine.deepspeed_config` may name where there is no checkout. `engine.name` chooses the others."""


def deepspeed_config(
    engine: EngineConfig, optimizer: Optimizer, world_size: int | None, base: Path = Path()
) -> dict[str, Any]:
    """Return DeepSpeed's settings: the file that the recipe names, completed, or compt's own file for the stage.

    A relative path starts at `base`; the files of `SHIPPED` are found without a checkout. Without `world_size`, what
    depends on it is left out. Raises ConfigError, which names the file, the key, its value and the recipe's.
    """
    stage = engine.kind.stage
    assert stage is not None
    own = (resources.files("compt") / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8")
    text, source = own, f"ds_configs/zero{stage}.json"
    if engine.deepspeed_config is not None:
        path = base / engine.deepspeed_config
        if not path.exists() and engine.deepspeed_config in SHIPPED:  # as in an installed wheel
            path = Path(str(resources.files("compt"))) / engine.deepspeed_config
        source = str(path)
        try:
            text = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{path}: engine.deepspeed_config cannot be read ({reason})") from error
    file = _File(source, text)
    file.check_names()
    if file.get("zero_optimization.stage") is None:
        raise ConfigError(f"{source}: zero_optimization.stage: missing; set it to {stage} for engine.name zero{stage}")
    file.compare("zero_optimization.stage", f"engine.name zero{stage}, which is stage", stage)
    filled = _fill_batches(file, engine, optimizer, world_size)
    _compare_optimizer(file, optimizer)
    _compare_precision(file, optimizer.precision)
    for key, (allowed, why) in _FIXED.items():
        value = None if stage < 3 and key.startswith(_OF_STAGE_3) else file.get(key)
        if value not in (None, AUTO, {}) and not any(_same(value, one) for one in allowed):
            wanted = f"set it to {' or '.join(map(_shown, allowed))}" if allowed else "remove it"
            raise file.error(key, f"{why}; {wanted}")
    passed = _without_auto({key: value for key, value in file.values.items() if key not in _FILLED})
    zero = json.loads(own)["zero_optimization"] | passed["zero_optimization"] | {"stage": stage}
    return passed | filled | {"zero_optimization": zero}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if value not in (None, AUTO)}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}


class _File:
    """The settings of one file. Raises ConfigError for text that is not a JSON object, or has a key twice."""

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        try:
            self.values = json.loads(text, object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source}: is not JSON: {error}") from None
        if not isinstance(self.values, dict):
            raise ConfigError(f"{source}: should be an object of DeepSpeed's settings, not {_shown(self.values)}")

    def _unique(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        for key, _ in items if len(found) < len(items) else ():
            if [name for name, _ in items].count(key) > 1:
                raise ConfigError(f"{self.source}: the key '{key}' is there twice")
        return found

    def get(self, key: str) -> Any:
        """Return the value of a dotted key, None where it is missing."""
        value: Any = self.values
        place: list[str] = []
        for name in key.split("."):
            if not isinstance(value, dict):
                raise self.error(".".join(place), "should be a section: {...}")
            place.append(name)
            value = value.get(name)
            if value in (None, AUTO):
                return value
        return value

    def error(self, key: str, should: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: {_shown(self.get(key))}: {should}")

    def compare(self, key: str, name: str, recipe: Any) -> None:
        """Raise ConfigError unless the value is the recipe's."""
        value = self.get(key)
        if value not in (None, AUTO) and not _same(value, recipe):
            raise self.error(key, f'the recipe has {name} {_shown(recipe)}; make them the same, or write "auto"')

    def check_names(self) -> None:
        """Raise ConfigError for a misspelt setting that compt would set: DeepSpeed ignores unknown top-level keys."""
        known = {*_FILLED, *(key.partition(".")[0] for key in _FIXED)}
        for key in self.values.keys() - known:
            for close in difflib.get_close_matches(key, known, 1, 0.85):
                raise ConfigError(f"{self.source}: {key}: unknown key (did you mean '{close}'?)")


def _fill_batches(file: _File, engine: EngineConfig, optimizer: Optimizer, world_size: int | None) -> dict[str, Any]:
    file.compare("train_batch_size", "optimizer.batch", optimizer.batch)
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    searching = [name for name in ("find_micro_batch", "tune") if getattr(engine, name)]
    for key in keys if searching else ():
        if file.get(key) not in (None, AUTO):
            raise file.error(key, f'engine.{searching[0]} searches for it; write "auto"')
    if world_size is None:
        return {"train_batch_size": optimizer.batch}
    per_rank, micro = split_batch(optimizer.batch, world_size, engine.micro_batch)
    file.compare(keys[0], f"engine.micro_batch, which for {world_size} processes of {per_rank} images each is", micro)
    name = f"optimizer.batch {optimizer.batch} over {world_size} processes in pieces of {micro}, which makes"
    file.compare(keys[1], name, per_rank // micro)
    return {"train_batch_size": optimizer.batch, keys[0]: micro, keys[1]: per_rank // micro}


def _compare_optimizer(file: _File, optimizer: Optimizer) -> None:
    # DeepSpeed clips nothing at 0, the recipe at null.
    if optimizer.clip_grad_norm is not None or file.get("gradient_clipping") != 0:
        file.compare("gradient_clipping", "optimizer.clip_grad_norm", optimizer.clip_grad_norm)
    if str(file.get("optimizer.type") or AUTO).lower() not in ("adamw", "adam", AUTO):
        raise file.error("optimizer.type", "the optimizer of recipes is AdamW")
    for key in ("lr", "eps", "weight_decay"):
        file.compare(f"optimizer.params.{key}", f"optimizer.{key}", getattr(optimizer, key))
    file.compare("optimizer.params.betas", "optimizer.betas", list(optimizer.betas))


def _compare_precision(file: _File, precision: str) -> None:
    for key in ("bf16", "bfloat16", "fp16"):
        if file.get(f"{key}.enabled") not in (None, False, AUTO):
            kind = key.replace("bfloat16", "bf16")
            text = f"the recipe has optimizer.precision {precision}, with weights in fp32; this would keep weights, "
            raise file.error(f"{key}.enabled", f'{text}the logit scale too, in {kind}: remove it, or write "auto"')
    file.compare("torch_autocast.enabled", f"optimizer.precision {precision}, which makes it", precision != "fp32")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    accepted = (None, AUTO, precision, dtype, f"torch.{dtype}")
    if file.get("torch_autocast.enabled") is not False and file.get("torch_autocast.dtype") not in accepted:
        raise file.error("torch_autocast.dtype", f"the recipe has optimizer.precision {precision}")


def check_engines(recipe: Recipe, models: Iterable[str], world_size: int | None, base: Path, where: str) -> None:
    """Check the engine of each model for `world_size` processes; None: the number is not known yet.

    DeepSpeed's files are read and compared with the recipe; relative paths start at `base`. Raises ConfigError, which
    starts with `where`.
    """
    for model in dict.fromkeys(models):
        engine = recipe.engine_of(model)
        try:
            if world_size is not None:
                split_batch(recipe.optimizer.batch, world_size, engine.micro_batch)
                if world_size % (replicas := engine.fsdp2.replicas):
                    raise ConfigError(f"engine.fsdp2.replicas = {replicas} does not divide the {world_size} processes")
            if engine.kind.stage is not None:
                deepspeed_config(engine, recipe.optimizer, world_size, base)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
