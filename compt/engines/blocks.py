"""What is done to the blocks of a module from outside, in this order: recompute, compile, and then an engine's sharding.

None of it changes a parameter's name.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from compt.models.clip import ClipModel, shardable_blocks


def models_in(module: nn.Module) -> Iterator[ClipModel]:
    """The CLIP models in a module, itself included."""
    return (model for model in module.modules() if isinstance(model, ClipModel))


def recompute_blocks(module: nn.Module) -> None:
    """Keep the inputs of blocks only, and compute their activations again in backward."""
    for model in models_in(module):
        model.set_grad_checkpointing(True)


def compile_blocks(module: nn.Module) -> None:
    """Compile each block in place."""
    for model in models_in(module):
        for block in shardable_blocks(model):
            block.compile()
