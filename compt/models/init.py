"""Initialization as a pure function of (seed, parameter name, element index), distributed as in open_clip and timm.

Element i of a parameter depends only on these three. So the values are the same for every number of ranks and every
way of sharding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from compt.models.presets import ModelSpec
from compt.models.states import State, check_shapes, shapes_of

_CHUNK = 1 << 20


@dataclass(frozen=True)
class InitRule:
    """A distribution: `scale` everywhere, N(0, scale²), U(-scale, scale), or N(0, scale²) within [-bound, bound]."""

    kind: Literal["zeros", "ones", "constant", "normal", "uniform", "trunc_normal"]
    scale: float = 1.0
    bound: float = math.inf


_ZEROS = InitRule("zeros")
_ONES = InitRule("ones")
# timm truncates at the values ±2, which are 100 standard deviations away.
_TIMM = InitRule("trunc_normal", 0.02, 2.0)


def linear_rule(fan_in: int) -> InitRule:
    """The default of nn.Linear and nn.Conv2d, weight and bias alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return InitRule("uniform", fan_in**-0.5)


def rule_for(spec: ModelSpec, name: str, shape: Sequence[int]) -> InitRule:
    """The distribution that open_clip 3.3 (timm 1.0.31 for Swin) gives the parameter `name` of `spec`.

    Raises ValueError for a name that is not a parameter of the model.
    """
    rule = None
    for scalar in spec.scalars:
        if name == scalar.name:
            return InitRule("constant", scalar.initial)
    if name.startswith("visual.trunk.") or name == "visual.head.proj.weight":
        rule = _swin_rule(spec, name, shape)
    elif name.startswith("visual."):
        rule = _vit_rule(spec, name.removeprefix("visual."), shape)
    else:
        rule = _text_rule(spec, name)
    if rule is None:
        raise ValueError(f"no initialization is known for parameter {name}")
    return rule


def _norm_rule(name: str) -> InitRule | None:
    module, _, kind = name.rpartition(".")
    if module.rpartition(".")[2] in ("ln_1", "ln_2", "ln_pre", "ln_post", "ln_final", "norm", "norm1", "norm2"):
        return {"weight": _ONES, "bias": _ZEROS}.get(kind)
    return None


def _bias_rule(name: str, width: int, mlp_ratio: float) -> InitRule | None:
    if name.endswith(("attn.in_proj_bias", "attn.out_proj.bias")):
        return _ZEROS
    if name.endswith("mlp.c_fc.bias"):
        return linear_rule(width)
    if name.endswith("mlp.c_proj.bias"):
        return linear_rule(int(width * mlp_ratio))
    return None


def _vit_rule(spec: ModelSpec, name: str, shape: Sequence[int]) -> InitRule | None:
    if name in ("class_embedding", "positional_embedding", "proj"):
        return InitRule("normal", spec.width**-0.5)
    if name.endswith("attn.in_proj_weight"):
        return InitRule("uniform", math.sqrt(6 / sum(shape)))  # Xavier over the packed [3D, D]
    if name.endswith(("conv1.weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")):
        return linear_rule(math.prod(shape[1:]))
    return _norm_rule(name) or _bias_rule(name, spec.width, spec.mlp_ratio)


def _text_rule(spec: ModelSpec, name: str) -> InitRule | None:
    width = spec.text_width
    into_stream = InitRule("normal", width**-0.5 * (2 * spec.text_depth) ** -0.5)
    weights = {
        "token_embedding.weight": InitRule("normal", 0.02),
        "positional_embedding": InitRule("normal", 0.01),
        "text_projection": InitRule("normal", width**-0.5),
        "in_proj_weight": InitRule("normal", width**-0.5),
        "out_proj.weight": into_stream,
        "c_fc.weight": InitRule("normal", (2 * width) ** -0.5),
        "c_proj.weight": into_stream,
    }
    if name in weights:
        return weights[name]
    if name.startswith("transformer.resblocks."):
        key = ".".join(name.split(".")[4:])
        if key in weights:
            return weights[key]
    return _norm_rule(name) or _bias_rule(name, width, spec.mlp_ratio)


def _swin_rule(spec: ModelSpec, name: str, shape: Sequence[int]) -> InitRule | None:
    if name.startswith("visual.trunk.patch_embed.proj."):
        return linear_rule(3 * spec.patch_size**2)
    if name == "visual.head.proj.weight":
        return linear_rule(shape[1])
    norm = _norm_rule(name)
    if norm is not None:
        return norm
    if name.endswith(".relative_position_bias_table"):
        return _TIMM
    module, _, kind = name.rpartition(".")
    if module.rpartition(".")[2] in ("qkv", "proj", "fc1", "fc2", "reduction"):
        return {"weight": _TIMM, "bias": _ZEROS}.get(kind)
    return None


def _uniform(seed: int, name: str, start: int, count: int) -> Tensor:
    """Elements `start` .. `start + count` of the parameter's own stream: float64 strictly between 0 and 1."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    # Philox gives four 64-bit words for every value of its counter.
    words = np.random.Philox(key=key, counter=start // 4).random_raw(start % 4 + count)[start % 4 :]
    # 52 bits plus one half: exact in float64, symmetric, never 0 or 1, where the inverse normal would be infinite.
    return torch.from_numpy(((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def init_tensor(rule: InitRule, seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """The fp32 values of parameter `name` in `shape`."""
    values = torch.empty(math.prod(shape), dtype=torch.float32)
    if rule.kind in ("zeros", "ones", "constant"):
        values.fill_({"zeros": 0.0, "ones": 1.0}.get(rule.kind, rule.scale))
    else:
        for at, part in enumerate(values.split(_CHUNK)):
            part.copy_(_transform(rule, _uniform(seed, name, at * _CHUNK, len(part))))
    return values.view(tuple(shape))


def _transform(rule: InitRule, uniform: Tensor) -> Tensor:
    if rule.kind == "uniform":
        return uniform.mul_(2).sub_(1).mul_(rule.scale)
    if rule.kind == "trunc_normal":
        low = 0.5 * math.erfc(rule.bound / rule.scale / math.sqrt(2))
        uniform = uniform.mul_(1 - 2 * low).add_(low)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal.mul_(rule.scale).clamp_(-rule.bound, rule.bound)


class DrawnState(State):
    """The parameters of `init_parameters` by name. Each access draws one."""

    def __init__(self, model: nn.Module, spec: ModelSpec, seed: int) -> None:
        self._parts = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._spec, self._seed = spec, seed

    def __getitem__(self, name: str) -> Tensor:
        shape = self._parts[name]
        return init_tensor(rule_for(self._spec, name, shape), self._seed, name, shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without drawing it."""
        return tuple(self._parts[name])


@torch.no_grad()
def init_parameters(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill every parameter of `model` in place, on its own device."""
    drawn = DrawnState(model, spec, seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(drawn[name])


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `model`, one tensor at a time. A learned scalar may have shape () or [1].

    Raises ArtefactError, which lists what is missing, unexpected or of another shape; the model is then unchanged.
    """
    own = model.state_dict()
    check_shapes(shapes_of(own), state, "the weights are not those of this model", any_scalar=True)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name].reshape(parameter.shape))
