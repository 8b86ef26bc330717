"""MACs counted by torch's operator counter, by module and by phase.

The formulas are torch's (`torch.utils.flop_counter`); this only asks whose operation it was: forwards, that of the
parameter among its inputs; backwards, that of the parameter behind its autograd node; without one, attention's, where
an attention's projection came just before, else the loss's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from compt.models.scalars import SCALAR_NAMES

Phase = Literal["forward", "backward", "again"]

# Nodes through which a parameter is looked at before it is multiplied.
_VIEWS = ("TBackward", "TransposeBackward", "ViewBackward", "SliceBackward", "ReshapeAliasBackward", "PermuteBackward")
# Part of a parameter's name -> kind of module; the first that fits.
_KINDS = (
    ("conv1.weight", "patch_embedding"),
    ("patch_embed.proj.", "patch_embedding"),
    ("patch_embed.norm.", "norms"),
    ("downsample.", "merging"),
    ("relative_position_bias_table", "position_biases"),
    ("attn.", "attention_projections"),
    ("mlp.", "mlp"),
    ("ln_final.", "final_norm"),
    (".norm", "norms"),
    (".ln_", "norms"),
    *((name, name) for name in SCALAR_NAMES),
    ("embedding", "embeddings"),
    ("proj", "projection"),
)


class Place(NamedTuple):
    """Where an operation or a parameter belongs."""

    part: str
    tower: str
    module: str


LOSS = Place("loss", "both", "similarities")


def place_of(name: str) -> Place:
    """By the name of a parameter, `teacher.` before it where it is a teacher's, `projector.` a projector's."""
    if name.startswith("projector."):
        return Place("projector", name.split(".")[1], "projection")
    part, name = ("teacher", name.removeprefix("teacher.")) if name.startswith("teacher.") else ("student", name)
    name = "." + name.removeprefix("model.")
    kind = next(kind for piece, kind in _KINDS if piece in name)
    tower = "both" if kind in SCALAR_NAMES else "image" if name.startswith(".visual.") else "text"
    return Place(part, tower, kind)


def parameters_by_place(*modules: nn.Module) -> Counter[Place]:
    """Numbers of all parameters of modules, by where they belong."""
    found: Counter[Place] = Counter()
    for name, parameter in _named(modules):
        found[place_of(name)] += parameter.numel()
    return found


def _named(modules: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    for at, module in enumerate(modules):
        yield from module.named_parameters(prefix="teacher" if at else "")


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


class _Attribution(TorchDispatchMode):
    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        super().__init__()
        named = list(_named(modules))
        self.by_storage = {_storage(parameter): place_of(name) for name, parameter in named}
        self.by_parameter = {id(parameter): place_of(name) for name, parameter in named}
        self.last = LOSS
        self.found: Counter[tuple[Phase, Place]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            node = torch._C._current_autograd_node()
            # A recomputation runs within backward, but with gradients on.
            phase: Phase = "forward" if node is None else "again" if torch.is_grad_enabled() else "backward"
            self.found[phase, self._place((args, kwargs), node)] += count(*args, **(kwargs or {}), out_val=out) / 2
        return out

    def _place(self, inputs: Any, node: Any) -> Place:
        values = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
        places = [self.by_storage[_storage(value)] for value in values if _storage(value) in self.by_storage]
        if not places and node is not None and not torch.is_grad_enabled():
            places = [
                self.by_parameter[id(parameter)] for parameter in _behind(node) if id(parameter) in self.by_parameter
            ]
        if places:
            self.last = places[0]
            return places[0]
        part, tower, kind = self.last
        return Place(part, tower, "attention_matmuls") if kind == "attention_projections" else LOSS


def _behind(node: Any) -> Iterator[Tensor]:
    """The leaves that a node multiplies as they are, or through views alone."""
    for following, _ in node.next_functions:
        if hasattr(following, "variable"):
            yield following.variable
        elif following is not None and following.name().rstrip("0123456789") in _VIEWS:
            yield from _behind(following)


def counted(function: Callable[[], object], *modules: nn.Module) -> Counter[tuple[Phase, Place]]:
    """MACs of all that `function` runs, by phase and place, with attention computed by plain products.

    `modules`: the one that is trained, then those whose parameters are named `teacher.`.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, _Attribution(modules) as found:
        function()
    assert sum(found.found.values()) * 2 == counter.get_total_flops()
    return found.found
