"""torch.compile for the blocks or the towers of a model, and where it keeps what it compiled."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import Tensor

from compt.files import private_folder, user_cache
from compt.models.clip import ClipModel, shardable_blocks
from compt.models.packing import SIZES
from compt.recipe.engine import CAPTURING, Compile, CompileMode

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The variable that says where torch keeps compiled code."""
_VARIANTS = 64
"""Compiled variants of a function that torch keeps."""


def compile_model(model: ClipModel, how: Compile, mode: CompileMode, device: torch.device, hooked: bool = True) -> None:
    """Compile the `blocks` or the `towers` of a model when they first run. Names of parameters stay.

    `hooked`: compile blocks with the hooks that a sharding engine gives them. Raises RunError where the folder of the
    compiler's cache is another user's.
    """
    _keep_compiled_code()
    # All blocks share their code. By default torch keeps 8 compiled variants of it and runs the rest uncompiled, but
    # there are more: first and last blocks, both towers, each stage of a Swin, with and without gradient, and captions
    # of other lengths.
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    options = _options(mode)
    blocks = shardable_blocks(model)
    if how == "towers":
        # DDP would cut the graph of a tower into its buckets, which it cannot where blocks are computed again.
        if model.transformer.grad_checkpointing:
            dynamo.optimize_ddp = False
        if mode in CAPTURING:
            model.text_sizes = SIZES

        def compiled(tower: Callable[..., Tensor]) -> Callable[..., Tensor]:
            packed = tower.__name__ == "_packed_tower"
            # A CPU runs packed attention length by length, uncompiled: there the tower's blocks are compiled instead.
            if packed and device.type != "cuda":
                return tower
            # A graph for each size of packed text: code for any size would not be captured.
            fixed = packed and mode in CAPTURING
            return torch.compile(tower, dynamic=False if fixed else None, **options)

        model.compile_towers(compiled)
        blocks = [] if device.type == "cuda" else list(model.transformer.resblocks)
    for block in blocks:
        if hooked:
            block.compile(**options)
        else:
            block.forward = torch.compile(block.forward, **options)


def forget_compiled() -> None:
    """Drop the compiled code of models that are done.

    All links of a process share the code of their blocks, and their variants count against one limit.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _options(mode: CompileMode) -> dict[str, Any]:
    """The arguments of torch.compile for a mode."""
    if mode not in CAPTURING:
        return {} if mode == "default" else {"mode": mode}
    # The length of padded text changes from step to step, and each would be captured as a graph of its own. So only
    # code for fixed shapes is captured.
    from torch._inductor import list_mode_options

    return {"options": {**list_mode_options(mode), "triton.cudagraph_skip_dynamic_graphs": True}}


def _keep_compiled_code() -> None:
    """Keep compiled code in the user's cache, unless the environment names a place.

    Torch's default is a folder in /tmp with a name that anyone can guess, and the folder holds code that is run. In the
    user's cache a resumed run finds what it compiled before.
    """
    if not os.environ.get(CACHE):
        os.environ[CACHE] = str(private_folder(user_cache("compiled")))
