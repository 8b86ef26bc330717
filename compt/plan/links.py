"""Links of a chain: which model may grow from which, what that needs, and the model that the first link grows from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compt.cost.counts import parameters
from compt.errors import ArtefactError, ConfigError, nearest
from compt.files import read_json
from compt.models.growth import TOWERS, ExpandConfig, Tower, check_sizes, disagreeing, inexact
from compt.models.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from compt.models.preprocess import Preprocess
from compt.models.presets import PRESETS, VOCAB_SIZE, ModelSpec
from compt.recipe.chain import ChainConfig


def check_growth(teacher: ModelSpec, student: ModelSpec, *, strictly: bool = True) -> None:
    """Raise ConfigError where `student` cannot grow from `teacher`: `check_sizes`, and it must have more parameters.

    Without `strictly`, as many parameters are enough.
    """
    before, after = parameters(teacher), parameters(student)
    if after < before or (strictly and after == before):
        raise ConfigError(
            f"its {after:,} parameters are not more than the {before:,} of '{teacher.name}', which it grows from; "
            "a chain goes from small to large"
        )
    check_sizes(teacher, student)


def check_start(start: ModelSpec, student: ModelSpec) -> None:
    """`check_growth` for a model at `chain.from`. Where sizes must agree, the error says what to write."""
    wanted = {name: getattr(start, name) for name in disagreeing(start, student)}
    if wanted:
        found = ", ".join(f"{name} is {_yaml(getattr(student, name))}" for name in wanted)
        write = ", ".join(f"{name}: {_yaml(value)}" for name, value in wanted.items())
        raise ConfigError(
            f"its {found}, but '{start.name}' at chain.from differs; to make all members agree, write "
            f"family.common: {{{write}}}"
        )
    check_growth(start, student, strictly=False)


def check_vocabulary(start: ModelSpec) -> None:
    """Raise ConfigError for a model at `chain.from` that does not know all tokens."""
    if start.vocab_size < VOCAB_SIZE:
        raise ConfigError(
            f"'{start.name}' at chain.from has a vocabulary of {start.vocab_size} tokens, but CLIP's tokenizer has "
            f"{VOCAB_SIZE}"
        )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def averaging(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> list[Tower]:
    """The towers that take layers from the moving average of the teacher's weights."""
    if config.reference_compatible:
        return []
    image = teacher.arch == student.arch and (teacher.depth, teacher.depths) != (student.depth, student.depths)
    grows: dict[Tower, bool] = {"image": image, "text": teacher.text_depth != student.text_depth}
    return [tower for tower in TOWERS if grows[tower] and DEPTH_OPERATORS[config.tower(tower).depth].average]


def broken_promises(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> dict[Tower, tuple[str, ...]]:
    """For each tower whose width operator keeps the function in general, but not for this pair, the reasons."""
    found = inexact(teacher, student, config)
    return {
        tower: found[tower] for tower in TOWERS if WIDTH_OPERATORS[config.tower(tower).width].exact and found[tower]
    }


MODEL_FORMAT = ("compt-model", 1)
"""Format and version in the manifest of a model folder."""
MANIFEST = "manifest.json"
AVERAGE = "ema"
"""The folder in it with the moving average of the weights, and its name in the manifest."""
UNREAD = "unread"
"""The hash of weights that were not read."""


@dataclass(frozen=True)
class Start:
    """A model that the first link grows from: its sizes and the hash of its weights.

    `preprocess`: how it expects its images, if known. `averaged`: whether it has a moving average of
    its weights; None if unknown.
    """

    spec: ModelSpec
    hash: str
    preprocess: Preprocess | None = None
    averaged: bool | None = False


def is_described(chain: ChainConfig, base: Path) -> bool:
    """Whether the sizes of the model at `chain.from` are known without torch: compt wrote it, or a preset names it."""
    assert chain.from_ is not None
    return (base / chain.from_ / MANIFEST).exists() or chain.from_model in PRESETS


def planned_start(chain: ChainConfig, base: Path) -> Start:
    """The model at `chain.from`, without loading torch. Weights that compt did not write are not read.

    Raises ConfigError if its sizes are unknown.
    """
    assert chain.from_ is not None
    if chain.from_model is None or (base / chain.from_ / MANIFEST).exists():
        return read_start(base / chain.from_)
    if chain.from_model not in PRESETS:
        raise ConfigError(
            f"chain.from_model = '{chain.from_model}': is not a preset{nearest(chain.from_model, PRESETS)}, "
            "and a model of open_clip can only be read with torch"
        )
    return Start(PRESETS[chain.from_model], UNREAD, averaged=None)


def read_start(folder: Path) -> Start:
    """Read the manifest of a model folder that compt wrote. Raises ConfigError."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if (manifest["format"], manifest["format_version"]) != MODEL_FORMAT:
            raise ValueError("its format or version is not the one that this compt reads")
        spec = ModelSpec.from_dict(manifest["spec"])
        preprocess = Preprocess.of(dict(manifest["preprocess"]), "preprocess")
        averaged = AVERAGE in manifest.get("extra", {})
        return Start(spec, str(manifest["hash"]), preprocess, averaged)
    except KeyError as error:
        cause = f"{error.args[0]} is missing; a run's model folders are RUN/jobs/NAME/model"
    except (OSError, ValueError, TypeError, ArtefactError, ConfigError) as error:
        cause = getattr(error, "strerror", None) or str(error)
    other = "" if path.exists() else "; for a model that compt did not write, name it in chain.from_model"
    raise ConfigError(f"chain.from = '{folder}': cannot read {path} ({cause}){other}")
