"""The model folder that passes from link to link and to users: safetensors, open_clip's config, a manifest.

open_clip_model.safetensors         the weights under open_clip's names, learned scalars in shape ()
model-00001-of-0000N.safetensors    instead of it, the weights of a model that needs several files
model.safetensors.index.json        which of them holds which parameter
open_clip_config.json               what `open_clip.create_model("local-dir:FOLDER")` builds a model of one file from
manifest.json                       spec, preprocessing, tokenizer, versions, digests, and the caller's own fields
ema/                                other weights of the same model, in a model folder of their own
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from compt.dist import collectives as dist
from compt.errors import ArtefactError, ConfigError, RunError
from compt.files import disk_errors, new_folder, read_json, sha256_file, write_json
from compt.models.clip import ClipModel, build, exported_shapes, fill
from compt.models.preprocess import AS_OPENAI, Preprocess
from compt.models.presets import ModelSpec
from compt.weights.lazy import Weights, check_link, plain_name
from compt.weights.safetensors import LazyState, Shape, share_out, split_files, write_tensors

FORMAT = "compt-model"
EXPORT_FORMAT = "compt-export"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "open_clip_config.json"
INDEX = "model.safetensors.index.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
HF_PIXELS = "preprocessor_config.json"
EXPORT_RECORD = "compt_export.json"
"""In a folder that `compt export` wrote: the model, the format, and all other files."""
MAX_SHARD_BYTES = 5_000_000_000

OWN_FIELDS = frozenset(
    ("format", "format_version", "spec", "preprocess", "tokenizer", "versions", "hash", "extra", "files")
)

_TOKENIZER = "open_clip.SimpleTokenizer"


@dataclass(frozen=True)
class Artefact:
    """A model on disk. For a model that compt did not write, `manifest` has at most the key `left_out`.

    `digest` is the hash of the weights, or a function that computes it.
    """

    path: Path
    spec: ModelSpec
    manifest: dict[str, Any]
    preprocess: Preprocess
    state: Weights
    digest: str | Callable[[], str]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights. For a model that compt did not write, the first access reads all of its files."""
        return self.digest if isinstance(self.digest, str) else self.digest()

    def load_model(self, device: torch.device | str = "cpu") -> ClipModel:
        """The model with these weights in fp32. Raises ArtefactError when they are not those of the spec."""
        return fill(build(self.spec, device="meta"), self.state, device)


def versions() -> dict[str, str]:
    """Versions of the packages that compute a model, for manifests."""
    found = {"python": platform.python_version()}
    for package, key in (("compt", "compt"), ("torch", "torch"), ("open_clip_torch", "open_clip"), ("timm", "timm")):
        try:
            found[key] = version(package)
        except PackageNotFoundError:  # compt run from a checkout that is not installed
            found[key] = "unknown"
    return found


def check_free(folder: Path, source: Path | None = None) -> None:
    """Raise ArtefactError unless a model may be written to `folder`: it is empty, missing, or holds only our model.

    Writing replaces the folder, so other files in it would be lost. A `source` that is read at the same time may
    neither lie in `folder` nor contain it; links are followed for that.
    """
    folder = Path(folder)
    if source is not None and Path(source).exists():
        _check_apart(folder, Path(source))
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any(_holds_only_ours(folder, record) for record in (MANIFEST, EXPORT_RECORD)):
        raise ArtefactError(
            f"{folder}: exists and is not a model folder that compt wrote, or holds other files too; "
            "it is not replaced: name another folder, or remove it"
        )


def _check_apart(folder: Path, source: Path) -> None:
    target, origin = folder.resolve(), source.resolve()
    if origin == target:
        raise ArtefactError(f"{folder}: is read and would be replaced; name another folder")
    if origin.is_relative_to(target):
        raise ArtefactError(f"{folder}: holds {source}, which is read; name another folder")
    if target.is_relative_to(origin):
        raise ArtefactError(f"{folder}: lies in {source}, which is read; name another folder")


def _holds_only_ours(folder: Path, record: str) -> bool:
    """Whether `folder` has the file `record` that compt wrote, and no files but those that it names."""
    try:
        values = read_object(folder / record)
        extra = set(values["extra"])
        listed = {record, *values["files"], *extra}
        ours = values["format"] in (FORMAT, EXPORT_FORMAT) and {path.name for path in folder.iterdir()} <= listed
        return ours and all(_holds_only_ours(folder / name, record) for name in extra)
    except (ArtefactError, KeyError, TypeError, OSError):
        return False


def write_artefact(
    folder: Path,
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    manifest: Mapping[str, Any],
    *,
    preprocess: Preprocess = AS_OPENAI,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_states: Mapping[str, Mapping[str, Tensor]] | None = None,
    together: bool = False,
    check: Callable[[str], None] | None = None,
) -> None:
    """Write a model folder. It appears whole or not at all, and replaces an older model folder, but nothing else.

    Takes one tensor at a time from `state` and keeps none. `manifest` has the caller's own fields (JSON).
    `extra_states` ({"ema": state}) become sub-folders that are model folders themselves. A file holds as many
    parameters as take `max_shard_bytes` in float32. `together`: every rank calls this with the same arguments and
    writes its share of the files, on a file system that all ranks see; otherwise one process writes. The folder is the
    same byte by byte for any number of ranks. An error of one rank is raised on all. Rank 0 calls `check` with the hash
    of the weights before the folder appears; if `check` raises, nothing has changed.
    Raises ArtefactError for weights of another model or a folder in use (`check_free`), RunError when it cannot be
    written.
    """
    folder = Path(folder)
    pixels = preprocess.to_dict(spec.image_size)
    states = {plain_name(folder, name): values for name, values in (extra_states or {}).items()} | {"": state}
    writers = Writers(folder, together)
    parts = writers.all(lambda: _parts(states, spec, max_shard_bytes))
    with contextlib.ExitStack() as undo:
        temporary = writers.main(lambda: _begin(folder, list(states), undo))
        shares = writers.gather(writers.all(lambda: _write_own(temporary, states, parts, writers)))
        written = {part: entry for share in shares for part, entry in share.items()}

        def finish() -> None:
            hashes: dict[str, str] = {}
            for name in states:  # the model itself comes last: its manifest holds the hashes of the others
                files = [(part, written[part]) for part in parts if part.model == name]
                extra = {} if name else hashes
                hashes[name] = _describe(temporary / name, files, spec, manifest, pixels, extra)
            if check is not None:
                check(hashes[""])
            undo.close()

        writers.main(finish)


@dataclass(frozen=True)
class _Shard:
    """One file of weights: the model it belongs to ("" for the folder's own), its name, and its parameters."""

    model: str
    file: str
    shapes: Mapping[str, Shape] = field(hash=False)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


_Written = tuple[str, int]
"""SHA-256 of a file, and the bytes of its tensors."""


def _parts(states: Mapping[str, Mapping[str, Tensor]], spec: ModelSpec, max_shard_bytes: int) -> list[_Shard]:
    parts = []
    for model, state in states.items():
        shapes = expected_shapes(state, spec)
        files = split_files(shapes, max_shard_bytes)
        for number, names in enumerate(files):
            numbered = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
            file = numbered if len(files) > 1 else OPEN_CLIP_WEIGHTS
            parts.append(_Shard(model, file, {name: shapes[name] for name in names}))
    return parts


def _begin(folder: Path, models: Iterable[str], undo: contextlib.ExitStack) -> Path:
    check_free(folder)
    temporary = undo.enter_context(new_folder(folder))
    for name in models:
        (temporary / name).mkdir(exist_ok=True)
    return temporary


def _write_own(
    folder: Path, states: Mapping[str, Mapping[str, Tensor]], parts: Sequence[_Shard], writers: Writers
) -> dict[_Shard, _Written]:
    """Write the files that this process owns."""
    writers.check_seen(folder)
    written = {}
    for part, owner in zip(parts, share_out([part.elements for part in parts], writers.number), strict=True):
        if owner == writers.rank:
            path = folder / part.model / part.file
            tensor_bytes = write_tensors(path, states[part.model], part.shapes, {"format": "pt"})
            written[part] = (sha256_file(path), tensor_bytes)
    return written


def _describe(
    folder: Path,
    files: Sequence[tuple[_Shard, _Written]],
    spec: ModelSpec,
    manifest: Mapping[str, Any],
    preprocess: dict[str, Any],
    extra: dict[str, str],
) -> str:
    """Write all files of one model but its weights; returns the hash of the weights."""
    if len(files) > 1:
        total = sum(size for _, (_, size) in files)
        weight_map = {name: part.file for part, _ in files for name in part.shapes}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, {"model_cfg": spec.open_clip_config(), "preprocess_cfg": preprocess})
    digests = {part.file: digest for part, (digest, _) in files}
    digests |= {path.name: sha256_file(path) for path in folder.glob("*.json")}
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
        "hash": _weights_hash(digests),
        "extra": extra,
        "files": {name: {"sha256": digests[name], "bytes": (folder / name).stat().st_size} for name in sorted(digests)},
    }
    write_json(folder / MANIFEST, own | dict(manifest))
    return str(own["hash"])


def expected_shapes(state: Iterable[str], spec: ModelSpec) -> dict[str, Shape]:
    """Name -> shape of every parameter of `spec`. Raises ArtefactError unless `state` has exactly these names."""
    shapes = exported_shapes(spec)
    odd = sorted(set(state) ^ set(shapes))
    if odd:
        more = " …" if len(odd) > 8 else ""
        raise ArtefactError(f"the weights to write are not those of model {spec.name}: {', '.join(odd[:8])}{more}")
    return shapes


def read_artefact(folder: Path, verify: bool = True) -> Artefact:
    """Open a model folder that compt wrote; each access to its state reads one tensor.

    Compares the sizes of files with the manifest, and with `verify` their contents (SHA-256). Raises ArtefactError when
    something is missing, torn or altered, and for a folder that is no model folder.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        check_link(folder / MANIFEST)
    manifest = read_object(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtefactError(f"{folder / MANIFEST}: not the manifest of a compt model")
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise ArtefactError(f"{folder / MANIFEST}: format version {found}; this compt reads {FORMAT_VERSION}")
    try:
        spec = ModelSpec.from_dict(manifest["spec"])
        preprocess = Preprocess.of(dict(manifest["preprocess"]), f"{folder / MANIFEST}: preprocess")
        files = {plain_name(folder, name): dict(entry) for name, entry in manifest["files"].items()}
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as error:
        raise ArtefactError(f"{folder / MANIFEST}: {_cause(error)}") from error
    for name, (size, digest) in expected.items():
        _check_file(folder / name, size, digest if verify else None)
    weights = sorted(name for name in expected if name.endswith(".safetensors"))
    state = open_state(folder, weights, INDEX if INDEX in expected else None)
    return Artefact(
        path=folder,
        spec=spec,
        manifest=manifest,
        preprocess=preprocess,
        state=state,
        digest=_weights_hash({name: digest for name, (_, digest) in expected.items()}),
    )


def open_state(folder: Path, weights: Sequence[str], index: str | None) -> LazyState:
    """The parameters in the files `weights`. Raises ArtefactError, also for an index that lists other contents."""
    state = LazyState(folder, weights)
    if index is not None:
        listed = weight_map(folder, index)
        if listed != {name: state.file_of(name) for name in state}:
            raise ArtefactError(f"{folder / index}: does not list what the files hold")
    return state


def weight_map(folder: Path, index: str) -> dict[str, str]:
    """Parameter -> name of its file, from an index. Raises ArtefactError, also for a file outside the folder."""
    listed = read_object(folder / index).get("weight_map")
    if not isinstance(listed, dict):
        raise ArtefactError(f"{folder / index}: has no weight_map")
    return {name: plain_name(folder, file) for name, file in listed.items()}


def _weights_hash(digests: Mapping[str, str]) -> str:
    lines = [digests[name] for name in sorted(digests) if name.endswith(".safetensors")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_file(path: Path, size: int, digest: str | None) -> None:
    if path.is_symlink() and not path.exists():
        raise ArtefactError(f"{path}: a link to nothing")
    check_link(path)
    if not path.is_file():
        raise ArtefactError(f"{path}: missing")
    if path.stat().st_size != size:
        raise ArtefactError(f"{path}: {path.stat().st_size} bytes where the manifest says {size}")
    if digest is not None and sha256_file(path) != digest:
        raise ArtefactError(f"{path}: its content is not what the manifest says (SHA-256 differs)")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ArtefactError."""
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing") from error
    except ValueError as error:  # of the syntax, the encoding, or a number of thousands of digits
        raise ArtefactError(f"{path}: not JSON ({error})") from error
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: not a JSON object")
    return value


def _cause(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


T = TypeVar("T")


@dataclass(frozen=True)
class Writers:
    """The processes that write `folder`: all ranks, which then all call every method, or this process as rank 0."""

    folder: Path
    together: bool

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return dist.rank() if self.together else 0

    @property
    def number(self) -> int:
        """The number of processes."""
        return dist.world_size() if self.together else 1

    def all(self, action: Callable[[], T]) -> T:
        """Run `action` on each. A ComptError of one is raised on all; an OSError becomes a RunError."""

        def guarded() -> T:
            with disk_errors(self.folder):
                return action()

        return dist.on_all(guarded) if self.together else guarded()

    def check_seen(self, folder: Path) -> None:
        """Raise RunError where this process does not see `folder`, which rank 0 made."""
        if not folder.is_dir():
            raise RunError(f"cannot write {folder}: rank {self.rank} does not see it; all ranks need one file system")

    def main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on all."""
        result: Any = self.all(lambda: action() if self.rank == 0 else None)
        return dist.broadcast_object(result) if self.together else result  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, on all."""
        return dist.gather_objects(value) if self.together else [value]
