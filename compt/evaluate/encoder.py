"""What all evaluations share: the features of a frozen model, reading over ranks, and result files."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from compt.data.batch import EvalBatch
from compt.dist import collectives as dist
from compt.dist.watch.thread import alive
from compt.engines.base import evaluation_mode
from compt.errors import ComptError, DataError
from compt.files import write_bytes, write_json
from compt.models.pixels import to_input
from compt.models.preprocess import Preprocess

Tokenize = Callable[[list[str]], Tensor]
"""Texts to int64 [N, context_length], as open_clip's tokenizers do."""
Arrays = dict[str, NDArray[Any]]

EXAMPLES = 3


@dataclass(frozen=True)
class Encoder:
    """Unit features in fp32 from a CLIP model (ours or open_clip's own), computed in `dtype`."""

    model: nn.Module
    preprocess: Preprocess
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.model.parameters()).device

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that the model takes."""
        size: Any = self.model.visual.image_size  # type: ignore[union-attr]
        return int(size[0] if isinstance(size, tuple | list) else size)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode without gradients. Afterwards the model has its own mode again."""
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with evaluation_mode(self.model), autocast:
            yield

    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> fp32 [B, D] of length one."""
        pixels = to_input(images.to(self.device, non_blocking=True), self.preprocess.mean, self.preprocess.std)
        return functional.normalize(self.model.encode_image(pixels).float(), dim=-1)  # type: ignore[operator]

    def texts(self, tokens: Tensor) -> Tensor:
        """int64 [N, L] -> fp32 [N, D] of length one."""
        return functional.normalize(self.model.encode_text(tokens.to(self.device)).float(), dim=-1)  # type: ignore[operator]


class Losses:
    """Samples that could not be read, counted by cause over all ranks."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: list[str] = []

    def add(self, batch: EvalBatch) -> None:
        """Count what is missing from a batch."""
        self._counts.update(batch.skipped)
        self._examples += batch.bad[: EXAMPLES - len(self._examples)]

    def over_ranks(self) -> tuple[dict[str, int], list[str]]:
        """Counts by cause, and a few samples as examples; the same on every rank."""
        counts: Counter[str] = Counter()
        examples: list[str] = []
        for other, named in dist.gather_objects((dict(self._counts), self._examples)):
            counts.update(other)
            examples += named
        return dict(counts), sorted(examples)[:EXAMPLES]


def over_batches(loader: Iterable[EvalBatch], use: Callable[[EvalBatch], None]) -> Losses:
    """Call `use` for every batch of this rank that has an image. A DataError on one rank is raised on all ranks."""
    losses = Losses()

    def run() -> None:
        for batch in loader:
            alive()
            losses.add(batch)
            if len(batch):
                use(batch)

    # Otherwise the other ranks would wait in their next collective for the rank that failed.
    dist.on_all(run)
    return losses


def by_id(rows: Tensor) -> NDArray[np.int64]:
    """Each rank's rows [n_r, C], with the sample id in column 0 -> all rows [n, C] in ascending order of ids.

    Raises ValueError where an id comes twice: the loaders did not share the samples between the ranks.
    """
    every = dist.gather(rows).cpu().numpy()
    every = every[every[:, 0].argsort(kind="stable")]
    if len(every) > 1 and (every[1:, 0] == every[:-1, 0]).any():
        raise ValueError("an evaluation sample was seen twice")
    return every


def everywhere(
    parts: Sequence[Tensor], owners: Sequence[int], device: torch.device, name: str, examples: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Feature rows of all ranks [n, D] and their owners int64 [n], on `device`, in ascending order of owners.

    `parts` are this rank's rows, `owners` the sample of each. Rows of one owner come from one rank, and keep their
    order.
    Raises DataError, on every rank, for a set without a row; `examples` say why.
    """
    # A rank without a readable image still gathers, with no rows, and needs the width of the others.
    width = int(dist.all_reduce_max(parts[0].shape[1] if parts else 0))
    if not width:
        raise DataError(f"evaluation set '{name}': no sample can be read{': ' + examples[0] if examples else ''}")
    of = dist.gather(torch.tensor(owners, dtype=torch.int64, device=device))
    order = of.argsort(stable=True)
    return dist.gather(torch.cat([torch.zeros(0, width, device=device), *parts]))[order], of[order]


def save_result(folder: Path, name: str, record: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write FOLDER/NAME.npz (plain arrays), then FOLDER/NAME.json, each atomically. Raises RunError.

    Characters of NAME that are unsafe in file names, such as a slash, are written as in a URL.
    """
    name = quote(name, safe=" ()")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(folder / f"{name}.npz", buffer.getbuffer())
    write_json(folder / f"{name}.json", record)


def load_arrays(path: Path) -> Arrays:
    """The arrays of a result's .npz, read without pickle. Raises DataError where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except ComptError:  # a signal
        raise
    except Exception as error:  # numpy raises whatever the bytes of a damaged file lead to
        raise DataError(f"{path}: cannot be read: {error}") from error
