"""Weights in single files and in folders, with the configs of open_clip and Hugging Face that describe the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.constants import HF_WEIGHTS_NAME
from open_clip.tokenizer import SimpleTokenizer

from compt.errors import ArtefactError, ConfigError
from compt.models.open_clip_config import spec_from_open_clip
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.models.presets import NORM_EPS, VOCAB_SIZE, ModelSpec, mlp_ratio_of
from compt.weights.artefact import CONFIG, HF_PIXELS, INDEX, OPEN_CLIP_WEIGHTS, open_state, read_object, weight_map
from compt.weights.lazy import FoundWeights, Tensors, inside
from compt.weights.pickles import load_torch_file, tensors_in
from compt.weights.safetensors import LazyState

HF_CONFIG = "config.json"
HF_PROCESSOR = "processor_config.json"
HF_TOKENIZER_CONFIG = "tokenizer_config.json"
HF_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
WEIGHTS = (OPEN_CLIP_WEIGHTS, "model.safetensors")
WEIGHT_PICKLES = (HF_WEIGHTS_NAME, "pytorch_model.bin")
PICKLES = (".pt", ".pth", ".bin")

# The values of what a config of Hugging Face leaves out.
_HF_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": NORM_EPS,
    "eos_token_id": VOCAB_SIZE - 1,
}
_HF_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": NORM_EPS,
}
_HF_EMBEDDING = 512
# transformers reads this number as "the highest token", whatever the vocabulary.
_HF_HIGHEST = 2


def read_file(path: Path) -> FoundWeights:
    """A file of weights: .safetensors, or a file of torch.save. Raises ArtefactError."""
    if path.suffix == ".safetensors":
        return FoundWeights(LazyState(path.parent, [path.name]), [path])
    if path.suffix not in PICKLES:
        raise ArtefactError(f"{path}: weights are read from .safetensors, {', '.join(PICKLES)} files and from folders")
    return FoundWeights(Tensors(dict(tensors_in(load_torch_file(path)))), [path])


def read_open_clip(folder: Path) -> FoundWeights:
    """A folder with open_clip's config and weights. Raises ArtefactError."""
    config = read_object(inside(folder, CONFIG))
    spec = spec_from_open_clip(config, name=folder.name)
    found = read_plain(folder)
    preprocess = Preprocess.of(config.get("preprocess_cfg") or {}, f"{folder / CONFIG}: preprocess_cfg")
    return FoundWeights(found.weights, found.files, spec, preprocess)


def read_hugging_face(folder: Path) -> FoundWeights:
    """A folder of transformers' CLIPModel: config.json, weights, and what it says of images and text.

    Raises ArtefactError, also for another tokenizer than that of OpenAI's CLIP.
    """
    spec = spec_from_hugging_face(read_object(inside(folder, HF_CONFIG)), folder.name)
    _check_tokenizer(folder)
    found = read_plain(folder)
    return FoundWeights(found.weights, found.files, spec, _hf_preprocess(folder, spec.image_size))


def _hf_preprocess(folder: Path, size: int) -> Preprocess:
    # Since transformers 5 a processor is one file; its class reads that one first.
    for name, key in ((HF_PROCESSOR, "image_processor"), (HF_PIXELS, None)):
        values = _beside(folder, name)
        if key is not None:
            values = values.get(key) or {}
        if values:
            return Preprocess.of_hugging_face(values, size, str(folder / name))
    return AS_OPENAI


def _check_tokenizer(folder: Path) -> None:
    """Raise ArtefactError unless the tokenizer beside the weights, if there is one, is that of OpenAI's CLIP."""
    found = _beside(folder, HF_TOKENIZER_CONFIG).get("tokenizer_class")
    # Since transformers 5 a folder may name the general class of fast tokenizers; the vocabulary decides.
    if found not in (None, "CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast"):
        raise ArtefactError(
            f"{folder / HF_TOKENIZER_CONFIG}: tokenizer_class = {found!r} is not supported; it must be CLIPTokenizer"
        )
    for name, inner in (("vocab.json", ()), ("tokenizer.json", ("model", "vocab"))):
        vocabulary: Any = _beside(folder, name)
        for key in inner:
            vocabulary = vocabulary.get(key) if isinstance(vocabulary, dict) else None
        if vocabulary and vocabulary != hugging_face_vocabulary():
            raise ArtefactError(
                f"{folder / name}: its {len(vocabulary)} tokens are not those of OpenAI's CLIP, with which compt "
                f"reads text; another vocabulary is not supported"
            )


def hugging_face_vocabulary() -> dict[str, int]:
    """The tokens of OpenAI's CLIP by the names in Hugging Face's files. open_clip names the last two otherwise."""
    words = list(SimpleTokenizer().encoder)[: -len(HF_SPECIAL)]
    return {word: number for number, word in enumerate([*words, *HF_SPECIAL])}


def _beside(folder: Path, name: str) -> dict[str, Any]:
    return read_object(inside(folder, name)) if (folder / name).exists() else {}


def has_weights(folder: Path) -> bool:
    """Whether `read_plain` finds something to read."""
    return bool(_candidates(folder))


def read_plain(folder: Path) -> FoundWeights:
    """The weights in a folder: a file of one of the usual names, the files of an index, or the only .safetensors file.

    Reads no config. Raises ArtefactError.
    """
    candidates = _candidates(folder)
    if not candidates:
        raise ArtefactError(f"{folder}: no weights in it: none of {', '.join((*WEIGHTS, INDEX, *WEIGHT_PICKLES))}")
    if candidates[0] == INDEX:
        names = sorted(set(weight_map(folder, inside(folder, INDEX).name).values()))
        weights = open_state(folder, [inside(folder, name).name for name in names], INDEX)
        return FoundWeights(weights, [folder / name for name in names])
    if candidates[0] not in (*WEIGHTS, *WEIGHT_PICKLES) and len(candidates) > 1:
        raise ArtefactError(f"{folder}: {len(candidates)} .safetensors files and no {INDEX}; name one of the files")
    return read_file(inside(folder, candidates[0]))


def _candidates(folder: Path) -> list[str]:
    there = {path.name for path in folder.iterdir()}
    usual = [name for name in (*WEIGHTS, INDEX) if name in there]
    return (
        usual
        or sorted(name for name in there if name.endswith(".safetensors"))
        or [name for name in WEIGHT_PICKLES if name in there]
    )


def spec_from_hugging_face(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The ModelSpec of a config.json of transformers' CLIPModel. Raises ArtefactError naming what does not fit."""
    if config.get("model_type") != "clip":
        raise ArtefactError(
            f"{HF_CONFIG} of {name}: model_type is {config.get('model_type')!r}; only models of type 'clip' are read"
        )
    try:
        text, vision = (
            default | dict(config.get(f"{part}_config") or {}) | dict(config.get(f"{part}_config_dict") or {})
            for part, default in (("text", _HF_TEXT), ("vision", _HF_VISION))
        )
        embed_dim = config.get("projection_dim", _HF_EMBEDDING)
        _check_types(name, "", {"projection_dim": embed_dim}, {"projection_dim": _HF_EMBEDDING})
        _check_types(name, "text_config.", text, _HF_TEXT)
        _check_types(name, "vision_config.", vision, _HF_VISION)
        _check_hugging_face(name, text, vision)
        return ModelSpec(
            name=name,
            arch="vit",
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            head_width=vision["hidden_size"] // vision["num_attention_heads"],
            text_width=text["hidden_size"],
            text_depth=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            text_head_width=text["hidden_size"] // text["num_attention_heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            context_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
            embed_dim=embed_dim,
            mlp_ratio=mlp_ratio_of(*((part["hidden_size"], part["intermediate_size"]) for part in (vision, text))),
            quick_gelu=text["hidden_act"] == "quick_gelu",
            norm_eps=float(vision["layer_norm_eps"]),
            text_norm_eps=float(text["layer_norm_eps"]),
        )
    except (TypeError, ValueError, ArithmeticError, ConfigError) as error:
        raise ArtefactError(f"{HF_CONFIG} of {name}: {error}") from error


def _check_types(name: str, part: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    words = {int: "a whole number", float: "a number", str: "a word"}
    for key, default in defaults.items():
        value, kind = given[key], type(default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ArtefactError(f"{HF_CONFIG} of {name}: {part}{key} is {value!r}; it must be {words[kind]}")


def _check_hugging_face(name: str, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    acts = {part["hidden_act"] for part in (text, vision)}
    wrong = None
    if vision["num_channels"] != 3:
        wrong = f"vision_config.num_channels is {vision['num_channels']}; it must be 3"
    elif len(acts) != 1 or not acts <= {"gelu", "quick_gelu"}:
        wrong = f"hidden_act is {' and '.join(sorted(map(str, acts)))}; it must be gelu or quick_gelu in both towers"
    elif text["eos_token_id"] not in (_HF_HIGHEST, text["vocab_size"] - 1):
        wrong = f"text_config.eos_token_id is {text['eos_token_id']}; text is read at the highest token here"
    if wrong:
        raise ArtefactError(f"{HF_CONFIG} of {name}: {wrong}")
