"""`compt export --push-to-hub`: a folder as a repository on the Hugging Face Hub."""

from __future__ import annotations

import glob
import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from compt import __version__
from compt.errors import ConfigError, RunError
from compt.files import read_json
from compt.weights.artefact import EXPORT_RECORD


def check_repository(name: str) -> None:
    """Raise ConfigError unless `name` can be that of a repository, with its owner."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is None:
        raise ConfigError(f"--push-to-hub {name}: should be ORG/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload `folder` as one commit to the model repository `name`; returns the commit's address.

    Makes the repository if it is missing. The endpoint is `HF_ENDPOINT`, the token `HF_TOKEN` or that of
    `hf auth login`. Files of an older export there that `folder` does not have are deleted in the same commit: a
    program could load that model in place of the new one. Raises RunError.
    """
    api = HfApi(library_name="compt", library_version=__version__)
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a model exported by compt",
            delete_patterns=[glob.escape(old) for old in _exported(api, name)] or None,
        )
    # The hub's client lets through the errors of its HTTP library, which has changed with its versions.
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{folder} is written, but {name} could not be pushed: {cause}") from error
    return str(commit.commit_url)


def _exported(api: HfApi, name: str) -> list[str]:
    """The files of the export that the repository holds; [] where it holds none."""
    if not api.file_exists(name, EXPORT_RECORD):
        return []
    with tempfile.TemporaryDirectory() as folder:
        record = read_json(Path(api.hf_hub_download(name, EXPORT_RECORD, local_dir=folder)))
    return [*map(str, record["files"]), EXPORT_RECORD]
