"""CLIP models: building, initialization, state."""

from compt.models.clip import Block, ClipModel, build, caption_lengths, materialise, padded_tokens, shardable_blocks
from compt.models.configs import spec_from_open_clip
from compt.models.init import (
    LOGIT_SCALE,
    DrawnState,
    InitRule,
    export_state,
    init_parameters,
    init_tensor,
    linear_rule,
    load_state,
    rule_for,
)
from compt.models.swin import register_swin

__all__ = [
    "LOGIT_SCALE",
    "Block",
    "ClipModel",
    "DrawnState",
    "InitRule",
    "build",
    "caption_lengths",
    "export_state",
    "init_parameters",
    "init_tensor",
    "linear_rule",
    "load_state",
    "materialise",
    "padded_tokens",
    "register_swin",
    "rule_for",
    "shardable_blocks",
    "spec_from_open_clip",
]
