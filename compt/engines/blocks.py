"""Changes of the blocks of a module, in this order: 1. recompute, 2. compile, 3. an engine's sharding.

None of them changes a parameter's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch._dynamo.config as dynamo
from torch import Tensor, nn

from compt.models.clip import ClipModel, set_buffers, shardable_blocks
from compt.models.init import load_state

_VARIANTS = 64


def models_in(module: nn.Module) -> Iterator[ClipModel]:
    """The CLIP models in a module, itself included."""
    return (model for model in module.modules() if isinstance(model, ClipModel))


def recompute_blocks(module: nn.Module) -> None:
    """Keep only the inputs of blocks, and compute their activations again in backward."""
    for model in models_in(module):
        model.set_grad_checkpointing(True)


def compile_blocks(module: nn.Module, *, hooked: bool = True) -> None:
    """Compile each block in place, with its hooks; without `hooked` only its forward."""
    # All blocks share their code. By default torch keeps 8 compiled variants of it and runs the rest uncompiled, but
    # there are more: first and last blocks, both towers, each stage of a Swin, with and without gradient, and captions
    # of other lengths.
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    for model in models_in(module):
        for block in shardable_blocks(model):
            if hooked:
                block.compile()
            else:
                block.forward = torch.compile(block.forward)


def fill(module: nn.Module, initial: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a module from the "meta" device memory on `device` and the values `initial`, read one tensor at a time.

    Raises ArtefactError when they are not those of the module.
    """
    module.to_empty(device=device)
    for model in models_in(module):
        set_buffers(model)
    load_state(module, initial)


def compute_exactly(device: torch.device) -> None:
    """Turn TF32 off. The loss has to be true fp32, and autocast covers all that TF32 could speed up."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
