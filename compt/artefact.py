"""The model folder that passes from link to link and to users: safetensors, open_clip's config, a manifest.

model-00001-of-0000N.safetensors    the weights under open_clip's names, logit_scale a scalar
model.safetensors.index.json        which file holds which parameter (N > 1)
open_clip_config.json               what `open_clip.create_model("local-dir:FOLDER")` builds the model from (N = 1)
manifest.json                       spec, preprocessing, tokenizer, versions, digests, and what the writer adds
ema/                                further weights of the same model, a model folder of their own
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compt.errors import ArtefactError, ConfigError, RunError
from compt.files import new_folder, read_json, sha256_file, write_json
from compt.models import ClipModel, build, load_state, materialise, spec_from_open_clip
from compt.presets import OPENAI_MEAN, OPENAI_STD, ModelSpec

FORMAT = "compt-model"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "open_clip_config.json"
INDEX = "model.safetensors.index.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000

_TOKENIZER = "open_clip.SimpleTokenizer"


class LazyState(Mapping[str, Tensor]):
    """Parameter name -> tensor, read from its safetensors file only when asked for."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in names:
            try:
                handle: Any = safe_open(folder / file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ArtefactError(f"{folder / file}: not a readable safetensors file ({error})") from error
            self._open[file] = handle
            keys: list[str] = list(handle.keys())
            for key in keys:
                if key in self._file_of:
                    raise ArtefactError(f"{folder}: {key} is in {self._file_of[key]} and in {file}")
                self._file_of[key] = file

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            tensor: Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise ArtefactError(f"{self._folder / file}: cannot read {name} ({error})") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without reading it."""
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def slice(self, name: str) -> Any:
        """A safetensors slice: index it to read a part of a parameter."""
        return self._open[self._file_of[name]].get_slice(name)

    def file_of(self, name: str) -> str:
        """The file that holds a parameter."""
        return self._file_of[name]


@dataclass(frozen=True)
class Artefact:
    """A model on disk. `manifest` is empty for a model that compt did not write."""

    path: Path
    spec: ModelSpec
    manifest: dict[str, Any]
    preprocess: dict[str, Any]
    state: LazyState
    hash: str

    def load_model(self, device: torch.device | str = "cpu") -> ClipModel:
        """The model with these weights in fp32. Raises ArtefactError when they are not those of the spec."""
        model = build(self.spec, device="meta")
        materialise(model, device)
        load_state(model, self.state)
        return model


def versions() -> dict[str, str]:
    """Versions of what computed a model, for manifests."""
    found = {"python": platform.python_version()}
    for package, key in (("compt", "compt"), ("torch", "torch"), ("open_clip_torch", "open_clip"), ("timm", "timm")):
        try:
            found[key] = version(package)
        except PackageNotFoundError:  # compt run from a checkout that is not installed
            found[key] = "unknown"
    return found


def check_free(folder: Path, source: Path | None = None) -> None:
    """Raise ArtefactError unless a model may be written to `folder`: nothing is there, or only a model of ours.

    One that holds other files as well would lose them, and so would a `source` that is read at the same time.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if source is not None and Path(source).exists() and folder.samefile(source):
        raise ArtefactError(f"{folder}: would be replaced by what is made of it; name another folder")
    if not (_holds_only_ours(folder) or _holds_only_an_export(folder)):
        raise ArtefactError(
            f"{folder}: exists and is not a model folder that compt wrote, or holds other files too; "
            "it is not replaced: name another folder, or remove it"
        )


def _holds_only_ours(folder: Path) -> bool:
    try:
        manifest = _read_object(folder / MANIFEST)
        extra = set(manifest["extra"])
        listed = {MANIFEST, *manifest["files"], *extra}
        ours = manifest["format"] == FORMAT and {path.name for path in folder.iterdir()} <= listed
        return ours and all(_holds_only_ours(folder / name) for name in extra)
    except (ArtefactError, KeyError, TypeError, OSError):
        return False


def _holds_only_an_export(folder: Path) -> bool:
    try:
        with safe_open(folder / OPEN_CLIP_WEIGHTS, framework="pt", device="cpu") as weights:
            written_by = (weights.metadata() or {}).get("written_by")
        return written_by == "compt" and {path.name for path in folder.iterdir()} == {OPEN_CLIP_WEIGHTS, CONFIG}
    except (OSError, SafetensorError):
        return False


def write_artefact(
    folder: Path,
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    manifest: Mapping[str, Any],
    *,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    interpolation: str = "bicubic",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_states: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a model folder; it appears whole or not at all, and replaces an older one, but nothing else.

    `state` is read one tensor at a time and at most one file of `max_shard_bytes` is held. `manifest` takes the
    caller's own fields (JSON). `extra_states` ({"ema": state}) become sub-folders that are model folders themselves.
    Raises ArtefactError for weights of another model or a folder in use (`check_free`), ValueError for a manifest field
    that is not the caller's to set.
    """
    check_free(folder)
    preprocess = {
        "size": spec.image_size,
        "mode": "RGB",
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "interpolation": interpolation,
        "resize_mode": "shortest",
    }
    extra = dict(extra_states or {})
    for name in extra:
        _plain_name(Path(folder), name)
    with new_folder(Path(folder)) as temporary:
        hashes = {
            name: _write_model(temporary / name, values, spec, manifest, preprocess, max_shard_bytes, {})
            for name, values in extra.items()
        }
        _write_model(temporary, state, spec, manifest, preprocess, max_shard_bytes, hashes)


def _write_model(
    folder: Path,
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    manifest: Mapping[str, Any],
    preprocess: dict[str, Any],
    max_shard_bytes: int,
    extra: dict[str, str],
) -> str:
    folder.mkdir(exist_ok=True)
    _write_shards(folder, state, _expected_shapes(state, spec), max_shard_bytes)
    write_json(folder / CONFIG, {"model_cfg": spec.open_clip_config(), "preprocess_cfg": preprocess})
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    own: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": spec.to_dict(),
        "preprocess": preprocess,
        "tokenizer": {
            "name": _TOKENIZER,
            "context_length": spec.context_length,
            "vocab_size": spec.vocab_size,
        },
        "versions": versions(),
        "hash": _weights_hash({name: str(entry["sha256"]) for name, entry in files.items()}),
        "extra": extra,
        "files": files,
    }
    taken = sorted(set(own) & set(manifest))
    if taken:
        raise ValueError(f"manifest fields set by write_artefact itself: {', '.join(taken)}")
    write_json(folder / MANIFEST, own | dict(manifest))
    return str(own["hash"])


def _expected_shapes(state: Iterable[str], spec: ModelSpec) -> dict[str, torch.Size]:
    shapes = {name: tensor.shape for name, tensor in build(spec, device="meta").state_dict().items()}
    odd = sorted(set(state) ^ set(shapes))
    if odd:
        more = " …" if len(odd) > 8 else ""
        raise ArtefactError(f"the weights to write are not those of model {spec.name}: {', '.join(odd[:8])}{more}")
    return shapes | {"logit_scale": torch.Size()}


def _write_shards(
    folder: Path, state: Mapping[str, Tensor], shapes: dict[str, torch.Size], max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        _save(pending, folder / f"part-{len(shards)}")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in state.items():
        whole = tensor.detach().cpu().contiguous()
        whole = whole.reshape(()) if name == "logit_scale" else whole
        if whole.shape != shapes[name]:
            found, wanted = list(whole.shape), list(shapes[name])
            raise ArtefactError(f"the weights to write: {name} is {found} where the model has {wanted}")
        if pending and size + whole.nbytes > max_shard_bytes:
            flush()
            size = 0
        pending[name] = whole
        size += whole.nbytes
        total += whole.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _save(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # a full disk, among others: safetensors raises no OSError
        raise RunError(f"cannot write {path}: {error}") from error


def read_artefact(folder: Path, verify: bool = True) -> Artefact:
    """Open a model folder that compt wrote; tensors are read when asked for.

    Sizes are always compared with the manifest, contents (SHA-256) with `verify`. Raises ArtefactError when something
    is missing, torn, altered, or not a model folder.
    """
    folder = Path(folder)
    manifest = _read_object(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtefactError(f"{folder / MANIFEST}: not the manifest of a compt model")
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise ArtefactError(f"{folder / MANIFEST}: format version {found}; this compt reads {FORMAT_VERSION}")
    try:
        spec = ModelSpec.from_dict(manifest["spec"])
        preprocess = dict(manifest["preprocess"])
        files = {_plain_name(folder, name): dict(entry) for name, entry in manifest["files"].items()}
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ArtefactError(f"{folder / MANIFEST}: {_cause(error)}") from error
    for name, (size, digest) in expected.items():
        _check_file(folder / name, size, digest if verify else None)
    weights = sorted(name for name in expected if name.endswith(".safetensors"))
    state = _open_state(folder, weights, INDEX if INDEX in expected else None)
    return Artefact(
        path=folder,
        spec=spec,
        manifest=manifest,
        preprocess=preprocess,
        state=state,
        hash=_weights_hash({name: digest for name, (_, digest) in expected.items()}),
    )


def read_any(path: Path, spec: ModelSpec | None = None, verify: bool = True) -> Artefact:
    """Open a model to start from: a compt folder, an open_clip folder, or (with its `spec`) one .safetensors file.

    Raises ArtefactError; also when `spec` is given and the folder holds another model.
    """
    path = Path(path)
    if not path.exists():
        raise ArtefactError(f"{path}: no such model")
    if path.is_file():
        found = _read_file(path, spec)
    elif (path / MANIFEST).exists():
        found = read_artefact(path, verify)
    elif (path / CONFIG).exists():
        found = _read_open_clip(path)
    else:
        raise ArtefactError(f"{path}: neither {MANIFEST} nor {CONFIG} in it, so it is no model folder")
    if spec is not None and replace(found.spec, name=spec.name) != spec:
        differ = [
            f.name for f in fields(spec) if f.name != "name" and getattr(spec, f.name) != getattr(found.spec, f.name)
        ]
        raise ArtefactError(f"{path}: not a {spec.name}: {', '.join(differ)} differ")
    return found


def _read_file(path: Path, spec: ModelSpec | None) -> Artefact:
    if path.suffix != ".safetensors":
        raise ArtefactError(f"{path}: only .safetensors files are read; convert it first (pickles can run code)")
    if spec is None:
        raise ArtefactError(f"{path}: a single file says nothing of its model; name the model, or give a model folder")
    state = LazyState(path.parent, [path.name])
    preprocess = {
        "size": spec.image_size,
        "mean": list(OPENAI_MEAN),
        "std": list(OPENAI_STD),
        "interpolation": "bicubic",
    }
    return Artefact(path, spec, {}, preprocess, state, _weights_hash({path.name: sha256_file(path)}))


def _read_open_clip(folder: Path) -> Artefact:
    config = _read_object(folder / CONFIG)
    spec = spec_from_open_clip(config, name=folder.name)
    index = INDEX if (folder / INDEX).exists() else None
    names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if index is not None:
        names = sorted({_plain_name(folder, name) for name in _weight_map(folder, index).values()})
    elif OPEN_CLIP_WEIGHTS in names:
        names = [OPEN_CLIP_WEIGHTS]
    if not names or (index is None and len(names) > 1):
        raise ArtefactError(f"{folder}: {len(names)} .safetensors files and no {INDEX}; expected {OPEN_CLIP_WEIGHTS}")
    state = _open_state(folder, names, index)
    preprocess = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD), "interpolation": "bicubic"}
    preprocess |= dict(config.get("preprocess_cfg") or {}) | {"size": spec.image_size}
    return Artefact(folder, spec, {}, preprocess, state, _weights_hash({n: sha256_file(folder / n) for n in names}))


def _open_state(folder: Path, weights: Sequence[str], index: str | None) -> LazyState:
    state = LazyState(folder, weights)
    if index is not None:
        listed = _weight_map(folder, index)
        if listed != {name: state.file_of(name) for name in state}:
            raise ArtefactError(f"{folder / index}: does not list what the files hold")
    return state


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    listed = _read_object(folder / index).get("weight_map")
    if not isinstance(listed, dict):
        raise ArtefactError(f"{folder / index}: no weight_map in it")
    return {name: _plain_name(folder, file) for name, file in listed.items()}


def export_open_clip(source: Artefact, folder: Path) -> None:
    """Write a model as stock open_clip's own folder: one weight file and its config. Holds the weights in memory.

    Raises ArtefactError for a folder in use (`check_free`).
    """
    check_free(folder, source.path)
    with new_folder(Path(folder)) as temporary:
        state = {name: tensor.contiguous() for name, tensor in source.state.items()}
        state["logit_scale"] = state["logit_scale"].reshape(())
        _save(state, temporary / OPEN_CLIP_WEIGHTS, written_by="compt")
        config = {"model_cfg": source.spec.open_clip_config(), "preprocess_cfg": source.preprocess}
        write_json(temporary / CONFIG, config)


def _weights_hash(digests: Mapping[str, str]) -> str:
    lines = [digests[name] for name in sorted(digests) if name.endswith(".safetensors")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain_name(folder: Path, name: Any) -> str:
    """A file name that cannot lead out of its folder. Raises ArtefactError otherwise."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise ArtefactError(f"{folder}: {name!r} is not a plain file name")
    return name


def _check_file(path: Path, size: int, digest: str | None) -> None:
    if path.is_symlink() and not path.exists():
        raise ArtefactError(f"{path}: a link to nothing")
    if not path.is_file():
        raise ArtefactError(f"{path}: missing")
    if path.stat().st_size != size:
        raise ArtefactError(f"{path}: {path.stat().st_size} bytes where the manifest says {size}")
    if digest is not None and sha256_file(path) != digest:
        raise ArtefactError(f"{path}: its content is not what the manifest says (SHA-256 differs)")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: not JSON ({error})") from error
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: not a JSON object")
    return value


def _cause(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
