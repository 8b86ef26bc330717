"""From the arguments of `compt expand` to the teacher, the student and the plan."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from compt.cli.evaluate import open_source
from compt.errors import ArtefactError, ConfigError
from compt.models.growth import ExpandConfig
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS, ModelSpec
from compt.plan.links import MANIFEST
from compt.recipe.expansion import BothExpand, Expand, LinkExpand, TowerExpand, expansion
from compt.recipe.read import parse_pairs, read_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from compt.expand.plan import ExpansionPlan
    from compt.weights.artefact import Artefact

_OF_EXPANSION = ("job", "recipe_hash", "seed", "parent", "parent_hash", "expansion", "shard_bytes")
"""Fields that the manifest of a trained model shares with the manifest of its expanded weights."""
_LISTED = 5


@dataclass(frozen=True)
class ExpandRequest:
    """The arguments. `options`: --both, --image, --text, --seed, --shard-size, --set; a manifest determines them."""

    teacher: str
    student: str | None
    out: Path | None
    options: Mapping[str, Any]
    teacher_model: str | None
    teacher_prefix: str | None
    from_manifest: Path | None
    dry_run: bool
    verifies: bool

    @property
    def writes(self) -> bool:
        """Whether the student is to be written."""
        return not self.dry_run and (self.out is not None or not self.verifies)


@dataclass(frozen=True)
class Prepared:
    """What to do. `fields` and `preprocess` go into the student's manifest.

    `taken`: the sizes that the student takes over from the teacher. `repeats`: the hash of the weights that must come
    out, made with `versions` of the libraries.
    """

    teacher: Artefact
    plan: ExpansionPlan
    seed: int
    out: Path | None
    writes: bool
    fields: dict[str, Any]
    preprocess: Preprocess
    shard_bytes: int
    average: Mapping[str, Tensor] | None = None
    taken: dict[str, Any] = field(default_factory=dict)
    repeats: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rounded_to(self) -> str | None:
        """The type of the teacher's weights, in which the student is stored, if it is less than float32."""
        kind = self.teacher.state["text_projection"].dtype
        return str(kind).removeprefix("torch.") if kind.itemsize < 4 else None

    @property
    def notes(self) -> list[str]:
        """Sentences on what the student takes over, and on what is left out of the teacher's files."""
        said = [f"{key} {str(value).lower()}" for key, value in self.taken.items()]
        notes = [f"Taken over from the teacher: {', '.join(said)}."] if said else []
        left_out = self.teacher.manifest.get("left_out", [])
        if left_out:
            more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
            notes.append(f"Left out, because they are not part of the model: {', '.join(left_out[:_LISTED])}{more}.")
        return notes


def prepare(asked: ExpandRequest) -> Prepared:
    """Read what the plan needs; no weights are read. Raises ConfigError or ArtefactError."""
    manifest = None
    if asked.from_manifest is not None:
        asked, manifest = _repeating(asked, asked.from_manifest)
    if asked.writes and asked.out is None:
        raise ConfigError("name the folder to write, or add --dry-run, or --verify DATA")
    if asked.student is None:
        raise ConfigError("name the student: a preset; or give --from-manifest FILE to repeat an expansion")
    config = growth_config(asked.options)
    from compt.dist import collectives as dist
    from compt.expand.plan import ExpansionPlan
    from compt.weights.artefact import check_free
    from compt.weights.open import average_of

    if asked.out is not None and asked.writes:
        check_free(asked.out, Path(asked.teacher))
    # One rank compares the digests of the files. A plan alone needs no weights, and so no digests.
    careful = (asked.writes or asked.verifies) and dist.is_main()
    recorded = ExpansionPlan.from_json(manifest["expansion"]) if manifest else None
    model = asked.teacher_model or (recorded.teacher if recorded else None)
    teacher = open_source(asked.teacher, model, asked.teacher_prefix, verify=careful)
    if manifest is not None and recorded is not None:
        prepared = _repeated(asked, teacher, recorded, manifest)
    else:
        prepared = _new(asked, teacher, asked.student, config)
    if prepared.plan.needs_average:
        average = average_of(teacher)
        if average is None and asked.writes:
            raise ConfigError(
                f"this depth operator takes added layers from the moving average of the teacher's weights, and "
                f"{asked.teacher} is no model folder of a run with optimizer.ema, which has one; name such a folder, "
                "or choose another depth operator"
            )
        prepared = replace(prepared, average=average)
    return prepared


def _new(asked: ExpandRequest, teacher: Artefact, student: str, config: ExpandConfig) -> Prepared:
    from compt.expand.plan import make_plan

    spec, taken = student_spec(teacher.spec, student, asked.options["set"] or ())
    plan = make_plan(teacher.spec, spec, config)
    seed, shard_bytes = asked.options["seed"] or 0, read_bytes(asked.options["shard-size"])
    fields: dict[str, Any] = {"parent": Path(asked.teacher).name}
    if asked.writes:  # for some formats the hash takes reading the whole model
        fields["parent_hash"] = teacher.hash
    fields |= {"expansion": plan.to_json(), "seed": seed, "shard_bytes": shard_bytes}
    preprocess = teacher.preprocess
    return Prepared(teacher, plan, seed, asked.out, asked.writes, fields, preprocess, shard_bytes, taken=taken)


def _repeating(asked: ExpandRequest, path: Path) -> tuple[ExpandRequest, dict[str, Any]]:
    """The request with the student of the manifest at `path`. With it, the argument STUDENT may be OUT instead."""
    extra = next((name for name, value in asked.options.items() if value not in (None, "", [])), None)
    if extra:
        raise ConfigError(f"--{extra}: --from-manifest already determines it; leave one of them out")
    manifest = _manifest(path / MANIFEST if path.is_dir() else path)
    name = str(manifest["spec"].get("name"))
    if asked.student not in (None, name):
        if asked.out is not None or asked.student in PRESETS:
            raise ConfigError(f"STUDENT {asked.student}: {path} was made as {name}; leave STUDENT out")
        asked = replace(asked, out=Path(str(asked.student)))
    return replace(asked, student=name), manifest


def _manifest(path: Path) -> dict[str, Any]:
    from compt.weights.artefact import read_object

    values = read_object(path)
    needed = {"expansion": dict, "seed": int, "parent_hash": str, "hash": str, "spec": dict, "preprocess": dict}
    for key, kind in needed.items():
        if not isinstance(values.get(key), kind):
            raise ArtefactError(f"{path}: not the manifest of an expanded model: it has no {key}")
    return values


def _repeated(asked: ExpandRequest, teacher: Artefact, plan: ExpansionPlan, manifest: dict[str, Any]) -> Prepared:
    from compt.weights.artefact import MAX_SHARD_BYTES, OWN_FIELDS

    if teacher.hash != manifest["parent_hash"]:
        raise ArtefactError(
            f"{asked.teacher}: is not the model that {asked.from_manifest} was expanded from "
            f"({manifest.get('parent', 'unnamed')}, hash {manifest['parent_hash'][:16]}; this one: {teacher.hash[:16]})"
        )
    fields, made = {key: value for key, value in manifest.items() if key not in OWN_FIELDS}, manifest["hash"]
    if "initial_hash" in manifest:  # the manifest of a trained model: repeat what it was before training
        fields = {key: value for key, value in fields.items() if key in _OF_EXPANSION}
        fields |= {"step": 0, "samples": 0, "epochs": 0.0}
        made = manifest["initial_hash"]
    preprocess = Preprocess.of(manifest["preprocess"], f"{asked.from_manifest}: preprocess")
    shard_bytes = manifest.get("shard_bytes", MAX_SHARD_BYTES)
    prepared = Prepared(teacher, plan, manifest["seed"], asked.out, asked.writes, fields, preprocess, shard_bytes)
    return replace(prepared, repeats=made, versions=dict(manifest.get("versions", {})))


def growth_config(options: Mapping[str, Any]) -> ExpandConfig:
    """The operators from the texts of --both, --image and --text. Raises ConfigError naming the option and the key."""
    both = parse_pairs(BothExpand, options["both"], "--both")
    image, text = (parse_pairs(TowerExpand, options[name], f"--{name}") for name in ("image", "text"))
    return expansion(Expand(), LinkExpand(**both.model_dump(), image=image, text=text))


def read_bytes(text: str | None) -> int:
    """`500MB`, `2 GiB` or a number of bytes; None for the default. Raises ConfigError."""
    from compt.weights.artefact import MAX_SHARD_BYTES

    if text is None:
        return MAX_SHARD_BYTES
    with contextlib.suppress(ValidationError):
        size = int(TypeAdapter(ByteSize).validate_python(text))
        if size > 0:
            return size
    raise ConfigError(f"--shard-size {text}: should be a size in bytes, as 500MB or 2GiB")


def read_sizes(given: Sequence[str]) -> dict[str, Any]:
    """`FIELD=VALUE` texts of --set: YAML values, or a list as 2-2-8-2. Raises ConfigError."""
    values: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        is_list = re.fullmatch(r"\d+(-\d+)+", value)
        values[key] = [int(part) for part in value.split("-")] if is_list else read_yaml(value, text)
    return values


def student_spec(teacher: ModelSpec, name: str, sizes: Sequence[str]) -> tuple[ModelSpec, dict[str, Any]]:
    """`student_of` with the texts of --set. Raises ConfigError."""
    from compt.weights.infer import student_of

    return student_of(teacher, name, read_sizes(sizes), "--set ")
