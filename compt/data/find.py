"""Which shards a recipe names: paths, patterns, folders, and addresses of object storage."""

from __future__ import annotations

import functools
import glob
import os
import re
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import braceexpand

from compt.data.account import Account
from compt.data.remote import Cache, RemoteShard, Shard
from compt.data.stores import Found, again, objects
from compt.errors import DataError
from compt.recipe.types import checked_address

_PACKED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|Z))$", re.IGNORECASE)


def expand_patterns(
    patterns: str | Sequence[str], base: Path, account: Account | None = None, cache: Cache | None = None
) -> list[Shard]:
    """The shards that globs, brace ranges and folders name, each once. Relative ones start at `base`.

    `account` gets the files of folders; those in object storage are read through `cache`. Raises DataError for a
    pattern that matches nothing and for a missing shard.
    """
    found: dict[Shard, None] = {}
    listed = functools.cache(_listed)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern.startswith("pipe:"):
            raise DataError(f"shards '{pattern}': pipes cannot be read; name the shards as s3://… or https://…")
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError as error:  # unbalanced braces
            raise DataError(f"shards '{pattern}': {error}") from error
        if "://" in pattern:
            found.update(dict.fromkeys(find_shards(pattern, names, cache or Cache.at())))
            continue
        for name in names:
            path, beside = base / Path(name).expanduser() if name[:1] == "~" else base / name, None
            # A folder is listed once: to ask for each of many shards takes minutes on a network disk.
            is_folder, is_file = listed(path.parent).get(path.name) or (path.is_dir(), path.is_file())
            if is_folder:
                matches = _of_folder(path, beside := Account())
                if account is not None:
                    account.add(beside)
            elif is_file:
                matches = [path]
            else:
                matches = _matching(path) if glob.has_magic(name) and not path.exists() else []
            if not matches:
                said = "" if name == pattern else f" (from '{pattern}')"
                kind = "no shard matches" if glob.has_magic(name) or is_folder else "there is no shard"
                there = f" (it has {beside.line(beside.unused)})" if beside and beside.unused else ""
                make = " (make it: compt data emoji)" if path.parts[-4:-2] == ("data", "emoji") else ""
                raise DataError(f"{kind} '{path}'{said}{there}{make}")
            found.update(dict.fromkeys(matches))
    if not found:
        raise DataError("no shards are given")
    return list(found)


def _listed(folder: Path) -> dict[str, tuple[bool, bool]]:
    """For each name in a folder, whether it is a folder and a plain file; nothing where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: (entry.is_dir(), entry.is_file()) for entry in entries}
    except OSError:
        return {}


def _of_folder(folder: Path, account: Account) -> list[Path]:
    """The shards in a folder. Other files are counted."""
    shards, listed = [], _listed(folder)
    for path in sorted(folder.iterdir()):
        is_folder, is_file = listed.get(path.name) or (path.is_dir(), path.is_file())
        if is_folder:
            inside = [] if path.name.startswith(".") else sorted([*path.glob("*.tar"), *path.glob("*/*.tar")])
            if inside:
                account.lose("sub_folder", str(inside[0]), len(inside))
        elif path.suffix.lower() == ".tar" and not path.name.startswith("."):
            if not is_file:
                account.lose("not_file", str(path))
                continue
            shards.append(path)
            account.used["file"] += 1
        else:
            account.lose("packed" if _PACKED.search(path.name) else "no_shard", str(path))
    return shards


def _matching(pattern: Path) -> list[Path]:
    """The paths that match a glob. A folder that exists under a name with brackets is that folder."""
    parts = list(pattern.parts)
    place, listed = Path(parts.pop(0) if pattern.is_absolute() else ""), functools.cache(_listed)
    while (place / parts[0]).exists():
        place /= parts.pop(0)
    found = sorted(place / name for name in glob.glob(str(Path(*parts)), root_dir=place, recursive=True))
    return [path for path in found if not (listed(path.parent).get(path.name) or (path.is_dir(),))[0]]


def find_shards(address: str, names: Sequence[str], cache: Cache) -> list[RemoteShard]:
    """The shards that an address names, whose braces are expanded to `names`: one request each, or a list for a `*`.

    Raises DataError for a shard that is missing, and where nothing matches.
    """
    try:
        checked_address(address)
    except ValueError as error:
        raise DataError(str(error)) from None
    roots, single, found = [_root(name) for name in names], [], []
    for root, key in roots:
        if not key:
            raise DataError(f"shards '{address}': name the shards behind {root}")
        if "*" in key or key.endswith("/"):
            if root.startswith("http"):
                raise DataError(f"shards '{address}': {root} cannot list files; write {{000..123}} instead of *")
            pattern = PurePosixPath(key + "*.tar" if key.endswith("/") else key).parts
            prefix = key.partition("*")[0].rpartition("/")[0]
            ask = functools.partial(objects(root).under, f"{prefix}/" if prefix else "")
            listed = cache.known(f"{root}/{key}", functools.partial(again, ask, f"{root}/{key}"))
            matching = [(root, each) for each in sorted(listed) if _matches(PurePosixPath(each.key).parts, pattern)]
            if not matching:
                raise DataError(f"no shard matches '{root}/{key}'")
            found += matching
        else:
            single.append((root, key))

    def head(root: str, key: str) -> Found:
        place = f"{root}/{key}"
        return cache.known(place, lambda: again(lambda: objects(root).head(key), place))

    with ThreadPoolExecutor(32) as pool:
        found += list(pool.map(lambda at: (at[0], head(*at)), single))
    return [RemoteShard(root, each.key, each.size, each.tag, cache) for root, each in found]


def _root(address: str) -> tuple[str, str]:
    """`s3://bucket` and the key; `hf:/` and the path."""
    if address.startswith("hf://"):
        return "hf:/", address.removeprefix("hf://")
    scheme, _, rest = address.partition("://")
    host, _, key = rest.partition("/")
    return f"{scheme}://{host}", urllib.parse.unquote(key) if scheme.startswith("http") else key


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))
