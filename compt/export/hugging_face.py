"""Folders of Hugging Face transformers: CLIPModel, its two towers alone, and CLIPProcessor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from compt.errors import ArtefactError
from compt.files import write_json, write_text
from compt.models.presets import VOCAB_SIZE, ModelSpec
from compt.weights.artefact import HF_PIXELS, Artefact
from compt.weights.files import HF_CONFIG, HF_SPECIAL, HF_TOKENIZER_CONFIG, hugging_face_vocabulary
from compt.weights.names import hugging_face_view
from compt.weights.safetensors import write_tensors

WEIGHTS = "model.safetensors"


def write(source: Artefact, folder: Path) -> list[str]:
    """Weights, config, and the files of CLIPProcessor. Reads one tensor at a time and needs no transformers.

    Raises ArtefactError, which names the part of the model, for what CLIPModel does not have.
    """
    refused = why_not(source)
    if refused:
        raise ArtefactError(f"{source.path}: transformers' CLIPModel cannot be this model: {'; '.join(refused)}")
    view = hugging_face_view(source.state)
    write_tensors(folder / WEIGHTS, view, {name: view.shape(name) for name in view}, {"format": "pt"})
    dtype = str(source.state["visual.proj"].dtype).removeprefix("torch.")
    write_json(folder / HF_CONFIG, clip_config(source.spec) | {"torch_dtype": dtype})
    write_json(folder / HF_PIXELS, source.preprocess.to_hugging_face(source.spec.image_size))
    _write_tokenizer(folder, source.spec.context_length)
    return [
        "`CLIPVisionModel`, `CLIPVisionModelWithProjection` and `CLIPTextModelWithProjection` load the same folder."
    ]


def why_not(source: Artefact) -> list[str]:
    """The parts of a model that CLIPModel does not have."""
    spec, reasons = source.spec, []
    if spec.arch != "vit":
        reasons.append(f"its image tower is a {spec.arch.title()}, CLIPModel's is a ViT (--to timm writes the tower)")
    if spec.no_ln_pre:
        reasons.append("it has no LayerNorm before its blocks (no_ln_pre), CLIPModel always has one")
    if extra := [one.name for one in spec.scalars if one.name != "logit_scale"]:
        reasons.append(
            f"it has a {' and a '.join(extra)} (loss {spec.loss}), which CLIPModel has not; "
            "SiglipModel pools with attention instead of a class token"
        )
    if spec.vocab_size != VOCAB_SIZE:
        reasons.append(f"its vocabulary has {spec.vocab_size:,} tokens, that of CLIPTokenizer's files {VOCAB_SIZE:,}")
    if source.preprocess.to_hugging_face(spec.image_size) is None:
        reasons.append(
            f"its images are prepared with resize_mode {source.preprocess.resize_mode}, which "
            "CLIPImageProcessor cannot do"
        )
    return reasons


def clip_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a ViT as CLIPModel.

    With `eos_token_id` 2, the value in OpenAI's own configs, transformers reads a caption at its highest token. With
    any other value it reads the first token of that value. Both are the end of text.
    """
    act = "quick_gelu" if spec.quick_gelu else "gelu"
    common = {"hidden_act": act, "projection_dim": spec.embed_dim, "attention_dropout": 0.0}
    text = {
        "model_type": "clip_text_model",
        "hidden_size": spec.text_width,
        "intermediate_size": int(spec.text_width * spec.mlp_ratio),
        "num_hidden_layers": spec.text_depth,
        "num_attention_heads": spec.text_heads,
        "max_position_embeddings": spec.context_length,
        "vocab_size": spec.vocab_size,
        "layer_norm_eps": spec.text_norm_eps,
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": VOCAB_SIZE - 1,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": spec.width,
        "intermediate_size": int(spec.width * spec.mlp_ratio),
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": 3,
        "layer_norm_eps": spec.norm_eps,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": spec.embed_dim,
        "logit_scale_init_value": spec.scalars[0].initial,
        "text_config": common | text,
        "vision_config": common | vision,
    }


def _write_tokenizer(folder: Path, context_length: int) -> None:
    """The byte-pair vocabulary of OpenAI's CLIP, which open_clip ships, as CLIPTokenizer reads it."""
    ranks = SimpleTokenizer().bpe_ranks
    merges = sorted(ranks, key=ranks.__getitem__)
    write_json(folder / "vocab.json", hugging_face_vocabulary())
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    start, end = HF_SPECIAL
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    write_json(folder / "special_tokens_map.json", special)
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / HF_TOKENIZER_CONFIG, {**about, "errors": "replace", "add_prefix_space": False, **special})
