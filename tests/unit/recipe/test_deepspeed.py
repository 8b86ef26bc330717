"""DeepSpeed's files against the recipe: what is filled in, passed on, and refused with which message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compt.errors import ConfigError
from compt.recipe.deepspeed import deepspeed_config
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from tests.helpers.process import finish, start

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


def merged(
    folder: Path, text: Any, *, name: str = "zero2", world: int = 2, engine: Any = None, **optimizer: Any
) -> dict[str, Any]:
    """The configuration of a file with `text`, for 64 images a step in bf16."""
    path = folder / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    config = EngineConfig.model_validate({"name": name, "deepspeed_config": "ds.json", **(engine or {})})
    return deepspeed_config(config, Optimizer.model_validate({"batch": 64, **optimizer}), world, folder)


def refused(folder: Path, text: Any, *words: str, **others: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(folder, text, **others)
    message = str(caught.value)
    assert str(folder / "ds.json") in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("stage", range(4))
def test_compts_own_settings_of_a_stage_are_the_files(stage: int) -> None:
    name = f"zero{stage}"
    file = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    engine = EngineConfig.model_validate({"name": name, "micro_batch": 8})
    built_in = deepspeed_config(engine, Optimizer(batch=64), 2)
    named = EngineConfig.model_validate({"name": name, "micro_batch": 8, "deepspeed_config": f"ds_configs/{name}.json"})
    assert built_in == deepspeed_config(named, Optimizer(batch=64), 2, ROOT)
    assert built_in["zero_optimization"] == file["zero_optimization"]
    assert built_in["train_batch_size"] == 64
    assert built_in["train_micro_batch_size_per_gpu"] == 8
    assert built_in["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_accepted_with_any_recipe(name: str) -> None:
    stage = name[:5]
    for optimizer in (Optimizer(), Optimizer(batch=96, clip_grad_norm=1.0, precision="fp16", lr=3e-4)):
        engine = EngineConfig.model_validate({"name": stage, "deepspeed_config": f"ds_configs/{name}"})
        made = deepspeed_config(engine, optimizer, 8, ROOT)
        assert made["zero_optimization"]["stage"] == int(stage[-1])
        assert ("offload_optimizer" in made["zero_optimization"]) == ("offload" in name)
        assert "auto" not in json.dumps(made)


def test_what_is_left_out_or_auto_is_compts(tmp_path: Path) -> None:
    whole = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())["zero_optimization"]
    assert merged(tmp_path, {"zero_optimization": {"stage": 2}})["zero_optimization"] == whole
    zero = {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": False, "allgather_bucket_size": 2e7}
    made = merged(tmp_path, {"zero_optimization": zero})["zero_optimization"]
    assert made == {**whole, "overlap_comm": False, "allgather_bucket_size": 20_000_000}


def test_the_rest_is_passed_on(tmp_path: Path) -> None:
    """Known here or not: a new DeepSpeed may have settings that this version of compt has never heard of."""
    zero = {"stage": 2, "brand_new": [1], "offload_optimizer": {"device": "cpu", "buffer_count": "auto"}}
    text = {"wall_clock_breakdown": True, "flops_profiler": {"enabled": True, "x": "auto"}, "brand_new": {"on": True}}
    made = merged(tmp_path, {**text, "zero_optimization": zero})
    assert made["wall_clock_breakdown"] is True
    assert made["flops_profiler"] == {"enabled": True}
    assert made["brand_new"] == {"on": True}
    assert made["zero_optimization"]["brand_new"] == [1]
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_what_says_the_same_as_the_recipe_is_accepted(tmp_path: Path) -> None:
    text = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "data_efficiency": {"enabled": False, "seed": 1},
        "elasticity": {},
        "zero_optimization": {"stage": 2, "round_robin_gradients": True, "stage3_max_live_parameters": "auto"},
    }
    made = merged(tmp_path, text, engine={"micro_batch": 8}, clip_grad_norm=1.0)
    assert made["zero_optimization"]["round_robin_gradients"] is True
    # The engine sets what the recipe decides, so DeepSpeed does not get it twice.
    assert not set(made) & {"optimizer", "gradient_clipping", "bf16", "fp16", "torch_autocast"}


ZERO = {"stage": 2}
CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"train_batch_size": 32}, {}, ("train_batch_size", "32", "optimizer.batch 64")),
    ({"train_batch_size": True}, {}, ("train_batch_size", "true", "optimizer.batch 64")),
    ({"train_micro_batch_size_per_gpu": 4}, {}, ("train_micro_batch_size_per_gpu", "4", "engine.micro_batch", "32")),
    (
        {"train_micro_batch_size_per_gpu": 4},
        {"engine": {"micro_batch": 8}},
        ("train_micro_batch_size_per_gpu", "4", "engine.micro_batch", "8"),
    ),
    (
        {"gradient_accumulation_steps": 2},
        {"engine": {"micro_batch": 8}},
        ("gradient_accumulation_steps", "2", "pieces of 8", "4"),
    ),
    (
        {"train_micro_batch_size_per_gpu": 8},
        {"engine": {"micro_batch": 8, "find_micro_batch": True}},
        ("train_micro_batch_size_per_gpu", "engine.find_micro_batch"),
    ),
    ({"gradient_clipping": 1.0}, {}, ("gradient_clipping", "1.0", "optimizer.clip_grad_norm null")),
    ({"gradient_clipping": 0}, {"clip_grad_norm": 0.5}, ("gradient_clipping", "0", "optimizer.clip_grad_norm 0.5")),
    ({"gradient_clipping": "much"}, {}, ("gradient_clipping", "much", "optimizer.clip_grad_norm null")),
    ({"optimizer": {"type": "Lamb"}}, {}, ("optimizer.type", "Lamb", "AdamW")),
    ({"optimizer": {"params": {"lr": 0.01}}}, {}, ("optimizer.params.lr", "0.01", "optimizer.lr 0.001")),
    ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, {}, ("optimizer.params.betas", "0.999", "[0.9, 0.98]")),
    ({"optimizer": {"params": {"eps": 1e-6}}}, {}, ("optimizer.params.eps", "1e-06", "optimizer.eps 1e-08")),
    (
        {"optimizer": {"params": {"weight_decay": 0}}},
        {},
        ("optimizer.params.weight_decay", "optimizer.weight_decay 0.1"),
    ),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, {}, ("optimizer.params.adam_w_mode", "false")),
    ({"optimizer": "AdamW"}, {}, ("optimizer", "AdamW", "section")),
    ({"scheduler": {"type": "WarmupLR"}}, {}, ("scheduler", "WarmupLR", "follows the recipe")),
    ({"activation_checkpointing": {"cpu_checkpointing": True}}, {}, ("activation_checkpointing", "engine.recompute")),
    ({"bf16": {"enabled": True}}, {"precision": "fp32"}, ("bf16.enabled", "true", "optimizer.precision fp32")),
    ({"bf16": {"enabled": True}}, {}, ("bf16.enabled", "true", "optimizer.precision bf16", "logit scale")),
    ({"fp16": {"enabled": True}}, {}, ("fp16.enabled", "true", "optimizer.precision bf16")),
    ({"torch_autocast": {"enabled": False}}, {}, ("torch_autocast.enabled", "false", "optimizer.precision bf16")),
    (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        {},
        ("torch_autocast.dtype", "float16", "optimizer.precision bf16"),
    ),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, ("data_types.grad_accum_dtype", "bf16", "fp32")),
    ({"communication_data_type": "fp16"}, {}, ("communication_data_type", "fp16", "fp32")),
    ({"elasticity": {"enabled": True}}, {}, ("elasticity.enabled", "true", "optimizer.batch")),
    ({"tensor_parallel": {"autotp_size": 2}}, {}, ("tensor_parallel", "remove it")),
    ({"managed_gradient_accumulation": False}, {}, ("managed_gradient_accumulation", "false")),
    ({"zero_optimisation": {}}, {}, ("zero_optimisation", "unknown key", "did you mean 'zero_optimization'")),
    ({"zero_optimization": {"stage": 3}}, {}, ("zero_optimization.stage", "3", "engine.name zero2")),
    ({"zero_optimization": {"reduce_bucket_size": 5}}, {}, ("zero_optimization.stage", "missing", "engine.name zero2")),
    (
        {"zero_optimization": {**ZERO, "offload_optimizer": {"device": "nvme"}}},
        {},
        ("zero_optimization.offload_optimizer.device", "nvme", "NVMe", "cpu"),
    ),
    ({"zero_optimization": {**ZERO, "offload_optimizer": {"ratio": 0.5}}}, {}, ("offload_optimizer.ratio", "0.5")),
    ({"zero_optimization": {**ZERO, "offload_optimizer": "cpu"}}, {}, ("offload_optimizer", "section")),
    ({"zero_optimization": {**ZERO, "zero_quantized_gradients": True}}, {}, ("zero_quantized_gradients", "true")),
    ({"zero_optimization": {**ZERO, "compute_grad_norm": False}}, {}, ("compute_grad_norm", "false")),
    ({"zero_optimization": {**ZERO, "elastic_checkpoint": True}}, {}, ("elastic_checkpoint", "true")),
    ({"zero_optimization": [2]}, {}, ("zero_optimization", "section")),
]


@pytest.mark.parametrize(("text", "others", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:50])
def test_a_contradiction_names_both_values(
    tmp_path: Path, text: dict[str, Any], others: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(tmp_path, {"zero_optimization": ZERO, **text}, *words, **others)


@pytest.mark.parametrize(
    ("key", "value"),
    [("leaf_module", {"classes": ["compt.models.clip.Block"]}), ("stage3_module_granularity_threshold", 3000)],
)
def test_blocks_may_not_be_leaves_of_zero_3(tmp_path: Path, key: str, value: Any) -> None:
    """They are called once for each text bucket, and DeepSpeed would keep the gradients of one call."""
    refused(tmp_path, {"zero_optimization": {"stage": 3, key: value}}, key, "would be lost", name="zero3")
    merged(tmp_path, {"zero_optimization": {"stage": 2, key: value}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("not JSON",)),
        ("[]", ("should be an object",)),
        ('{"bf16": {}, "bf16": {}}', ("'bf16' is there twice",)),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', ("'stage' is there twice",)),
        ("[" * 100_000, ("not JSON",)),
    ],
)
def test_what_is_no_sound_file(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused(tmp_path, text, *words)


def test_an_offload_file_is_found_without_a_checkout(tmp_path: Path) -> None:
    name = "ds_configs/zero2_offload.json"
    found = deepspeed_config(EngineConfig(name="zero2", deepspeed_config=name), Optimizer(), 1, tmp_path)
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    own = tmp_path / name
    own.parent.mkdir()
    own.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}')
    found = deepspeed_config(EngineConfig(name="zero2", deepspeed_config=name), Optimizer(), 1, tmp_path)
    assert found["zero_optimization"]["reduce_bucket_size"] == 7


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    engine = EngineConfig.model_validate({"name": "zero1", "deepspeed_config": "no.json"})
    with pytest.raises(ConfigError, match=r"no\.json.*engine\.deepspeed_config"):
        deepspeed_config(engine, Optimizer(), 1, tmp_path)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed: pip install 'compt[deepspeed]'")
def test_deepspeed_names_a_setting_that_it_refuses(tmp_path: Path) -> None:
    assert finish(start(refuse, tmp_path / "said")) == ConfigError.exit_code
    said = (tmp_path / "said").read_text()
    assert "not the first" in said
    assert "engine.deepspeed_config: DeepSpeed refuses zero_optimization.reduce_bucket: " in said


def refuse(said: Path) -> None:
    from compt.engines.zero.start import check_zero

    os.environ["DS_ACCELERATOR"] = "cpu"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    check_zero({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7}})
    sys.stderr.write("not the first\n")
    check_zero({"zero_optimization": {"stage": 2, "reduce_bucket": 5}})


def test_it_needs_no_torch() -> None:
    code = "import sys, compt.recipe.deepspeed\nassert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
