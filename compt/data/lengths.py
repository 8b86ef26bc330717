"""What plans assume of the data and what is there: images, captions, and lengths of captions as training pads them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compt.data.index import Index, index_folder
from compt.data.mixture import open_training
from compt.errors import DataError, RunError
from compt.files import read_json, write_json
from compt.plan.forecast import default_gpus
from compt.recipe.schema import Recipe

_DRAWS = 32
"""Batches that are drawn for a mean."""


def _file(index: Index, folder: Path | None) -> Path:
    return index_folder(index.shards[0].parent, folder) / f"lengths-{index.content[:16]}.json"


def store_lengths(index: Index, folder: Path | None, lengths: NDArray[np.int64]) -> None:
    """Store the captions of each length, in tokens, where the index is, or nothing if that cannot be written."""
    found = {int(length): int(lengths[length]) for length in np.flatnonzero(lengths)}
    with contextlib.suppress(RunError, DataError):
        write_json(_file(index, folder), {"columns": [*index.columns], "lengths": found})


def stored_lengths(index: Index, folder: Path | None) -> NDArray[np.int64] | None:
    """What `store_lengths` stored; None without it, or where other columns are read now."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        stored = read_json(_file(index, folder))
        counts = {int(length): int(count) for length, count in stored["lengths"].items()}
        if stored["columns"] == [*index.columns] and counts:
            return np.array([counts.get(length, 0) for length in range(max(counts) + 1)])
    return None


def longest_context(recipe: Recipe) -> int:
    """Tokens of a caption that the member with the longest context takes; towers cut longer captions."""
    return max(spec.context_length for spec in recipe.family.specs().values())


def computed_tokens(lengths: NDArray[np.int64], recipe: Recipe) -> float:
    """Tokens that the text tower computes for a caption, padding included: a mean over batches drawn from `lengths`.

    lengths: captions of each number of tokens. A micro-batch is that of `engine`, or the share of one GPU of a node.
    """
    engine, batch = recipe.engine, recipe.optimizer.batch
    share = batch if engine.device == "cpu" else batch // default_gpus(batch)
    count = min(engine.micro_batch or share, share) * recipe.data.captions
    most = longest_context(recipe)
    ends = np.cumsum(np.append(lengths[:most], lengths[most:].sum()))
    random, total = np.random.Generator(np.random.Philox(0)), 0
    group = -(-count // (engine.buckets or count))  # packed, each caption is as long as itself
    for _ in range(_DRAWS):
        drawn = np.sort(ends.searchsorted(random.integers(ends[-1], size=count), side="right"))
        total += sum(int(part[-1]) * len(part) for part in np.split(drawn, range(group, count, group)))
    return round(total / (_DRAWS * count), 1)


def as_found(recipe: Recipe, images: int, lengths: NDArray[np.int64] | None, pool: float | None = None) -> Recipe:
    """The recipe with the number of images of an epoch, and with the tokens that captions of these lengths take.

    `pool`: captions that an image has, on average, which plans need where the teacher's captions are cached.
    """
    changes: dict[str, object] = {"images": images}
    cached = any(recipe.engine_of(link.model).teacher_cache for link in recipe.chain.links)
    if cached and pool is not None and recipe.data.caption_pool is None:
        changes["caption_pool"] = round(pool, 2)
    found = recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})
    return found if lengths is None else found.with_tokens(computed_tokens(lengths, recipe))


def with_data(recipe: Recipe, base: Path) -> tuple[Recipe, str]:
    """The recipe with the numbers of its data, where these are indexed on this machine, and a sentence on that.

    Nothing is scanned or asked of a store. `data.caption_tokens` stays: runs measure it.
    """
    data, folder = recipe.data, base / recipe.data.index_dir if recipe.data.index_dir else None
    places = [one if isinstance(one, str) else " ".join(one.shards) for one in data.train]
    try:
        if data.tables or "://" in "".join(places):
            raise DataError("would have to be read")
        index = open_training(data, base, folder, scan=False)
    except DataError:
        return recipe, "The shards are not indexed here: the number of images and the tokens are the recipe's."
    lengths = None if data.caption_tokens else stored_lengths(index, folder)
    other = "" if index.images == data.images else f"; data.images is {data.images:,}"
    few = sum(images for number, images in index.counts.items() if 0 < number < data.captions)
    notes = [
        f"The number of images is that of the indexed shards{other}.",
        f"{few:,} of {len(index):,} images have fewer captions than are drawn." if few else "",
        "The tokens follow from the lengths that compt data check found." if lengths is not None else "",
    ]
    captions = sum(number * images for number, images in index.counts.items())
    return as_found(recipe, index.images, lengths, captions / len(index)), " ".join(filter(None, notes))
