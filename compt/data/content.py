"""Hashes of what shards hold, so that replaced data are noticed where names, keys and sizes stayed the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from compt.data.remote import Shard, local
from compt.data.scan import COLUMNS, KIND_TABLE
from compt.errors import DataError
from compt.files import read_json, sha256_file, write_json

SAMPLED, MOST_BYTES = 8, 1 << 20
"""Samples of a shard that are hashed, evenly spread over it, and bytes of an image or caption that are."""
HASHES = "hashes.json"


def sampled_hash(shard: Path, rows: NDArray[Any]) -> str:
    """Hex digest of images and stored captions of `SAMPLED` samples. rows: the shard's, each with all `COLUMNS`.

    Headers of the tar, and with them times and owners, do not enter it. Raises OSError.
    """
    sha = hashlib.sha256()
    with shard.open("rb") as file:
        for row in rows[spread(len(rows), SAMPLED)].tolist():
            at = dict(zip(COLUMNS, row, strict=True))
            sha.update(os.pread(file.fileno(), min(at["image_size"], MOST_BYTES), at["image_offset"]))
            if at["text_kind"] < KIND_TABLE:  # the table of captions has a digest of its own
                sha.update(os.pread(file.fileno(), min(at["text_size"], MOST_BYTES), at["text_offset"]))
    return sha.hexdigest()


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, evenly spread, or all of them."""
    return sorted({place * count // wanted for place in range(wanted)}) if count else []


def changed_shards(
    shards: Iterable[Shard], folder: Path, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Shard]:
    """Hash every byte of the shards, and yield those whose hash is not the one of the last time.

    The hashes are kept in `folder`, which exists; the first hash of a shard stays until that file is removed.
    `progress` gets the number of shards done. Raises DataError where a shard or the hashes cannot be read, and RunError
    where the hashes cannot be written.
    """
    path = folder / HASHES
    try:
        known: dict[str, str] = dict(read_json(path)) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}; remove it to hash the shards as they are now") from None
    for done, shard in enumerate(shards, 1):
        try:
            with local(shard) as file:
                found = sha256_file(file)
        except OSError as error:
            raise DataError(f"cannot read shard {shard}: {error.strerror}") from None
        place = str(shard.resolve() if isinstance(shard, Path) else shard)
        if known.setdefault(place, found) != found:
            yield shard
        progress(done)
    write_json(path, known)
