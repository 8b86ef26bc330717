"""One process, or DistributedDataParallel over several."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from compt import dist
from compt.engines.base import COMPUTE_DTYPES, AdamWSettings, Precision, decays
from compt.errors import ArtefactError, ConfigError, nearest
from compt.models.clip import ClipModel, shardable_blocks

_MOMENTS = ("exp_avg", "exp_avg_sq")
_LISTED = 8


class DataParallelEngine:
    """Replicates the module on every rank (`Engine` says what each method does).

    The module is moved to `device`; its parameters stay in their dtype. `compile` compiles the transformer blocks in
    place, which leaves parameter names alone; the rest of the module runs as it is.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: AdamWSettings | None = None,
        *,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        compile: bool = False,
    ) -> None:
        if precision not in COMPUTE_DTYPES:
            raise ConfigError(f"unknown precision '{precision}'{nearest(precision, COMPUTE_DTYPES)}")
        settings = settings or AdamWSettings()
        self.rank = dist.rank()
        self.world_size = dist.world_size()
        self.device = torch.device(device)
        self.precision = precision
        self.unwrapped = module.to(self.device)
        if self.device.type == "cuda":
            # The loss has to be true fp32. In bf16 and fp16 autocast already covers all that TF32 could speed up.
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        if compile:
            _compile_blocks(module)
        self.module: nn.Module = module
        if self.world_size > 1:
            self.module = DistributedDataParallel(
                module,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._names = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self._names.items():
            groups[decays(name, parameter)].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": settings.weight_decay if decay else 0.0}
                for decay, parameters in groups.items()
                if parameters
            ],
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self._scaler = GradScaler(self.device.type) if precision == "fp16" else None
        self._norm: Tensor | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to bf16 or fp16; off in fp32."""
        return torch.autocast(self.device.type, COMPUTE_DTYPES[self.precision], enabled=self.precision != "fp32")

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def forward(self, *inputs: Any, last: bool = True) -> dict[str, Tensor]:
        """Outputs of the module. DDP decides here, not in backward, whether gradients will be averaged."""
        with self._sync(last), self.autocast():
            outputs: dict[str, Tensor] = self.module(*inputs)
        return outputs

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward of `loss`, scaled in fp16; averaged over ranks when `last`, here and in the forward before."""
        with self._sync(last):
            (self._scaler.scale(loss) if self._scaler else loss).backward()

    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Total norm (scalar tensor, not waited for) before clipping; in fp16 the gradients are unscaled first."""
        if self._scaler:
            self._scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._names.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=self.device.type == "cuda" or None)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._names.values(), max_norm, norm)
        self._norm = norm
        return norm

    def set_lr(self, lr: float) -> None:
        """The learning rate of every group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> None:
        """AdamW. A non-finite norm leaves parameters and moments as they are, without waiting for the device."""
        norm, self._norm = self._norm, None
        if self._scaler:
            self._scaler.step(self.optimizer)
            self._scaler.update()
            return
        if norm is not None:
            # The fused kernel's own switch, made for GradScaler: a nonzero value turns the step into nothing.
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if norm is not None:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter; zeros before its first step, which is what AdamW itself would start from."""
        state: dict[str, Tensor] = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {key: state[key] for key in ("step", *_MOMENTS)}

    def _live_state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor.detach() for name, tensor in self.unwrapped.state_dict().items()}
        for name, parameter in self._names.items():
            for key, tensor in self._moments(parameter).items():
                state[f"optim.{name}.{key}"] = tensor
        if self._scaler:
            values = self._scaler.state_dict()
            state["scaler.scale"] = torch.tensor(values["scale"], dtype=torch.float64)
            state["scaler.growth_tracker"] = torch.tensor(values["_growth_tracker"], dtype=torch.int64)
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """Contiguous copies, on the device, the same on every rank."""
        return {
            name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self._live_state().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in place. Raises ArtefactError before anything is changed when a name or a shape does not fit."""
        own = self._live_state()
        _check_names(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        if self._scaler:
            values = self._scaler.state_dict()
            values |= {"scale": own["scaler.scale"].item(), "_growth_tracker": int(own["scaler.growth_tracker"].item())}
            self._scaler.load_state_dict(values)


def _check_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} has shape {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ArtefactError("this state is of another model or engine: " + "; ".join(problems[:_LISTED]) + more)


def _compile_blocks(module: nn.Module) -> None:
    for model in module.modules():
        if isinstance(model, ClipModel):
            for block in shardable_blocks(model):
                block.compile()
