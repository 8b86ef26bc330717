"""`compt export --push-to-hub`: a folder as a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi

from compt import __version__
from compt.errors import ConfigError, RunError


def check_repository(name: str) -> None:
    """Raise ConfigError unless `name` can be that of a repository, with its owner."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is None:
        raise ConfigError(f"--push-to-hub {name}: should be ORG/NAME, of letters, digits, '-', '_' and '.'")


def push(folder: Path, name: str, private: bool) -> str:
    """Upload `folder` as one commit to the model repository `name`; returns the commit's address.

    Makes the repository if it is missing. The endpoint is `HF_ENDPOINT`, the token `HF_TOKEN` or that of
    `hf auth login`. Raises RunError.
    """
    api = HfApi(library_name="compt", library_version=__version__)
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model exported by compt")
    # The hub's client lets through the errors of its HTTP library, which has changed with its versions.
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{folder} is written, but {name} could not be pushed: {cause}") from error
    return str(commit.commit_url)
