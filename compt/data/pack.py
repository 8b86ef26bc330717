"""Pack images and captions into WebDataset shards: folders of images, class folders, tables, or other shards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby, islice, starmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compt.data.account import Account
from compt.data.captions import CAPTION_COLUMNS, has_generated, parse_json, read_columns, read_text, split_as_dreamlip
from compt.data.content import spread
from compt.data.decode import Unusable, open_image, shrunk
from compt.data.names import is_hidden, is_metadata
from compt.data.remote import Cache, local
from compt.data.sources import WORK, Members, PackOptions, Source, open_source
from compt.errors import ConfigError, DataError
from compt.files import disk_errors, new_file, read_json, write_json, write_text

STATE = "pack.json"
"""The record of a packed folder."""
LOOKED_AT = 1000
"""Samples of a source in which captions of DreamLIP are sought, evenly spread over it."""
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg"}
Progress = Callable[[int, int], None]
"""Samples done, samples in all."""
_Written = tuple[list[tuple[str, bytes]], list[str], int]
"""Endings and files to write, the causes of what is left out, and the number of captions."""
_Prepared = tuple[str, _Written | Unusable]


def _members(sample: Members, captioned: bool, options: PackOptions) -> _Written:
    """What is written of a sample. What no option changes is copied byte by byte. Raises Unusable."""
    image, data = open_image(sample.image), sample.image
    ending = _EXTENSIONS.get(image.format or "", (image.format or "jpg").lower())
    if options.resize is not None and (data := shrunk(image, data, options.resize)) is not sample.image:
        ending = "jpg"
    values, stored, txt, lost = parse_json(sample.json), sample.json, sample.txt, []
    if sample.json and values is None:
        lost, stored = ["json"], b""
    changed = dict(values or {})
    if sample.row is not None or (options.columns and read_columns(changed, options.columns)[0].texts):
        row = {"captions": read_columns(changed, options.columns)[0].texts} if sample.row is None else sample.row
        if options.columns and sample.row is not None:  # names that are not known would have to be named again
            row = {"captions": [text for texts in row.values() for text in texts]}
        known = {*CAPTION_COLUMNS, *options.columns}
        changed = {name: value for name, value in changed.items() if name not in known} | row
        lost, txt = [*lost, *(["second_text"] if txt else [])], b""
    elif options.keep == "sentences":
        changed = split_as_dreamlip(changed)
    if changed != (values or {}):
        stored = json.dumps(changed).encode()
    found, first = read_columns(changed)
    if txt and not first and (own := read_text(txt)).texts:
        found = own
    if captioned and not found.texts:
        raise Unusable("caption", "it has no usable caption")
    label = sample.cls.strip()
    if label and not label.isdigit():
        lost, label = [*lost, "cls"], b""
    files = [(ending, data), ("json", stored), ("txt", txt), ("cls", label)]
    return [(name, data) for name, data in files if data], [*lost, *found.lost], len(found.texts)


def _key(name: str, taken: set[str]) -> str:
    """A key of a tar for the name: without dots, since a key ends at the first, and in no sample before.

    It leads out of no folder into which the tar is unpacked, as names in shards of others may, and readers see it.
    """
    name = "/".join(part for part in name.replace("\0", "_").split("/") if part not in ("", ".", ".."))
    plain = (name.lstrip("_") if is_metadata(name) else name).replace(".", "_")
    if is_hidden(f"{plain}.x"):
        plain = "sample_" + plain.strip("/").replace("/", "_")
    key = plain
    number = 1
    while key in taken:
        number += 1
        key = f"{plain}_{number}"
    taken.add(key)
    return key


@dataclass
class PackReport:
    """What was packed. account: everything that was read of the source."""

    shards: int
    samples: int
    account: Account = field(default_factory=Account)


def pack(
    source: str,
    out: Path,
    base: Path,
    options: PackOptions,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> PackReport:
    """Write the samples of `source` to shards in `out`, or finish an interrupted packing of the same.

    Each shard has the samples of its part of the order, so a resumed packing writes the same bytes, and so does any
    number of `workers` (see `_prepared`). Raises ConfigError where `out` was packed with other options, DataError where
    the source cannot be used or has changed, and RunError where `out` cannot be written.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    state = _begun(out, options)
    samples = open_source(source, out, base, options, cache)
    if options.keep == "sentences" and not state["read"]:
        _check_generated(source, samples)
    if state.setdefault("source", samples.fingerprint) != samples.fingerprint:
        raise DataError(f"{out}: the source, {source}, is not what it was when packing began; name another folder")
    if not state["read"]:  # before all other files, so that a packing that is killed at any moment can be finished
        write_json(out / STATE, state)
    for name, text in samples.beside.items():
        write_text(out / name, text)
    account = _write_shards(out, samples, options, state, workers, progress)
    shutil.rmtree(out / WORK, ignore_errors=True)
    total = Account()
    total.add(samples.account)
    total.add(account)
    return PackReport(-(-len(samples) // options.shard_size), state["samples"], total)


def _check_generated(source: str, samples: Source) -> None:
    """Raise DataError where no sample that is looked at, or no row of the table, has a caption that DreamLIP made."""
    names, looked = set[str](), 0
    for at in spread(len(samples), LOOKED_AT):
        with contextlib.suppress(Unusable):
            found = samples.read(at)
            fields = parse_json(found.json) or {} if found.row is None else found.row
            if has_generated(fields):
                return
            names, looked = names.union(fields), looked + 1
    if looked:
        raise DataError(
            f"{source}: none of the {looked} samples that were looked at has a caption of DreamLIP's, such as "
            f"shortIB_captions; their fields are: {', '.join(sorted(names)) or 'none'}. Name DreamLIP's table with "
            "--captions-csv, or use `compt data pack`"
        )


def _begun(out: Path, options: PackOptions) -> dict[str, Any]:
    """The state of a packing: that of `out`, or a new one. Raises ConfigError for other options or other files."""
    settings = {
        "shard_size": options.shard_size,
        "seed": options.seed,
        "columns": [*options.columns],
        "captions": options.keep,
        "resize": options.resize,
    }
    new = {"settings": settings, "read": 0, "samples": 0, "account": Account().to_json()}
    try:
        state = read_json(out / STATE)
        old = state["settings"]
        state = {name: state[name] for name in (*new, "source")}
    except FileNotFoundError:
        # Hidden ones are WORK and the temporary files of a packing that was killed.
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others:
            raise ConfigError(f"{out} holds other files, such as {others[0]}; name a new folder") from None
        return new
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / STATE} is damaged ({error}); remove {out}, or name another folder") from None
    for name, value in settings.items():
        if old.get(name) != value:
            raise ConfigError(f"{out} was packed with {name} {old.get(name)}, not {value}; name another folder")
    return state


def _write_shards(
    out: Path,
    samples: Source,
    options: PackOptions,
    state: dict[str, Any],
    workers: int | None,
    progress: Progress | None,
) -> Account:
    """Write the shards that are missing, and the state after each. Returns the account of all shards."""
    count, account = len(samples), Account.from_json(state["account"])
    order = np.arange(count)
    if options.seed is not None:
        order = np.argsort(np.random.Philox(key=options.seed).random_raw(count), kind="stable")
    if workers is None:  # to copy images takes little of the processor
        workers = 1 if options.resize is None else min(os.cpu_count() or 1, 8)
    # The account is stored with each shard: a resumed packing does not read the finished ones again.
    with contextlib.closing(_prepared(samples, order[state["read"] :], options, workers)) as prepared:
        for first in range(state["read"], count, options.shard_size):
            part = islice(prepared, options.shard_size)
            path = out / f"{first // options.shard_size:06d}.tar"
            state["samples"] += _write_shard(path, part, samples.counted, account)
            state |= {"read": min(first + options.shard_size, count), "account": account.to_json()}
            write_json(out / STATE, state)
            if progress:
                progress(state["read"], count)
    return account


def _write_shard(path: Path, part: Iterable[_Prepared], counted: bool, account: Account) -> int:
    """Write one shard and return its number of samples. The same samples give the same bytes.

    counted: whether the account of the source has the captions.
    """
    written, taken = 0, set[str]()
    with new_file(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, found in part:
            if isinstance(found, Unusable):
                account.lose(found.cause, f"{name}: {found}")
                continue
            files, lost, captions = found
            for cause in [] if counted else lost:
                account.lose(cause, name)
            key = _key(name, taken)
            for ending, data in files:
                header = tarfile.TarInfo(f"{key}.{ending}")  # without times and owners
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
            written += 1
            labels = int(files[-1][0] == "cls")
            counts = {"sample": 1, "label": labels, "caption": 0 if counted else captions}
            account.used += Counter(counts)  # without zeros
    return written


def _prepared(
    samples: Source, order: NDArray[np.int64], options: PackOptions, workers: int
) -> Generator[_Prepared, None, None]:
    """The samples in their order, each with its name, as they are written or with the reason why they are not.

    One thread reads. `workers` of them prepare the next samples: Pillow decodes, resizes and encodes without Python's
    lock, so that threads use as many cores as processes would, and none is left when this process is killed.
    """

    def prepare(name: str, found: Members | Unusable) -> _Prepared:
        try:
            return name, found if isinstance(found, Unusable) else _members(found, samples.captioned, options)
        except Unusable as error:
            return name, error

    if workers < 2:
        yield from starmap(prepare, _read(samples, order))
        return
    waiting = deque[Future[_Prepared]]()
    with ThreadPoolExecutor(workers, "pack") as pool:
        for name, found in _read(samples, order):
            waiting.append(pool.submit(prepare, name, found))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(samples: Source, order: NDArray[np.int64]) -> Iterator[tuple[str, Members | Unusable]]:
    """The name and files of each sample, while its shard, if it is in a store, stays in the cache."""
    for shard, part in groupby(map(int, order), samples.shard):
        with nullcontext() if shard is None else local(shard):
            for at in part:
                found: Members | Unusable
                try:
                    found = samples.read(at)
                except Unusable as error:
                    found = error
                yield samples.name(at), found
