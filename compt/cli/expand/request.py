"""From the arguments of `compt expand` to what is to be done: the teacher, the student, the plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compt.cli.tools import open_source
from compt.errors import ArtefactError, ConfigError
from compt.files import read_json
from compt.models.growth import TOWERS, ExpandConfig, TowerGrowth
from compt.models.presets import PRESETS, ModelSpec, resized
from compt.recipe.schema import checked_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from compt.expand.plan import ExpansionPlan
    from compt.weights.artefact import Artefact

T = TypeVar("T")

MANIFEST = "manifest.json"
_OF_EXPANSION = ("job", "recipe_hash", "seed", "parent", "parent_hash", "expansion", "shard_bytes")
"""What the manifest of a trained model has of that of its expanded weights."""
_LISTED = 5
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExpandRequest:
    """The arguments; an option that was not given is None. `options`: those that --from-manifest stands for."""

    teacher: str
    student: str | None
    out: Path | None
    options: Mapping[str, Any]
    sizes: Sequence[str]
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
    """What is to be done. `fields`, `preprocess`: for the student's manifest.

    `taken`: what the student takes over from the teacher. `repeats`: the hash of weights that must come out, made with
    `versions`.
    """

    teacher: Artefact
    plan: ExpansionPlan
    seed: int
    out: Path | None
    writes: bool
    fields: dict[str, Any]
    preprocess: dict[str, Any]
    shard_bytes: int
    average: Mapping[str, Tensor] | None
    taken: dict[str, Any] = field(default_factory=dict)
    repeats: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def rounded_to(self) -> str | None:
        """The type of the teacher's weights, in which the student is stored, where it is less than float32."""
        kind = self.teacher.state["text_projection"].dtype
        return str(kind).removeprefix("torch.") if kind.itemsize < 4 else None

    @property
    def notes(self) -> list[str]:
        """What is taken over, and what is left out of the source, in words."""
        said = [f"{key} {str(value).lower()}" for key, value in self.taken.items()]
        notes = [f"Taken over from the teacher: {', '.join(said)}."] if said else []
        left_out = self.teacher.manifest.get("left_out", [])
        if left_out:
            more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
            notes.append(f"Not of the model, left out: {', '.join(left_out[:_LISTED])}{more}.")
        return notes


def prepare(asked: ExpandRequest) -> Prepared:
    """Read what is needed to plan, no weights. Raises ConfigError or ArtefactError."""
    manifest = None
    if asked.from_manifest is not None:
        asked, manifest = _repeating(asked, asked.from_manifest)
    if asked.writes and asked.out is None:
        raise ConfigError("name the folder to write, or add --dry-run, or --verify DATA")
    if asked.student is None and manifest is None:
        raise ConfigError("name the student: a preset, or with --from-manifest FILE the model that was made before")
    config = growth_config(asked.options)
    from compt.dist import collectives as dist
    from compt.expand.plan import ExpansionPlan
    from compt.weights.artefact import check_free
    from compt.weights.open import average_of

    if asked.out is not None and asked.writes:
        check_free(asked.out, Path(asked.teacher))
    # One rank's look at the digests is enough, and a plan needs none.
    careful = (asked.writes or asked.verifies) and dist.is_main()
    if manifest is None:
        teacher = open_source(asked.teacher, asked.teacher_model, asked.teacher_prefix, verify=careful)
        prepared = _new(asked, teacher, config)
    else:
        plan = ExpansionPlan.from_json(manifest["expansion"])
        known = asked.teacher_model or plan.teacher
        teacher = open_source(asked.teacher, known, asked.teacher_prefix, verify=careful)
        prepared = _repeated(asked, teacher, plan, manifest)
    if prepared.plan.needs_average:
        average = average_of(teacher)
        if average is None and asked.writes:
            raise ConfigError(
                f"depth netexpand takes added layers from the moving average of the teacher's weights, and "
                f"{asked.teacher} has none (optimizer.ema in the recipe keeps one); take another depth operator"
            )
        prepared = replace(prepared, average=average)
    return prepared


def _new(asked: ExpandRequest, teacher: Artefact, config: ExpandConfig) -> Prepared:
    from compt.expand.plan import make_plan

    assert asked.student is not None
    spec, taken = student_spec(teacher.spec, asked.student, asked.sizes)
    plan = make_plan(teacher.spec, spec, config)
    seed, shard_size = asked.options["seed"] or 0, asked.options["shard-size"]
    fields: dict[str, Any] = {"parent": Path(asked.teacher).name}
    if asked.writes:  # the hash of some models takes reading them whole
        fields["parent_hash"] = teacher.hash
    fields["expansion"] = plan.to_json()
    fields |= {"seed": seed, "shard_bytes": read_bytes(shard_size)}
    shown: dict[str, Any] = {
        key: teacher.preprocess[key] for key in ("mean", "std", "interpolation") if key in teacher.preprocess
    }
    return Prepared(teacher, plan, seed, asked.out, asked.writes, fields, shown, fields["shard_bytes"], None, taken)


def _repeating(asked: ExpandRequest, path: Path) -> tuple[ExpandRequest, dict[str, Any]]:
    """The arguments without the student, which the manifest names: what stands in its place is OUT."""
    given = [f"--{name}" for name, value in asked.options.items() if value is not None]
    given += ["--set"] if asked.sizes else []
    if given:
        raise ConfigError(f"{given[0]}: --from-manifest says it already; leave one of them out")
    manifest = _manifest(path / MANIFEST if path.is_dir() else path)
    name = str(manifest["spec"].get("name"))
    if asked.student not in (None, name):
        if asked.out is not None or asked.student in PRESETS:
            raise ConfigError(f"STUDENT {asked.student}: {path} was made as {name}; leave STUDENT out")
        asked = replace(asked, out=Path(str(asked.student)))
    return replace(asked, student=name), manifest


def _manifest(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path}: not JSON ({error})") from error
    needed = {"expansion": dict, "seed": int, "parent_hash": str, "hash": str, "spec": dict, "preprocess": dict}
    for key, kind in needed.items():
        if not isinstance(values, dict) or not isinstance(values.get(key), kind):
            raise ArtefactError(f"{path}: not the manifest of an expanded model: no {key} in it")
    return dict(values)


def _repeated(asked: ExpandRequest, teacher: Artefact, plan: ExpansionPlan, manifest: dict[str, Any]) -> Prepared:
    from compt.weights.artefact import MAX_SHARD_BYTES, OWN_FIELDS

    if teacher.hash != manifest["parent_hash"]:
        raise ArtefactError(
            f"{asked.teacher}: is not the model that {asked.from_manifest} was expanded from "
            f"({manifest.get('parent', 'unnamed')}, hash {manifest['parent_hash'][:16]}; this one: {teacher.hash[:16]})"
        )
    fields, made = {key: value for key, value in manifest.items() if key not in OWN_FIELDS}, manifest["hash"]
    if "initial_hash" in manifest:  # a trained model: what it was before
        fields = {key: value for key, value in fields.items() if key in _OF_EXPANSION}
        fields |= {"step": 0, "samples": 0, "epochs": 0.0}
        made = manifest["initial_hash"]
    return Prepared(
        teacher,
        plan,
        manifest["seed"],
        asked.out,
        asked.writes,
        fields,
        {key: manifest["preprocess"][key] for key in ("mean", "std", "interpolation")},
        manifest.get("shard_bytes", MAX_SHARD_BYTES),
        None,
        repeats=made,
        versions=dict(manifest.get("versions", {})),
    )


def growth_config(options: Mapping[str, Any]) -> ExpandConfig:
    """The operators; `options`: width, image-width, …, zero-new-outputs, noise, reference-compatible, None: not given.

    Raises ConfigError naming the option.
    """

    def tower(name: str) -> TowerGrowth:
        values: dict[str, Any] = {}
        for key in ("width", "depth", "zero-new-outputs"):
            for option in (key, f"{name}-{key}"):
                if options[option] is not None:
                    values[key.replace("-", "_")] = options[option]
                    _named(option, lambda: TowerGrowth(**values))
        return TowerGrowth(**values)

    image, text = map(tower, TOWERS)
    config = ExpandConfig(image, text, reference_compatible=bool(options["reference-compatible"]))
    if options["noise"] is None:
        return config
    return _named("noise", lambda: replace(config, noise=options["noise"]))


def _named(option: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"--{option}: {error}") from None


def read_bytes(text: str | None) -> int:
    """`500MB`, `2 GiB` or a number of bytes; None for the default. Raises ConfigError."""
    from compt.weights.artefact import MAX_SHARD_BYTES

    if text is None:
        return MAX_SHARD_BYTES
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]*)", text.strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else 0
    if size < 1:
        raise ConfigError(f"--shard-size {text}: should be a size in bytes, as 500MB or 2GiB")
    return size


def read_sizes(given: Sequence[str]) -> dict[str, Any]:
    """`--set FIELD=VALUE`: a number, true, false, or a list as 2-2-8-2. Raises ConfigError."""
    values: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        if value in ("true", "false"):
            values[key] = value == "true"
        elif re.fullmatch(r"\d+(-\d+)+", value):
            values[key] = tuple(map(int, value.split("-")))
        elif re.fullmatch(r"\d+", value):
            values[key] = int(value)
        else:
            try:
                values[key] = float(value)
            except ValueError:
                raise ConfigError(
                    f"--set {text}: should be FIELD=VALUE with a number, true, false, or a list as in depths=2-2-8-2"
                ) from None
    return values


def student_spec(teacher: ModelSpec, name: str, sizes: Sequence[str]) -> tuple[ModelSpec, dict[str, Any]]:
    """The student called `name` with `sizes`, and what it takes over from the teacher.

    Taken over unless set: what has to agree (activation, widths of heads, ln_pre), and of pictures, windows,
    context and vocabulary what would shrink. Raises ConfigError.
    """
    from compt.weights.infer import model_spec

    base = teacher if name == teacher.name else model_spec(name)
    try:
        values = checked_sizes("swin_t" if base.arch == "swin" else "vit_b16", read_sizes(sizes))
    except ConfigError as error:
        raise error if str(error).startswith("--set") else ConfigError(f"--set {error}") from None
    alike = base.arch == teacher.arch
    taken = {
        key: getattr(teacher, key)
        for key in ("quick_gelu", "text_head_width", *(("head_width", "no_ln_pre") if alike else ()))
        if key not in values and getattr(base, key) != getattr(teacher, key)
    }
    taken |= {
        key: getattr(teacher, key)
        for key in ("context_length", "vocab_size")
        if key not in values and getattr(base, key) < getattr(teacher, key)
    }
    picture = ("image_size", "patch_size")
    if alike and not any(key in values for key in picture) and _patches(base) < _patches(teacher):
        taken |= {key: getattr(teacher, key) for key in picture if getattr(base, key) != getattr(teacher, key)}
    if alike and "window" not in values and base.arch == "swin" and base.window < teacher.window:
        taken["window"] = teacher.window
    return resized(base, {**taken, **values}), taken


def _patches(spec: ModelSpec) -> int:
    return spec.image_size // spec.patch_size
