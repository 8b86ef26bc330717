"""Start DeepSpeed in a process: its accelerator, its process group, and a module that is in shards from the start."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.errors import ConfigError
from compt.models.clip import set_buffers
from compt.models.states import check_shapes, shapes_of


def start_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for `device`, in the process group that there is, or in one of this process alone.

    Raises ConfigError where it is not installed, or serves another kind of device in this process already.
    """
    # Without it DeepSpeed looks for a CUDA compiler, and takes any device that it finds.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cuda":
        # DeepSpeed reads the number of the GPU from it, now and later. Slurm may show each process only its own GPU.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    dist.join_alone(device)
    try:
        deepspeed = importlib.import_module("deepspeed")
        backend = importlib.import_module("deepspeed.comm.torch")
    except ImportError as error:
        hint = "pip install 'compt[deepspeed]'"
        raise ConfigError(f"engine.name zero…: DeepSpeed cannot be imported ({error}): {hint}") from error
    found = deepspeed.accelerator.get_accelerator().device_name()
    if found != device.type:
        raise ConfigError(f"DeepSpeed runs on '{found}' in this process (DS_ACCELERATOR), not on '{device.type}'")
    # DeepSpeed would compile a faster all-reduce for one machine, which takes half a minute.
    vars(backend)["build_shm_op"] = lambda: None
    # Stage 3 reads the configuration before anything else is initialized, and would count one process.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    # Its warnings, for example of a skipped step, are in the metrics.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def check_zero(config: Mapping[str, Any]) -> None:
    """Raise ConfigError, on all ranks, for settings of zero_optimization that DeepSpeed's own model of them refuses."""
    model = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig

    def check() -> None:
        try:
            model(**config["zero_optimization"])
        except ValidationError as error:
            problems = [
                f"zero_optimization.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()
            ]
            raise ConfigError(f"engine.deepspeed_config: DeepSpeed refuses {'; '.join(problems)}") from None

    dist.on_all(check)


def forget_module(module: nn.Module) -> None:
    """Remove a module from DeepSpeed's global lists, which would otherwise keep its shards for ever."""
    debug = importlib.import_module("deepspeed.utils.debug")
    vars(debug).update(module_names={}, param_names={})
    # Its own hooks put it here for each forward.
    stack = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
    stack[:] = [each for each in stack if each is not module]


def destroy(engine: Any) -> None:
    """Remove DeepSpeed's hooks from an engine that is no longer needed, and its modules from a cache of all engines.

    From the second forward pass on, stage 3 fills this cache with what to release when. DeepSpeed never empties it.
    """
    engine.destroy()
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    for function in vars(coordinator.PartitionedParameterCoordinator).values():
        # Another decorator hides the cache.
        for cell in getattr(function, "__closure__", None) or ():
            getattr(cell.cell_contents, "cache_clear", lambda: None)()


@torch.no_grad()
def fill_partitioned(
    deepspeed: ModuleType,
    module: nn.Module,
    initial: Mapping[str, Tensor],
    device: torch.device,
    config: dict[str, Any],
) -> None:
    """Give a module from the "meta" device its values and cut each parameter into shards before the next is read.

    Of the whole module a rank never holds more than one parameter and its own shards. The ranks read the same values.
    """
    own = shapes_of(module.state_dict())
    dist.on_all(lambda: check_shapes(own, initial, "the weights are not those of this model", any_scalar=True))
    cutter = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32)
    for name, parameter in list(module.named_parameters()):
        home, _, key = name.rpartition(".")
        value = initial[name].to(device, torch.float32, copy=True).reshape(parameter.shape)
        whole = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(home), key, whole)
        cutter._convert_to_zero_parameters([whole])
    for part in module.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[key] = torch.empty_like(buffer, device=device)
    set_buffers(module)
    kept = {name for name, _ in module.named_buffers()} & set(module.state_dict())
    for name in kept:
        module.get_buffer(name).copy_(initial[name])
