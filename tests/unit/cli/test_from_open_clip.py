"""A recipe from OpenCLIP's arguments: its fields, its model, its learning rates, and a fate for every flag."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from open_clip_train.params import parse_args
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from typer.testing import CliRunner

from compt.cli.from_open_clip import AUGMENT, LOST, NEEDLESS, SAME, TAKEN, recipe_of
from compt.cli.main import app
from compt.errors import ConfigError
from compt.models.clip import build
from compt.plan.jobs import make_plan
from compt.recipe.read import load_recipe, parse_recipe
from compt.recipe.schema import Augment, Recipe
from compt.recipe.types import Duration
from compt.train.loop import learning_rate
from tests.unit.train.test_loop import SETTINGS, replace

DATA = ["--train-data", "a/{00..10}.tar", "--train-num-samples", "64000", "--warmup", "10"]


def made(*words: str, gpus: int = 1) -> tuple[Recipe, dict[str, str]]:
    values, rows = recipe_of([*DATA, *words], gpus)
    return parse_recipe(yaml.safe_load(yaml.safe_dump(values))), dict(rows)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32-quickgelu", "ViT-S-16", "ViT-L-14-336"])
def test_the_model_is_open_clips(name: str) -> None:
    recipe, _ = made("--model", name)
    (spec,) = recipe.family.specs().values()
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(
            **{k: v for k, v in open_clip.get_model_config(name).items() if k != "custom_text"}
        )
    ours = build(spec, device="meta").state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items() if k != "logit_scale"} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items() if k in ours and k != "logit_scale"
    }
    assert spec.quick_gelu == name.endswith("quickgelu")


def test_every_field() -> None:
    words = ["--model", "ViT-B-16", "--batch-size", "64", "--accum-freq", "2", "--epochs", "10", "--warmup", "100"]
    words += [
        "--wd",
        "0.1",
        "--grad-clip-norm",
        "1",
        "--precision",
        "amp_bf16",
        "--siglip",
        "--workers",
        "3",
        "--seed",
        "7",
    ]
    words += [
        "--name",
        "my run",
        "--workers",
        "3",
        "--grad-checkpointing",
        "--imagenet-v2",
        "v2",
        "--val-data",
        "v.tar::w.tar",
    ]
    words += ["--zeroshot-frequency", "3", "--val-frequency", "2", "--aug-cfg", "scale=(0.4,1)", "color_jitter=0.3"]
    words += ["--image-mean", "0.5", "--lock-image", "--report-to", "wandb", "--distill-mod", "ViT-L-14"]
    recipe, rows = made(*words, gpus=8)
    optimizer, engine, link = recipe.optimizer, recipe.engine, recipe.chain.links[0]
    assert (optimizer.batch, engine.micro_batch, engine.workers) == (1024, 64, 3)
    # What OpenCLIP takes by default for a ViT.
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (5e-4, (0.9, 0.98), 1e-6, 0.1)
    assert (optimizer.clip_grad_norm, optimizer.precision, optimizer.loss) == (1, "bf16", "siglip")
    assert (recipe.name, recipe.seed, engine.recompute) == ("my_run", 7, True)
    assert (link.train.epochs, link.warmup.steps) == (10, 100)
    data, evaluation = recipe.data, recipe.evaluation
    assert (data.images, data.captions, data.crop_scale, data.mean) == (64_000, 1, (0.4, 1.0), (0.5, 0.5, 0.5))
    assert (evaluation.validation, evaluation.every and evaluation.every.epochs) == (["v.tar", "w.tar"], 2)
    assert [(item.name, item.role, item.class_order, item.data) for item in evaluation.sets] == [
        ("imagenet_v2", "select", "number", ["v2/ImageNetV2-matched-frequency"])
    ]
    assert "`classnames`" in rows["--imagenet-v2"]
    assert rows["--lock-image"] == "NOT TAKEN OVER"
    assert rows["--distill-model"].startswith("NOT TAKEN OVER: a link learns")  # argparse takes a flag's beginning
    assert rows["--aug-cfg color_jitter"].startswith("without effect in OpenCLIP")
    assert data.augment == Augment()
    assert (rows["--report-to"], engine.loggers) == ("engine.loggers", ["wandb"])


SIMCLR = Augment(brightness=0.3, contrast=0.3, saturation=0.2, hue=0.1, jitter=0.8, grey=0.2)


@pytest.mark.parametrize(
    ("given", "crop_ratio", "augment"),
    [
        ("color_jitter=(0.3,0.3,0.2,0.1) color_jitter_prob=0.8 gray_scale_prob=0.2 ratio=(0.5,2.0)", 0.75, SIMCLR),
        (
            "use_timm=True color_jitter=0.4 color_jitter_prob=0.8 gray_scale_prob=0.2 ratio=(0.5,2.0)",
            0.5,
            Augment(brightness=0.4, contrast=0.4, saturation=0.4),
        ),
    ],
)
def test_augmentation_is_what_open_clip_makes_of_its_keys(given: str, crop_ratio: float, augment: Augment) -> None:
    words = given.split()
    recipe, rows = made("--model", "ViT-B-16", "--aug-cfg", *words, "re_prob=0.1")
    assert (recipe.data.crop_ratio[0], recipe.data.augment) == (crop_ratio, augment)
    assert rows["--aug-cfg re_prob"] == "NOT TAKEN OVER: no random erasing"
    # OpenCLIP's own transform has a step for what is taken over, and for nothing else.
    config = parse_args(["--model", "ViT-B-16", "--aug-cfg", *words]).aug_cfg
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the keys that it does not use
        theirs = open_clip.image_transform(32, is_train=True, aug_cfg=config)
    steps = {type(step).__name__.lower().replace("_", ""): step for step in theirs.transforms}
    assert ("colorjitter" in steps, "grayscale" in steps) == (True, augment.grey > 0)
    crop = next(step for name, step in steps.items() if name.startswith("randomresizedcrop"))
    assert crop.ratio[0] == crop_ratio
    jitter = getattr(steps["colorjitter"], "transf", steps["colorjitter"])
    assert jitter.brightness == (1 - augment.brightness, 1 + augment.brightness)
    assert jitter.hue == ((-augment.hue, augment.hue) if augment.hue else None)


@pytest.mark.parametrize(
    "words", [[], ["--lr-scheduler", "const"], ["--lr-scheduler", "const-cooldown", "--epochs-cooldown", "4",
                                                "--lr-cooldown-end", "1e-5"]]
)  # fmt: skip
def test_learning_rates_are_open_clips(words: list[str]) -> None:
    recipe, _ = made("--model", "ViT-B-16", "--epochs", "10", "--warmup", "50", "--batch-size", "640", *words)
    (job,) = make_plan(recipe).jobs
    settings = replace(
        SETTINGS, lr=job.lr, total_steps=job.steps, warmup_steps=job.warmup_steps, schedule=recipe.optimizer.schedule
    )
    optimizer: Any = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    theirs = {
        0: cosine_lr(optimizer, 5e-4, 50, 1000),
        2: const_lr(optimizer, 5e-4, 50, 1000),
        6: const_lr_cooldown(optimizer, 5e-4, 50, 1000, 400, 1.0, 1e-5),
    }[len(words)]
    assert job.steps == 1000
    assert [learning_rate(step, settings) for step in range(1000)] == pytest.approx([theirs(at) for at in range(1000)])


def test_zero_is_never() -> None:
    words = [
        "--model",
        "ViT-B-16",
        "--save-frequency",
        "0",
        "--skip-scheduler",
        "--imagenet-val",
        "i",
        "--val-data",
        "v",
    ]
    recipe, _ = made(*words, "--zeroshot-frequency", "0", "--val-frequency", "2", "--epochs", "4")
    assert recipe.engine.checkpoint_every.epochs == 4
    assert recipe.chain.links[0].warmup.steps == 0
    assert recipe.evaluation.every is not None
    assert recipe.evaluation.every.epochs == 2
    assert recipe.evaluation.sets[0].role == "report"


RESAMPLED = ["--model", "ViT-B-16", "--dataset-resampled"]


def test_sets_with_weights() -> None:
    words = [*RESAMPLED, "--train-data", "a.tar::b.tar", "--train-data-upsampling-factors", "1::2.5"]
    values, _ = recipe_of([*words, "--train-num-samples", "9000", "--warmup", "10"], 1)
    assert values["data"]["decoder"] == "torch"
    assert values["data"]["train"] == [{"shards": "a.tar", "weight": 1.0}, {"shards": "b.tar", "weight": 2.5}]
    recipe, _ = made(*RESAMPLED, "--train-data-upsampling-factors", "2")
    assert recipe.data.train == ["a/{00..10}.tar"], "OpenCLIP does not train longer with the factor of one set"


def test_a_resampled_epoch_has_the_samples_that_the_command_says() -> None:
    words = ["--batch-size", "50", "--accum-freq", "2", "--epochs", "6", "--save-frequency", "2", "--val-data", "v.tar"]
    recipe, rows = made(*RESAMPLED, *words, "--val-frequency", "3", gpus=4)
    per_epoch = 64_000 // 400
    lengths = [recipe.chain.links[0].train, recipe.engine.checkpoint_every, recipe.evaluation.every]
    assert lengths == [Duration(steps=count * per_epoch) for count in (6, 2, 3)]
    # The shards hold ten times as many images, and the run is as long.
    (job,) = make_plan(recipe, images=640_000).jobs
    assert job.steps == 6 * per_epoch
    assert rows["--dataset-resampled"].startswith("lengths in steps")


@pytest.mark.parametrize(("workers", "accum", "steps"), [(4, 1, 12), (1, 1, 10), (0, 1, 10), (4, 2, 6), (4, 5, 2)])
def test_a_resampled_epoch_has_openclips_own_steps(workers: int, accum: int, steps: int) -> None:
    """Every worker has as many batches; 20,000 samples are 9.8 batches of 2,048."""
    words = ["--train-num-samples", "20000", "--batch-size", "256", "--workers", str(workers), "--epochs", "1"]
    recipe, _ = made(*RESAMPLED, *words, "--accum-freq", str(accum), "--warmup", "1", gpus=8)
    assert recipe.chain.links[0].train == Duration(steps=steps)


def test_a_chain_can_be_designed_from_it() -> None:
    recipe, _ = made("--model", "ViT-B-16", "--epochs", "3", "--warmup", "10")
    assert recipe.baselines is not None
    (link,) = recipe.chain.links
    assert (recipe.baselines.train, recipe.baselines.warmup) == (link.train, link.warmup)
    assert len(make_plan(recipe, baselines=True).jobs) == 2
    assert make_plan(recipe, baselines=True).jobs[1].same_as == "1-ViT-B-16"


def test_values_that_compt_has_anyway() -> None:
    flags = ["--opt", "--lr-cooldown-power", "--image-resize-mode", "--image-interpolation"]
    same = [word for pair in zip(flags, ["adamw", "1", "shortest", "bicubic"], strict=True) for word in pair]
    others = [word for pair in zip(flags, ["timm/lamb", "2", "squash", "bilinear"], strict=True) for word in pair]
    assert [made("--model", "ViT-B-16", *same)[1][flag] for flag in flags] == ["the same here"] * 4
    betas = ["--lr", "1e-3", "--beta1", "0.9", "--beta2", "0.98", "--eps", "1e-6"]  # timm's optimizers have no defaults
    _, rows = made("--model", "ViT-B-16", *others, *betas)
    assert all(rows[flag].startswith("NOT TAKEN OVER: ") for flag in flags)


def test_every_flag_has_a_fate() -> None:
    page = Path(__file__).parents[3].joinpath("docs", "open-clip.md").read_text(encoding="utf-8")
    assert all(f"`--{flag.replace('_', '-')}`" in page for flag in TAKEN.keys() | NEEDLESS.keys() | LOST.keys())
    keys = {field.name for field in fields(open_clip.AugmentationCfg)}
    assert all(f"`--aug-cfg {key}=…`" in page for key in keys)
    assert keys == AUGMENT.keys() | {"re_prob", "re_count"}
    known = set(vars(parse_args(["--model", "ViT-B-16"])))
    assert set(TAKEN) | set(NEEDLESS) | set(LOST) <= known
    assert len(TAKEN.keys() | NEEDLESS.keys() | LOST.keys()) == len(TAKEN) + len(NEEDLESS) + len(LOST)
    assert SAME.keys() <= LOST.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "RN50"], "RN50"),
        (["--model", "roberta-ViT-B-32"], "text_cfg.hf_model_name = roberta-base is not supported"),
        (["--model", "ViT-B-16", "--bogus"], "open_clip_train unrecognized arguments: --bogus"),
        (["--model", "ViT-B-16", "--precision", "pure_fp16"], "--precision pure_fp16: weights are fp32 here"),
        (["--model", "ViT-B-16", "--lr-scheduler", "const-cooldown"], "needs --epochs-cooldown"),
        (["--model", "ViT-B-16", "--dataset-type", "csv"], "compt data pack"),
        (["--model", "ViT-B-16", "--warmup", "40000"], "these arguments make no recipe that runs: "),
        (["--model", "ViT-B-16", "--aug-cfg", "scale=0.4"], "should be 2 numbers"),
        (["--model", "ViT-B-16", "--aug-cfg", "color_jitter=0.4", "color_jitter_prob=1"], "should be 4 numbers"),
        (["--model", "ViT-B-16", "--train-num-samples", "0"], "--train-num-samples is missing"),
        (["--model", "ViT-B-16", "--force-image-size", "224", "336"], "images are square"),
        ([*RESAMPLED, "--train-data-upsampling-factors", "1::2"], "2 factors for 1 sets"),
        ([*RESAMPLED, "--train-data-upsampling-factors", "x"], "x: should be a number for each set"),
        (["--model", "ViT-B-16", "--train-data-upsampling-factors", "2"], "with --dataset-resampled only"),
        ([*RESAMPLED, "--batch-size", "65000"], "optimizer.batch 65000 is larger than data.images 64000"),
        ([*RESAMPLED, "--batch-size", "64000", "--accum-freq", "5"], "64000: fewer than one batch of 320000"),
        (["--model", "ViT-B-16", "--aug-cfg", "scale"], "write KEY=VALUE"),
        (["--model", "ViT-B-16", "--aug-cfg", "scale=(0.9"], "'(' was never closed"),
        (["--model", "ViT-B-16", "--aug-cfg", "gray_scale_prob=x"], "gray_scale_prob=x: should be a number"),
        (
            ["--model", "ViT-B-16", "--lr-scheduler", "const-cooldown", "--epochs-cooldown", "1", "--epochs", "0"],
            "--epochs 0: should be at least 1",
        ),
        (["--model", "ViT-B-16", "--accum-freq", "0"], "--accum-freq 0: should be at least 1"),
    ],
)
def test_what_makes_no_recipe(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of([*DATA, *words], 1)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    command = ["recipes", "from-open-clip", "--gpus", "2", "--out", str(out), *DATA, "--model", "ViT-B-16", "--trace"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert "--trace              NOT TAKEN OVER" in done.output
    assert load_recipe(out).optimizer.batch == 128
    assert isinstance(CliRunner().invoke(app, command).exception, ConfigError)
