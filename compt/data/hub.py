"""Evaluation sets from Hugging Face's hub, in clip_benchmark's layout: each file compared with the hub's own hash."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from compt.errors import DataError
from compt.files import read_json, sha256_file, write_json

RECORD = "fetched.json"
"""File in a set's folder that names its data set, its commit and the hash of each file."""
_WANTED = re.compile(r"[\w.-]+\.txt|(test|train)/[\w.-]+\.(tar|txt)")
"""Files that evaluation reads. Pages about the set are not downloaded."""


class Fetched(NamedTuple):
    """A set's folder after a download. files, bytes: of the whole set. state: what this call did, in words."""

    files: int
    bytes: int
    commit: str
    state: str


class _HubFile(NamedTuple):
    """A file as the hub lists it. hash: SHA-256 of its content, or git's SHA-1 of a small file."""

    name: str
    size: int
    hash: str


def fetch_set(repository: str, folder: Path, revision: str = "main", *, train: bool = False) -> Fetched:
    """Download the test split of a data set of the hub, with its class names and templates.

    `train` adds the training split.

    The first call writes the commit that `revision` names to FOLDER/fetched.json. Later calls stay with that commit,
    and download what is missing or no longer has its size and time. A file that breaks off goes on where it ended.

    Raises DataError for a data set that does not exist or may not be read, without a network, for a folder of another
    data set, and for a file with another hash than the hub's.
    """
    known: dict[str, Any] = _known(folder / RECORD)
    if known and known.get("repository") != repository:
        raise DataError(f"{folder}: holds {known.get('repository')}, not {repository}; name another folder")
    commit, files = _listed(repository, known.get("commit") or revision)
    if known and revision not in ("main", commit, known.get("revision")):
        raise DataError(
            f"{folder}: was downloaded at commit {commit[:12]}, not at {revision}; name another folder"
            f" or remove {RECORD}"
        )
    new = 0
    stored: dict[str, dict[str, Any]] = known.get("files") or {}
    files = [file for file in files if train or not file.name.startswith("train/")]
    record = {"repository": repository, "revision": known.get("revision") or revision, "commit": commit}
    # Before the first file, so that a set of which files are missing is known as such.
    record["wanted"] = sorted({*known.get("wanted", ()), *(file.name for file in files)})
    write_json(folder / RECORD, {**record, "files": stored})
    for file in files:
        path = folder / file.name
        if not _is_unchanged(path, file, stored.get(file.name)):
            _download(repository, commit, file, folder)
            found = _hash(path, file)
            if found != file.hash:
                path.unlink(missing_ok=True)
                raise DataError(
                    f"{path}: has the hash {found}, but the hub says {file.hash} for {repository} at {commit[:12]}; "
                    "the file is removed: run the same command again"
                )
            new += 1
        stored[file.name] = {"size": file.size, "hash": file.hash, "time": path.stat().st_mtime_ns}
        # After every file: a call that is stopped does not read all files again.
        write_json(folder / RECORD, {**record, "files": stored})
    state = f"{new} downloaded" if new else "all there"
    return Fetched(len(files), sum(file.size for file in files), commit, state)


def missing_files(folder: Path) -> list[str]:
    """Files of a set that `compt eval fetch` began to download and has not finished; none for other folders."""
    known = _known(folder / RECORD)
    return [name for name in known.get("wanted", ()) if name not in known.get("files", {})]


def _known(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it to check all files again") from None
    return found if isinstance(found, dict) else {}


def _listed(repository: str, revision: str) -> tuple[str, list[_HubFile]]:
    """The commit that a revision names, and its files that evaluation reads."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        raise _refused(repository, error) from None
    files = [
        _HubFile(item.rfilename, item.size or 0, item.lfs.sha256 if item.lfs else item.blob_id or "")
        for item in info.siblings or ()
        if _WANTED.fullmatch(item.rfilename)
    ]
    if not any(file.name.startswith("test/") and file.name.endswith(".tar") for file in files):
        raise DataError(f"{repository} at {revision}: has no shards test/*.tar, so it is not a set of clip_benchmark")
    return str(info.sha), files


def _is_unchanged(path: Path, file: _HubFile, stored: dict[str, Any] | None) -> bool:
    """Whether a file is as an earlier call has left it. Hashing a suite again would take many minutes."""
    if stored is None or not path.is_file():
        return False
    now = path.stat()
    return stored == {"size": file.size, "hash": file.hash, "time": now.st_mtime_ns} and now.st_size == file.size


def _download(repository: str, commit: str, file: _HubFile, folder: Path) -> None:
    from huggingface_hub import HfApi

    # A file of another size or content would be taken for the right one by its name.
    if (path := folder / file.name).exists() and _hash(path, file) == file.hash:
        return
    try:
        HfApi().hf_hub_download(
            repository, file.name, repo_type="dataset", revision=commit, local_dir=folder, force_download=path.exists()
        )
    except Exception as error:
        raise _refused(f"{repository}: {file.name}", error) from None


def _hash(path: Path, file: _HubFile) -> str:
    """The hash of a file on disk, of the kind that the hub gives for it."""
    if len(file.hash) == 64:
        return sha256_file(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _refused(what: str, error: Exception) -> DataError:
    """The first line of what huggingface_hub says. Its errors share no class with those of its HTTP client."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return DataError(f"{what}: cannot be downloaded from Hugging Face's hub: {lines[0]}")
