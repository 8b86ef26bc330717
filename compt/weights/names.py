"""Other programs' parameter names and open_clip's: prefixes, wrappers, other layouts of the same model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from compt.errors import ArtefactError
from compt.models.scalars import SCALAR_NAMES
from compt.weights.lazy import TensorSource, View, Weights

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_ANCHOR = "token_embedding.weight"
_SHOWN = 6

# What training writes beside the weights, and a model does not need.
_LEFTOVERS = re.compile(
    r"(projector|visual_proj|text_proj|optim|optimizer)\..*"
    r"|(.*\.)?(attn_mask|relative_position_index|position_ids)"
    r"|input_resolution|context_length|vocab_size"
)
_OPTIMIZER = re.compile(r"(.*\.)?(optim|optimizer)\.")
OPENAI_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})
"""What OpenAI's own state dicts hold beside the weights."""

# Hugging Face's names outside the blocks: open_clip's name, their name, whether they store it transposed.
_HUGGING_FACE = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding", False),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight", False),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight", False),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight", False),
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias", False),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight", False),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias", False),
    ("visual.proj", "visual_projection.weight", True),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight", False),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight", False),
    ("ln_final.weight", "text_model.final_layer_norm.weight", False),
    ("ln_final.bias", "text_model.final_layer_norm.bias", False),
    ("text_projection", "text_projection.weight", True),
    *((name, name, False) for name in SCALAR_NAMES),
)
_HUGGING_FACE_TOWERS = {"vision_model.encoder.layers": "visual.transformer", "text_model.encoder.layers": "transformer"}
_HUGGING_FACE_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HUGGING_FACE_LAYER = re.compile(r"((?:vision|text)_model\.encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)")


def open_clip_view(weights: Weights, prefix: str | None, where: str, option: str) -> tuple[View, list[str], list[str]]:
    """The one model in `weights` under open_clip's names, all names left out, and those left out of the model itself.

    `prefix` chooses among several models, by the model's prefix or a part of it between dots. Learned scalars get shape
    (). Raises ArtefactError, which begins with `where`, for no model, and for several models without a choice: it lists
    them and names `option`, the option that chooses.
    """
    raw = _unwrapped(weights, where)
    models = models_in(raw)
    chosen = _choose(models, prefix, raw, where, option)
    others = [root for root in models if root != chosen]
    own = {name.removeprefix(chosen): source for name, source in raw.items() if name.startswith(chosen)}
    left_out = {_short(name, others) for name in raw if not name.startswith(chosen)}
    leftover = [name for name in own if _LEFTOVERS.fullmatch(name)]
    left_out |= {_short(chosen + name, []) for name in leftover}
    for name in leftover:
        del own[name]
    if "text_model.embeddings." + _ANCHOR in own:
        parts = _from_hugging_face(own, weights)
    else:
        parts = {
            name: TensorSource((source,), tuple(weights.shape(source)))
            for name, source in _swin_now(_text_at_top(own)).items()
        }
    for name in SCALAR_NAMES:
        if name in parts and parts[name].shape == (1,):
            parts[name] = TensorSource(parts[name].names, (), "reshape")
    return View(weights, parts), sorted(left_out), leftover


def models_in(names: Iterable[str]) -> list[str]:
    """The prefixes under which `names` hold a CLIP model, each empty or ending in a dot."""
    names = list(names)
    heads = {name.removesuffix(_ANCHOR) for name in names if name.endswith(_ANCHOR)}
    found = set()
    for head in heads:
        for inner, image in (("text_model.embeddings.", "vision_model."), ("text.", "visual."), ("", "visual.")):
            root = head.removesuffix(inner)
            if head.endswith(inner) and root[-1:] in ("", ".") and any(n.startswith(root + image) for n in names):
                found.add(root)
                break
    return sorted(found)


def _unwrapped(weights: Iterable[str], where: str) -> dict[str, str]:
    """Name without the parts that module wrappers add -> name in the source."""
    raw: dict[str, str] = {}
    for source in weights:
        name = source
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if name in raw:
            raise ArtefactError(f"{where}: {raw[name]} and {source} are the same parameter, twice")
        raw[name] = source
    return raw


def _choose(found: list[str], prefix: str | None, names: Iterable[str], where: str, option: str) -> str:
    if not found:
        some = ", ".join(list(names)[:_SHOWN]) or "nothing"
        raise ArtefactError(f"{where}: no CLIP model in it: no {_ANCHOR} with visual.* beside it, but {some}")
    listed = ", ".join(repr(root.removesuffix(".")) for root in found)
    if prefix is None:
        if len(found) > 1:
            raise ArtefactError(f"{where}: {len(found)} models in it, {listed}; choose one with {option}")
        return found[0]
    wanted = prefix.removesuffix(".")
    names_of = {root.removesuffix("."): root for root in found}
    if wanted in names_of:
        return names_of[wanted]
    fitting = [root for name, root in names_of.items() if wanted and f".{wanted}." in f".{name}."]
    if len(fitting) != 1:
        raise ArtefactError(f"{where}: {option} '{prefix}' is not one of the models in it: {listed}")
    return fitting[0]


def _short(name: str, models: Iterable[str]) -> str:
    """A short name for a tensor that is left out: its model or optimizer with a `*`, else its own name."""
    for root in models:
        if name.startswith(root):
            return f"{root}*"
    match = _OPTIMIZER.match(name)
    return f"{match[0]}*" if match else name


def _text_at_top(own: Mapping[str, str]) -> dict[str, str]:
    """open_clip's layout with a module `text`, turned into the layout without it."""
    if "text." + _ANCHOR not in own:
        return dict(own)
    return {name.removeprefix("text."): source for name, source in own.items()}


def _swin_now(own: Mapping[str, str]) -> dict[str, str]:
    """Since timm 0.9 a Swin's patch merging begins a stage; before, it ended the previous one."""
    if not any(name.startswith("visual.trunk.layers.0.downsample.") for name in own):
        return dict(own)
    pattern = re.compile(r"(visual\.trunk\.layers\.)(\d+)(\.downsample\..*)")
    return {
        pattern.sub(lambda match: f"{match[1]}{int(match[2]) + 1}{match[3]}", name): source
        for name, source in own.items()
    }


def _from_hugging_face(own: Mapping[str, str], weights: Weights) -> dict[str, TensorSource]:
    parts: dict[str, TensorSource] = {}
    known = {theirs: (name, turned) for name, theirs, turned in _HUGGING_FACE}
    for theirs, source in own.items():
        shape = tuple(weights.shape(source))
        layer = _HUGGING_FACE_LAYER.fullmatch(theirs)
        if theirs in known:
            name, turned = known[theirs]
            parts[name] = (
                TensorSource((source,), shape[::-1], "transpose") if turned else TensorSource((source,), shape)
            )
        elif layer and layer[3] in _HUGGING_FACE_BLOCK:
            place = f"{_HUGGING_FACE_TOWERS[layer[1]]}.resblocks.{layer[2]}"
            parts[f"{place}.{_HUGGING_FACE_BLOCK[layer[3]]}.{layer[4]}"] = TensorSource((source,), shape)
        elif layer and layer[3] == "self_attn.q_proj":
            roles = [own.get(theirs.replace(".q_proj.", f".{role}_proj.")) for role in "qkv"]
            packed = tuple(role for role in roles if role is not None)
            shapes = {tuple(weights.shape(role))[1:] for role in packed}
            if len(packed) == 3 and len(shapes) == 1:
                rows = sum(weights.shape(role)[0] for role in packed)
                name = f"{_HUGGING_FACE_TOWERS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"
                parts[name] = TensorSource(packed, (rows, *shape[1:]), "stack")
        elif not (layer and layer[3] in ("self_attn.k_proj", "self_attn.v_proj")):
            parts[theirs] = TensorSource((source,), shape)  # unknown: the comparison with the model reports it
    return parts


def hugging_face_view(weights: Weights) -> View:
    """A ViT of compt under the names of transformers' CLIPModel, the packed projections of attention split in three."""
    named = {name: (theirs, turned) for name, theirs, turned in _HUGGING_FACE}
    blocks = {ours: theirs for theirs, ours in _HUGGING_FACE_BLOCK.items()}
    towers = {ours: theirs for theirs, ours in _HUGGING_FACE_TOWERS.items()}
    parts: dict[str, TensorSource] = {}
    for name in weights:
        shape = tuple(weights.shape(name))
        if name in named:
            theirs, turned = named[name]
            parts[theirs] = TensorSource((name,), shape[::-1], "transpose") if turned else TensorSource((name,), shape)
            continue
        tower, _, rest = name.partition(".resblocks.")
        number, _, inner = rest.partition(".")
        layer = f"{towers[tower]}.{number}"
        if inner.startswith("attn.in_proj_"):
            third = shape[0] // 3
            for at, role in enumerate("qkv"):
                theirs = f"{layer}.self_attn.{role}_proj.{inner.removeprefix('attn.in_proj_')}"
                parts[theirs] = TensorSource((name,), (third, *shape[1:]), "rows", at * third)
        else:
            part, _, kind = inner.rpartition(".")
            parts[f"{layer}.{blocks[part]}.{kind}"] = TensorSource((name,), shape)
    return View(weights, parts)
