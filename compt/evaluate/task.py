"""What an evaluation task is: it opens a set, says what identifies it, scores a model on it, and shows the scores.

To add a task, write an `EvaluationTask` in a module of its own and add its name and place to
`compt.recipe.schema.EVALUATION_TASKS`. Recipes, `compt eval` and reports then know it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from compt.data.account import Account
from compt.data.folder import class_folders_of, read_class_folders
from compt.data.hub import missing_files
from compt.data.index import open_index
from compt.data.loaders import EvalLoader, eval_loader
from compt.data.remote import Cache
from compt.data.samples import EvalSamples, ShardSamples
from compt.dist import collectives as dist
from compt.errors import DataError
from compt.evaluate.encoder import Arrays, Encoder, Tokenize, save_result
from compt.models.preprocess import Preprocess
from compt.recipe.schema import MAX_BAD_SHARE, EvalSet

LONG = ("per_class", "classnames")
"""Parts of a record with an entry for each class, which stay in the file of the result."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate. Relative paths of a set start at `base`."""

    preprocess: Preprocess
    base: Path = Path()
    batch: int = 256
    workers: int = 0
    dtype: torch.dtype = torch.float32
    index_dir: Path | None = None
    columns: Sequence[str] = ()
    max_bad_share: float = MAX_BAD_SHARE
    cache: Cache | None = None


@dataclass(frozen=True)
class SetData:
    """The samples of a set. No image has been read yet.

    places: folders to look in for the set's other files. classes: names of the class folders, None for shards.
    account: everything that its shards or folders hold.
    """

    samples: EvalSamples
    places: tuple[Path, ...]
    classes: tuple[str, ...] | None = None
    account: Account = field(default_factory=Account)

    def batches(self, image_size: int, settings: EvalSettings, classes: int = 0) -> EvalLoader:
        """This rank's share of the samples, as images of `image_size` pixels a side."""
        return eval_loader(
            self.samples,
            image_size=image_size,
            batch=settings.batch,
            rank=dist.rank(),
            world_size=dist.world_size(),
            workers=settings.workers,
            preprocess=settings.preprocess,
            classes=classes,
        )


def open_data(item: EvalSet, settings: EvalSettings, *, label: str | None = None, captions: bool = False) -> SetData:
    """The samples of a set with what the task needs of each: its `label`, its `captions`, or both.

    Shards that are new or changed are indexed first. Raises DataError, also for a set of which `compt eval fetch` has
    not downloaded every file.
    """
    folder = class_folders_of(item.data, settings.base)
    if folder is not None:
        if captions:
            raise DataError(f"evaluation set '{item.name}': class folders {folder} have no captions")
        data = read_class_folders(folder, item.class_order)
        return SetData(data, (folder,), data.classes, data.account)
    if item.class_order is not None:
        raise DataError(f"evaluation set '{item.name}': class_order is for class folders, and {item.data[0]} has none")
    columns = settings.columns if item.caption_columns is None else item.caption_columns
    index = open_index(item.data, settings.base, settings.index_dir, columns=columns, cache=settings.cache)
    for place in index.places:
        if absent := missing_files(place):
            raise DataError(
                f"{place}: {len(absent)} files are not downloaded yet, such as {absent[0]}: "
                "run `compt eval fetch` again"
            )
    if captions and not any(index.counts):
        wanted = f"in the fields {', '.join(columns)} of the .json files" if columns else "in its shards"
        raise DataError(
            f"evaluation set '{item.name}': no image has a caption {wanted}; name the fields in the set's "
            "`caption_columns`"
        )
    return SetData(ShardSamples(index, label, captions), index.places, account=index.account)


@dataclass
class Result(ABC):
    """Scores of one model on one set, with an answer for each sample.

    ids: positions of the samples in the data, int64 [n], ascending. skipped: samples that could not be read, by cause;
    examples: a few of them in words. pins: what identifies the set (`EvaluationTask.pins`). account: that of its
    shards, as JSON values. scored_by: the hash of the weights and the precision, if the caller names them.
    """

    task: ClassVar[str]
    """The name of the task in recipes."""

    name: str
    ids: NDArray[np.int64]
    skipped: dict[str, int] = field(default_factory=dict, kw_only=True)
    examples: list[str] = field(default_factory=list, kw_only=True)
    pins: dict[str, str] = field(default_factory=dict, kw_only=True)
    account: dict[str, Any] = field(default_factory=dict, kw_only=True)
    scored_by: dict[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.ids)

    @property
    def left_out(self) -> str:
        """The samples that could not be used, by cause and on one line; "" without one."""
        return Account(unused=Counter(self.skipped)).line()

    @abstractmethod
    def headline(self) -> dict[str, float]:
        """The numbers for curves and tables, by name."""

    @abstractmethod
    def details(self) -> dict[str, Any]:
        """The headline and everything else that is not an array, as JSON values."""

    @abstractmethod
    def arrays(self) -> Arrays:
        """`ids`, and the answers in their order."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        return {
            "name": self.name,
            "task": self.task,
            "n": self.n,
            **self.details(),
            "skipped": self.skipped,
            "skipped_examples": self.examples,
            "account": self.account,
            "pins": self.pins,
            **({"scored_by": self.scored_by} if self.scored_by else {}),
        }

    def save(self, folder: Path) -> None:
        """Write FOLDER/<name>.json and .npz. Raises RunError."""
        save_result(folder, self.name, self.to_dict(), self.arrays())


class ScoreRow(NamedTuple):
    """One line of a table of scores.

    label: what the line shows, "" where the task has one line only. scores: numbers by their name in the record; None
    where a set does not have that score. about: sizes and levels of the set itself. digits: decimals in a report.
    """

    label: str
    scores: dict[str, float | None]
    about: dict[str, float]
    digits: int = 1


@dataclass(frozen=True)
class EvaluationTask(ABC):
    """A set, opened. A subclass is one way to score models."""

    title: ClassVar[str] = "Further scores"
    """Heading of the task's table in a report."""
    note: ClassVar[str] = ""
    """What the numbers of the table mean."""
    first_note: ClassVar[str] = ""
    """What the first number of a line is: tables over many sets show only that one."""
    classifies: ClassVar[bool] = False
    """Whether each sample gets a class. The record then has top1, top1_interval, classes and chance, the arrays have
    ids, labels, predictions and correct. Only such sets can be compared on, calibrated on, and shown as images."""

    item: EvalSet
    settings: EvalSettings
    data: SetData

    @classmethod
    @abstractmethod
    def open(cls, item: EvalSet, settings: EvalSettings) -> Self:
        """Open the data and everything beside it, but read no image. Any rank may call this alone. Raises DataError."""

    @property
    def splits(self) -> tuple[SetData, ...]:
        """All data that the task reads."""
        return (self.data,)

    def pins(self) -> dict[str, str]:
        """Hashes of what scores depend on beside the model: only scores with equal pins are compared."""
        return {"data": self.data.samples.fingerprint}

    @abstractmethod
    def run(self, encoder: Encoder, tokenize: Tokenize) -> Result:
        """Score a model. All ranks call this and get the same result. Raises DataError on every rank."""

    @classmethod
    def answers(cls, arrays: Arrays) -> list[NDArray[np.float64]]:
        """For each line of `rows`, the score of each image, float64 [n], whose mean is the first number as a share.

        Two models are compared on these, image by image. `arrays` are those of `Result.arrays`. Empty for a task whose
        score is no such mean.
        """
        return []

    @classmethod
    def rows(cls, record: Mapping[str, Any]) -> list[ScoreRow]:
        """The lines that show `record`, which is what `Result.to_dict` wrote, perhaps by an older version."""
        return [ScoreRow("", {key: value for key, value in record.items() if isinstance(value, float)}, {})]
