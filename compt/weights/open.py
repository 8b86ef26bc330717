"""Opening a model of any program, in any supported format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from compt.errors import ArtefactError
from compt.models.presets import ModelSpec
from compt.models.scalars import loss_with
from compt.weights import dcp, files, tags
from compt.weights import deepspeed as zero
from compt.weights.artefact import CONFIG, MANIFEST, Artefact, read_artefact
from compt.weights.infer import compare, infer_spec
from compt.weights.lazy import FoundWeights, digest_of
from compt.weights.names import OPENAI_SIZES, open_clip_view

MODEL_OPTION = "--teacher-model"
PREFIX_OPTION = "--teacher-prefix"

_AVERAGE = "ema"
_MODEL = "model"


def open_model(
    path: str | Path, spec: ModelSpec | None = None, prefix: str | None = None, verify: bool = True
) -> Artefact:
    """A model to start from; each access to its state reads one parameter.

    `path`: a folder of compt, open_clip, Hugging Face (CLIP), torch.distributed.checkpoint or DeepSpeed (ZeRO 0 to 3),
    a folder with weights alone, or a job's folder in a run, which means its model; a .safetensors, .pt, .pth or .bin
    file; or ARCH:TAG, a pretrained tag of open_clip whose weights are on the disk already.
    `spec`: the model. Needed where the source does not describe it and its shapes do not determine it; otherwise
    compared with the source. `prefix`: which of several models in the source, such as "student" or "module.ema".
    `verify`: compare digests, where the source has some.

    The state has open_clip's names, the source's dtypes (DeepSpeed's: fp32), and learned scalars in shape (). The
    manifest of a model that compt did not write holds only `left_out`: what else the source holds (projectors,
    buffers, another model). Raises ArtefactError, listing key by key what does not fit.
    """
    path = Path(path)
    if (path / _MODEL / MANIFEST).is_file():
        path = path / _MODEL
    if (path / MANIFEST).is_file():
        if prefix is not None:
            raise ArtefactError(f"{path}: a model folder of compt holds one model; leave {PREFIX_OPTION} out")
        found = read_artefact(path, verify)
        _compare_specs(path, found.spec, spec)
        compare(found.state, found.spec, str(path))
        return found
    return _open_other(path, _find(path, verify), spec, prefix)


def average_of(artefact: Artefact) -> Mapping[str, Tensor] | None:
    """The moving average of the weights in a folder of compt, None without one.

    Raises ArtefactError when the average does not belong to the model.
    """
    expected = artefact.manifest.get("extra", {}).get(_AVERAGE)
    if expected is None:
        return None
    found = read_artefact(artefact.path / _AVERAGE)
    if found.hash != expected or replace(found.spec, name=artefact.spec.name) != artefact.spec:
        raise ArtefactError(f"{found.path}: not the average that {artefact.path / MANIFEST} names")
    compare(found.state, found.spec, str(found.path))
    return found.state


def _find(path: Path, verify: bool) -> FoundWeights:
    if path.is_file():
        return files.read_file(path)
    if path.is_dir():
        if (path / CONFIG).exists():
            return files.read_open_clip(path)
        if (path / files.HF_CONFIG).exists():
            return files.read_hugging_face(path)
        if (path / dcp.METADATA).exists():
            return dcp.read_dcp(path)
        if zero.is_zero_folder(path):
            return zero.read_zero(path)
        if files.has_weights(path):
            return files.read_plain(path)
        raise ArtefactError(
            f"{path}: no model folder: no weights, and none of {MANIFEST} (compt), {CONFIG} (open_clip), "
            f"{files.HF_CONFIG} (Hugging Face), {dcp.METADATA} (torch.distributed.checkpoint), {zero.LATEST} or "
            "*_model_states.pt (DeepSpeed) in it"
        )
    # Only the last part: callers may have joined the tag to a folder.
    tag = tags.split_tag(path.name)
    if tag is not None:
        return tags.read_tag(*tag, verify=verify)
    raise ArtefactError(f"{path}: no such model: neither a folder, nor a file, nor ARCH:TAG of open_clip's pretrained")


def _open_other(path: Path, found: FoundWeights, spec: ModelSpec | None, prefix: str | None) -> Artefact:
    view, left_out, leftover = open_clip_view(found.weights, prefix, str(path), PREFIX_OPTION)
    if found.spec is not None:
        _compare_specs(path, found.spec, spec)
        spec = found.spec
    elif spec is None:
        spec = infer_spec(view, leftover, path.name, MODEL_OPTION)
    if found.spec is None:
        spec = replace(spec, loss=loss_with(view))
    if set(leftover) >= OPENAI_SIZES and not spec.quick_gelu:
        raise ArtefactError(
            f"{path}: weights of OpenAI's own, whose activation is QuickGELU, and {spec.name} has GELU; "
            f"name a model with QuickGELU, as {MODEL_OPTION} ViT-B-32-quickgelu"
        )
    compare(view, spec, str(path))
    manifest = {"left_out": left_out} if left_out else {}
    return Artefact(path, spec, manifest, found.preprocess, view, partial(digest_of, found.files))


def _compare_specs(path: Path, found: ModelSpec, wanted: ModelSpec | None) -> None:
    # The user names sizes; the source says which learned scalars, and so which loss, the model has.
    if wanted is None or replace(found, name=wanted.name, loss=wanted.loss) == wanted:
        return
    names = (field.name for field in fields(wanted) if field.name not in ("name", "loss"))
    differ = [name for name in names if getattr(wanted, name) != getattr(found, name)]
    raise ArtefactError(f"{path}: not a {wanted.name}: {', '.join(differ)} differ")
