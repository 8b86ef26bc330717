"""A recipe from a command line of OpenCLIP's training program, `open_clip_train`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from compt.cli.options import option
from compt.errors import ConfigError
from compt.files import write_text
from compt.plan.jobs import make_plan
from compt.recipe.read import parse_recipe
from compt.text import TextTable, say, terminal

TAKEN = {
    **dict.fromkeys(("model", "force_image_size", "force_context_length", "force_quick_gelu"), "family.members"),
    "train_data": "data.train",
    "train_data_upsampling_factors": "data.train, the weights of the sets",
    "train_num_samples": "data.images",
    "dataset_resampled": "lengths in steps: an epoch there is --train-num-samples, whatever the shards hold; here each "
    "sample comes once a pass",
    "val_data": "evaluation.validation: the loss; for recalls add a retrieval set",
    "imagenet_val": "evaluation.sets; folders named as in WordNet have OpenAI's 80 templates, as in OpenCLIP",
    "imagenet_v2": "evaluation.sets, with one template unless `templates` names a file; its folders are numbers, so "
    "name a file of class names as `classnames`",
    **dict.fromkeys(("batch_size", "accum_freq"), "optimizer.batch, over all GPUs; engine.micro_batch"),
    "epochs": "chain.links[0].train",
    "warmup": "chain.links[0].warmup",
    "lr": "optimizer.lr",
    **dict.fromkeys(("beta1", "beta2"), "optimizer.betas"),
    "eps": "optimizer.eps",
    "wd": "optimizer.weight_decay",
    **dict.fromkeys(("lr_scheduler", "skip_scheduler", "epochs_cooldown", "lr_cooldown_end"), "optimizer.schedule"),
    "precision": "optimizer.precision",
    "grad_clip_norm": "optimizer.clip_grad_norm",
    "siglip": "optimizer.loss",
    "seed": "seed",
    "name": "name",
    "workers": "engine.workers",
    "grad_checkpointing": "engine.recompute",
    "torchcompile": "engine.compile",
    "log_every_n_steps": "engine.log_every",
    "report_to": "engine.loggers",
    "save_frequency": "engine.checkpoint_every",
    **dict.fromkeys(("zeroshot_frequency", "val_frequency"), "evaluation.every"),
    "image_mean": "data.mean",
    "image_std": "data.std",
}
"""Flags, as OpenCLIP's parser names their values, and the fields of the recipe that say the same."""
NEEDLESS = {
    "dataset_type": "shards are recognized; pack CSV files with `compt data pack`",
    "gather_with_grad": "always",
    "local_loss": "the loss is that of all features, whatever is computed where",
    "save_most_recent": "`latest` names the newest checkpoint",
    "delete_previous_checkpoint": "engine.keep_checkpoints says how many stay",
    "resume": "the same command resumes a run",
    "logs": "`compt chain --run-folder FOLDER`",
    "log_local": "rank 0 logs",
    "wandb_project_name": "set WANDB_PROJECT",
    "device": "engine.device",
    "dist_url": "the launcher's variables say it",
    "dist_backend": "nccl on GPUs, gloo on CPUs",
    "val_num_samples": "the index counts them",
    **dict.fromkeys(("ddp_static_graph", "no_set_device_rank", "debug"), "not needed"),
    "copy_codebase": "run.json names the versions",
    "cache_dir": "nothing is downloaded",
}
"""Flags without an effect of their own here, and why."""
LOST = {
    "pretrained": "links start from a smaller model: chain.from",
    **dict.fromkeys(("opt", "momentum"), "only AdamW"),
    "lr_cooldown_power": "the decay is linear",
    "image_resize_mode": "images are resized to their shorter side and cropped",
    "image_interpolation": "bicubic",
    **dict.fromkeys(
        ("distill_model", "distill_pretrained"), "a link learns from its teacher's features: chain.distill"
    ),
    "force_patch_dropout": "no patch dropout",
    "remote_sync": "copy the run folder with a tool of your store",
}
"""Flags with a meaning that compt does not have, and what comes nearest. Others have nothing near."""
SAME: dict[str, Any] = {
    "opt": "adamw",
    "lr_cooldown_power": 1.0,
    "image_resize_mode": "shortest",
    "image_interpolation": "bicubic",
}
"""Values of flags in LOST that say what compt does anyway."""
AUGMENT = {
    "scale": "data.crop_scale",
    "ratio": "data.crop_ratio",
    "color_jitter": "data.augment.brightness, contrast, saturation, hue",
    "color_jitter_prob": "data.augment.jitter",
    "gray_scale_prob": "data.augment.grey",
    "use_timm": "decides which other keys OpenCLIP uses",
}
"""Keys of `--aug-cfg`, and the fields of the recipe that say the same. `re_prob` and `re_count` have none."""


def from_open_clip(
    words: Annotated[list[str], typer.Argument(metavar="ARGS", help="arguments of open_clip_train.main")],
    gpus: Annotated[int, option("GPUs of the OpenCLIP run, for its batch", metavar="N", min=1)] = 1,
    out: Annotated[Path | None, option("write the recipe here", metavar="FILE", default="print it")] = None,
) -> None:
    """Write a recipe that trains as a command of OpenCLIP does.

    Put compt's options first: `compt recipes from-open-clip --gpus 8 --train-data …`. A table names each flag, and the
    field that takes it over, or why there is none.
    """
    values, rows = recipe_of(words, gpus)
    text = (
        "# One model, trained the standard way. To put smaller ones before it: compt plan RECIPE --auto --out CHAIN\n"
    )
    text += yaml.safe_dump(values, sort_keys=False, width=120)
    if out is not None and out.exists():
        raise ConfigError(f"{out}: exists already")
    terminal(stderr=True).print(TextTable("Flags of OpenCLIP", ("Flag", "Here"), rows, left=2))
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        say(f"Wrote {out}")


def recipe_of(words: Sequence[str], gpus: int) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Fields of the recipe, and for each flag what became of it. Raises ConfigError for what makes no recipe."""
    parsed = _parsed(words)
    flags = list(dict.fromkeys(_flag(word, parsed) for word in words if word.startswith("--")))
    rows = [(f"--{flag.replace('_', '-')}", _fate(flag, parsed)) for flag in flags if flag != "aug_cfg"]
    rows += [(f"--aug-cfg {key}", _aug_fate(key, parsed.aug_cfg)) for key in parsed.aug_cfg]
    if parsed.dataset_type in ("csv", "synthetic"):
        raise ConfigError(f"--dataset-type {parsed.dataset_type}: pack the images first: compt data pack")
    for flag in ("train_data", "train_num_samples"):
        if not getattr(parsed, flag):
            raise ConfigError(
                f"--{flag.replace('_', '-')} is missing: a recipe names the shards and counts their images"
            )
    for flag in ("epochs", "batch_size", "accum_freq"):
        if (count := getattr(parsed, flag)) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {count}: should be at least 1")
    member = _member(parsed)
    # Without a scheduler OpenCLIP has no warm-up either.
    warmup = {"steps": 0 if parsed.skip_scheduler else parsed.warmup}
    alone = {"train": _length(parsed, gpus, parsed.epochs), "warmup": warmup}
    values: dict[str, Any] = {
        "name": _name(parsed.name or member["name"]),
        "seed": parsed.seed,
        "data": _data(parsed),
        "family": {"members": [member]},
        "chain": {"links": [{"model": member["name"], **alone}]},
        "baselines": copy.deepcopy(alone),
        "optimizer": _optimizer(parsed, gpus),
        "engine": _engine(parsed, gpus),
        "evaluation": _evaluation(parsed, gpus),
    }
    try:
        make_plan(parse_recipe(values, "the recipe"))
    except ConfigError as error:
        raise ConfigError(f"these arguments make no recipe that runs: {error}") from None
    return values, rows


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    from open_clip_train.params import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: argparse.Namespace = parse_args(list(words))
    except SystemExit:
        last = (said.getvalue().strip().splitlines() or ["wrong arguments"])[-1]
        raise ConfigError(f"open_clip_train {last.partition('error: ')[2] or last}") from None
    except (ValueError, SyntaxError, TypeError) as error:  # of --aug-cfg, which OpenCLIP splits and reads itself
        raise ConfigError(
            f"open_clip_train --aug-cfg: {error}; write KEY=VALUE, as in --aug-cfg 'scale=(0.4,1)'"
        ) from None
    return found


def _flag(word: str, parsed: argparse.Namespace) -> str:
    """The name of the value that a word of the command line sets; argparse also takes the beginning of a flag."""
    name = word.removeprefix("--").partition("=")[0].replace("-", "_")
    known = vars(parsed)
    return name if name in known else next((other for other in known if other.startswith(name)), name)


def _fate(flag: str, parsed: argparse.Namespace) -> str:
    if flag in TAKEN:
        return TAKEN[flag]
    if flag in SAME and getattr(parsed, flag) == SAME[flag]:
        return "the same here"
    return NEEDLESS.get(flag) or f"NOT TAKEN OVER{': ' + LOST[flag] if flag in LOST else ''}"


def _aug_fate(key: str, given: dict[str, Any]) -> str:
    """What became of a key of `--aug-cfg`; OpenCLIP itself leaves some of them out."""
    if key not in AUGMENT:
        return "NOT TAKEN OVER: no random erasing" if key in ("re_prob", "re_count") else "NOT TAKEN OVER"
    if key in ("color_jitter_prob", "gray_scale_prob") and given.get("use_timm"):
        return "without effect in OpenCLIP, with use_timm"
    if key == "ratio" and not given.get("use_timm"):
        return "without effect in OpenCLIP, without use_timm"
    if key == "color_jitter" and not given.get("use_timm") and not given.get("color_jitter_prob"):
        return "without effect in OpenCLIP, without color_jitter_prob or use_timm"
    return AUGMENT[key]


def _name(text: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in text)
    return kept if kept[:1].isalnum() else f"run{kept}"


def _member(parsed: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import replace

    from compt.design.outcome import member_of
    from compt.weights.infer import model_spec

    spec = model_spec(parsed.model)
    changes: dict[str, Any] = {}
    if parsed.force_image_size:
        sizes = set(parsed.force_image_size if isinstance(parsed.force_image_size, list) else [parsed.force_image_size])
        if len(sizes) > 1:
            raise ConfigError(f"--force-image-size {' '.join(map(str, sizes))}: images are square here")
        changes["image_size"] = sizes.pop()
    if parsed.force_context_length:
        changes["context_length"] = parsed.force_context_length
    if parsed.force_quick_gelu:
        changes["quick_gelu"] = True
    return member_of(replace(spec, name=_name(parsed.model), **changes), {})


def _batch(parsed: argparse.Namespace, gpus: int) -> int:
    """Images of all GPUs in an optimizer step."""
    images: int = parsed.batch_size * parsed.accum_freq * gpus
    return images


def _length(parsed: argparse.Namespace, gpus: int, epochs: int) -> dict[str, int]:
    """A duration of so many of OpenCLIP's epochs.

    With `--dataset-resampled` shards are drawn with replacement until an epoch has `--train-num-samples`. An epoch here
    is one pass over the shards, whose number of images may be quite another: that length is written in steps, which are
    OpenCLIP's own. Otherwise an epoch here leaves out the last images that fill no batch, as OpenCLIP's does not.
    """
    if not parsed.dataset_resampled:
        return {"epochs": epochs}
    # As in open_clip_train.data: every worker has as many batches, which are then put together.
    workers = max(1, parsed.workers)
    batches = math.ceil(math.ceil(parsed.train_num_samples / (parsed.batch_size * gpus)) / workers) * workers
    if batches < parsed.accum_freq:
        batch = _batch(parsed, gpus)
        raise ConfigError(f"--train-num-samples {parsed.train_num_samples}: fewer than one batch of {batch}")
    return {"steps": epochs * (batches // parsed.accum_freq)}


def _weights(parsed: argparse.Namespace, sets: int) -> list[float]:
    """The factors of the sets. Raises ConfigError for those that OpenCLIP refuses."""
    flag, given = "--train-data-upsampling-factors", parsed.train_data_upsampling_factors
    if not parsed.dataset_resampled:
        raise ConfigError(f"{flag} {given}: OpenCLIP takes factors with --dataset-resampled only")
    try:
        weights = [float(factor) for factor in given.split("::")]
    except ValueError:
        raise ConfigError(f"{flag} {given}: should be a number for each set, as in 1::2.5") from None
    if len(weights) != sets:
        raise ConfigError(f"{flag}: {len(weights)} factors for {sets} sets")
    return weights


def _data(parsed: argparse.Namespace) -> dict[str, Any]:
    sets = parsed.train_data.split("::")
    train: Any = sets if len(sets) > 1 else sets[0]
    if parsed.train_data_upsampling_factors:
        weights = _weights(parsed, len(sets))
        if len(sets) > 1:  # the factor of one set changes no share, and so nothing in OpenCLIP
            train = [{"shards": shards, "weight": weight} for shards, weight in zip(sets, weights, strict=True)]
    # About twice as fast as Pillow here, and decodes at full size more often, as OpenCLIP always does.
    found: dict[str, Any] = {"train": train, "images": parsed.train_num_samples, "captions": 1, "decoder": "torch"}
    for flag, field in (("image_mean", "mean"), ("image_std", "std")):
        if value := getattr(parsed, flag):
            found[field] = [float(each) for each in value] * (3 if len(value) == 1 else 1)
    given = parsed.aug_cfg
    for key, field in (("scale", "crop_scale"), ("ratio", "crop_ratio")):
        if given.get(key) and _aug_fate(key, given) == AUGMENT[key]:
            found[field] = _numbers(key, given[key], 2)
    if augment := _augment(given):
        found["augment"] = augment
    return found


def _augment(given: dict[str, Any]) -> dict[str, float]:
    """The section `data.augment`, from what OpenCLIP's `image_transform` does with `--aug-cfg`."""
    found: dict[str, float] = {}
    if (strengths := given.get("color_jitter")) and _aug_fate("color_jitter", given) == AUGMENT["color_jitter"]:
        if given.get("use_timm") and not isinstance(strengths, tuple | list):
            strengths = [strengths] * 3
        counts = (3, 4) if given.get("use_timm") else (4,)
        values = _numbers("color_jitter", strengths, *counts)
        found = dict(zip(("brightness", "contrast", "saturation", "hue"), values, strict=False))
    for key, field in (("color_jitter_prob", "jitter"), ("gray_scale_prob", "grey")):
        if (
            (share := given.get(key))
            and _aug_fate(key, given) == AUGMENT[key]
            and (field == "grey" or any(found.values()))
        ):
            (found[field],) = _numbers(key, share, 1)
    return found


def _numbers(key: str, value: Any, *counts: int) -> list[float]:
    many = value if isinstance(value, tuple | list) else [value]
    if len(many) not in counts or not all(isinstance(each, int | float) for each in many):
        wanted = "a number" if counts == (1,) else f"{' or '.join(map(str, counts))} numbers"
        raise ConfigError(f"--aug-cfg {key}={value}: should be {wanted}")
    return [float(each) for each in many]


def _optimizer(parsed: argparse.Namespace, gpus: int) -> dict[str, Any]:
    precisions = {"amp": "fp16", "amp_bf16": "bf16", "amp_bfloat16": "bf16", "fp32": "fp32"}
    if parsed.precision not in precisions:
        raise ConfigError(f"--precision {parsed.precision}: weights are fp32 here; use amp, amp_bf16 or fp32")
    found: dict[str, Any] = {
        "batch": _batch(parsed, gpus),
        "lr": float(parsed.lr),
        "betas": [float(parsed.beta1), float(parsed.beta2)],
        "eps": float(parsed.eps),
        "weight_decay": float(parsed.wd),
        "precision": precisions[parsed.precision],
    }
    if parsed.grad_clip_norm:
        found["clip_grad_norm"] = float(parsed.grad_clip_norm)
    if parsed.siglip:
        found["loss"] = "siglip"
    if parsed.skip_scheduler or parsed.lr_scheduler == "const":
        found["schedule"] = "constant"
    elif parsed.lr_scheduler == "const-cooldown":
        if not parsed.epochs_cooldown:
            raise ConfigError("--lr-scheduler const-cooldown: needs --epochs-cooldown")
        if not parsed.lr:
            raise ConfigError(f"--lr {parsed.lr}: should be above 0")
        end = float(parsed.lr_cooldown_end) / float(parsed.lr)
        found["schedule"] = {"shape": "wsd", "decay": parsed.epochs_cooldown / parsed.epochs, "end": end}
    return found


def _engine(parsed: argparse.Namespace, gpus: int) -> dict[str, Any]:
    found: dict[str, Any] = {"workers": parsed.workers, "log_every": {"steps": parsed.log_every_n_steps}}
    found["checkpoint_every"] = _length(parsed, gpus, parsed.save_frequency or parsed.epochs)  # 0: only at the end
    if parsed.accum_freq > 1:
        found["micro_batch"] = parsed.batch_size
    if parsed.grad_checkpointing:
        found["recompute"] = True
    if parsed.torchcompile:
        found["compile"] = "blocks"
    if named := [name for name in ("tensorboard", "wandb") if name in parsed.report_to or "all" in parsed.report_to]:
        found["loggers"] = named
    return found


def _evaluation(parsed: argparse.Namespace, gpus: int) -> dict[str, Any]:
    paths = {"imagenet_val": parsed.imagenet_val, "imagenet_v2": parsed.imagenet_v2}
    if parsed.imagenet_v2:  # names the folder above; the class folders below it are called 0 to 999
        paths["imagenet_v2"] = f"{parsed.imagenet_v2.rstrip('/')}/ImageNetV2-matched-frequency"
    # `select` sets are scored during training, as OpenCLIP does. A frequency of 0 is never.
    role = "select" if parsed.zeroshot_frequency else "report"
    sets: list[dict[str, Any]] = [{"name": name, "data": path, "role": role} for name, path in paths.items() if path]
    if parsed.imagenet_v2:
        sets[-1]["class_order"] = "number"
    found: dict[str, Any] = {"sets": sets} if sets else {}
    often = [parsed.zeroshot_frequency] * bool(sets)
    if parsed.val_data and parsed.val_frequency:
        found["validation"] = parsed.val_data.split("::")
        often.append(parsed.val_frequency)
    if any(often):
        found["every"] = _length(parsed, gpus, min(filter(None, often)))
    return found
