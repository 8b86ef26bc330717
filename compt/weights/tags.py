"""open_clip's pretrained tags, ARCH:TAG, whose weights are on the disk already. This module downloads nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import open_clip
from huggingface_hub import constants, try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from compt.errors import ArtefactError, nearest
from compt.files import sha256_file
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.preprocess import Preprocess
from compt.weights.files import read_file
from compt.weights.lazy import FoundWeights

_TAG = re.compile(r"([\w.-]+):([\w.-]+)")


def split_tag(text: str) -> tuple[str, str] | None:
    """("ViT-B-32", "laion2b_s34b_b79k") for "ViT-B-32:laion2b_s34b_b79k", None where `text` is no tag."""
    match = _TAG.fullmatch(text)
    return (match[1], match[2]) if match else None


def clip_cache() -> Path:
    """The folder for open_clip's downloads that do not come from Hugging Face."""
    return Path(os.path.expanduser("~/.cache/clip"))  # unlike Path's, this accepts a user without a home folder


def read_tag(arch: str, tag: str, verify: bool = True) -> FoundWeights:
    """The weights of a tag. `verify`: compare the digest that some addresses contain.

    Raises ArtefactError for an unknown tag, and for weights that are not on the disk: it lists the places it looked in
    and the command that downloads them.
    """
    known = open_clip.list_models()
    if arch not in known:
        raise ArtefactError(f"{arch}:{tag}: open_clip has no model '{arch}'{nearest(arch, known)}")
    config = get_pretrained_cfg(arch, tag)
    if not config:
        tags = list_pretrained_tags_by_model(arch)
        raise ArtefactError(
            f"{arch}:{tag}: open_clip has no tag '{tag}' of {arch}{nearest(tag, tags)}; known: {', '.join(tags) or '-'}"
        )
    spec = spec_from_open_clip(open_clip.get_model_config(arch) or {}, arch)
    spec = replace(spec, quick_gelu=spec.quick_gelu or bool(config.get("quick_gelu")))
    looked = []
    for place, path in _places(config):
        looked.append(place)
        if path is not None:
            found = read_file(path)
            if verify:
                _check_digest(path, str(config.get("url", "")))
            pixels = {field.name: config[field.name] for field in fields(Preprocess) if field.name in config}
            preprocess = Preprocess.of(pixels, f"{arch}:{tag}")
            return FoundWeights(found.weights, found.files, spec, preprocess)
    raise ArtefactError(
        f"{arch}:{tag}: not on this machine: neither {' nor '.join(looked)}. To download it, run "
        f"python -c \"import open_clip; open_clip.create_model('{arch}', pretrained='{tag}')\" where there is a network"
    )


def _places(config: dict[str, Any]) -> Iterator[tuple[str, Path | None]]:
    """The places of a tag's file in open_clip's order: a description, and the path where the file exists."""
    if config.get("hf_hub"):
        repository, _, name = str(config["hf_hub"]).rpartition("/")
        for file in _names(name or HF_WEIGHTS_NAME):
            cached = try_to_load_from_cache(repository, file)
            where = f"{file} of {repository} in {constants.HF_HUB_CACHE}"
            yield where, Path(cached) if isinstance(cached, str) else None
    if config.get("url"):
        path = clip_cache() / str(config["url"]).rpartition("/")[2]
        yield str(path), path if path.is_file() else None


def _names(name: str) -> list[str]:
    safe = HF_SAFE_WEIGHTS_NAME if name == HF_WEIGHTS_NAME else str(Path(name).with_suffix(".safetensors"))
    return [safe, name] if safe != name else [name]


def _check_digest(path: Path, url: str) -> None:
    if path.parent != clip_cache():
        return
    if "openaipublic" in url:
        expected = url.split("/")[-2]
    elif "mlfoundations" in url:
        expected = path.stem.rpartition("-")[2]
    else:
        return
    if not sha256_file(path).startswith(expected):
        raise ArtefactError(f"{path}: its content is not what its address says (SHA-256 {expected}…); remove it")
