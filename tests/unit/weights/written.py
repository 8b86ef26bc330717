"""Checkpoints as training engines really write them: functions that run on each of two gloo ranks."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compt.dist import collectives as dist
from compt.models.clip import build
from compt.models.presets import ModelSpec
from compt.train.task import StudentModule

SPEC = ModelSpec(
    name="tiny",
    arch="vit",
    width=24,
    depth=2,
    heads=3,
    text_width=16,
    text_depth=1,
    text_heads=2,
    image_size=8,
    patch_size=4,
    context_length=5,
    vocab_size=11,
    embed_dim=7,
    head_width=8,
    text_head_width=8,
)
FROZEN = "model.visual.conv1.weight"
ORACLE = "oracle.safetensors"
STEPS = 3


def student() -> StudentModule:
    """The module that training wraps: the model and a projector to a teacher of another width."""
    return StudentModule(build(SPEC, seed=3), 9, 4)


def pairs(step: int) -> tuple[Tensor, Tensor]:
    """Two images and a caption of each, other ones on each rank and at each step."""
    generator = torch.Generator().manual_seed(10 * step + dist.rank())
    images = torch.randn(2, 3, SPEC.image_size, SPEC.image_size, generator=generator)
    return images, torch.randint(SPEC.vocab_size, (2, 1, SPEC.context_length), generator=generator)


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """A loss that depends on every parameter."""
    features = [value.float().square().mean() for name, value in outputs.items() if name != "logit_scale"]
    logits = outputs["image"].float() @ outputs["text"][:, 0].float().T * outputs["logit_scale"].float()
    return sum(features, nn.functional.cross_entropy(logits, torch.arange(len(logits))))


class Zero(NamedTuple):
    """How DeepSpeed trains: ZeRO stage, in bfloat16, with FROZEN frozen, with gradients dealt out in turns, with
    gradients summed in fp32 (which gives bfloat16 another optimizer).
    """

    stage: int
    bf16: bool = False
    frozen: bool = False
    round_robin: bool = False
    accumulate_fp32: bool = False


ZEROS = {
    "zero0": Zero(0),
    "zero0-bf16": Zero(0, bf16=True),
    "zero1": Zero(1),
    "zero1-bf16": Zero(1, bf16=True, accumulate_fp32=True),
    "zero2": Zero(2, bf16=True, frozen=True),
    "zero2-robin": Zero(2, round_robin=True),
    "zero3": Zero(3, bf16=True, frozen=True),
}


def write_zeros(folder: str) -> None:
    """For each of ZEROS, train a few steps under DeepSpeed and save; the weights gathered live lie there in ORACLE."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # As an attribute of the package this name is torch itself.
    backend = importlib.import_module("deepspeed.comm.torch")
    vars(backend)["build_shm_op"] = lambda: None  # it would compile for half a minute
    for name, zero in ZEROS.items():
        _write_zero(Path(folder) / name, zero)


def _write_zero(folder: Path, zero: Zero) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    module = student()
    if zero.frozen:
        module.get_parameter(FROZEN).requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 2 * dist.world_size(),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": 1000,
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 3000,
            "round_robin_gradients": zero.round_robin,
        },
        "bf16": {"enabled": zero.bf16},
        "data_types": {"grad_accum_dtype": "fp32"} if zero.accumulate_fp32 else {},
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
    dtype = torch.bfloat16 if zero.bf16 else torch.float32
    for step in range(STEPS):
        images, tokens = pairs(step)
        engine.backward(loss_of(engine(images.to(dtype), tokens)))
        engine.step()
    engine.save_checkpoint(str(folder))
    live = {}
    for name, parameter in engine.module.named_parameters():
        # Without bfloat16 the module holds what the optimizer does. DeepSpeed's own question for it answers with other
        # parameters' values where gradients are dealt out in turns (0.19.8).
        if zero.bf16 and zero.stage and parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter)
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=zero.stage == 3):
                full = parameter.detach().clone()
        live[name] = full.detach().float().clone()
    if dist.is_main():
        save_file(live, folder / ORACLE)


def write_dcp(folder: str) -> None:
    """Train a few steps under FSDP2 and save model, average, optimizer and a number; ORACLE as above."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    module = student()
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.world_size(),)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss_of(module(*pairs(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = module.state_dict()
    average = {name: value * 0.5 for name, value in state.items() if name.startswith("model.")}
    saved = {"student": state, "optim": optimizer.state_dict(), "epoch": 3, "note": {"text": "a"}}
    dcp.save(saved, checkpoint_id=f"{folder}/alone")
    dcp.save({"student": state, "ema": average}, checkpoint_id=f"{folder}/two")
    live = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    if dist.is_main():
        save_file({name: value.detach().contiguous() for name, value in live.items()}, Path(folder) / ORACLE)


def load_deepspeed(path: Path) -> Any:
    """A file of DeepSpeed's, with the classes that it keeps in it, and no others."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location="cpu", weights_only=True)
