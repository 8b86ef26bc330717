"""Errors that are shown to a person as one message, without a traceback, and the exit codes that go with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ComptError(Exception):
    """Something that the user can mend. `str()` of it is the whole message."""

    exit_code = 1
    agreed = False
    """Whether a collective has raised it on every rank: then rank 0 alone prints it."""
    printed = False
    """Whether the watch has printed it."""

    def printed_by(self, rank: str) -> bool:
        """Whether the process of this rank has to print it."""
        return not self.printed and (rank == "0" or not self.agreed)


class ConfigError(ComptError):
    """A recipe or an option is wrong. Raised before anything starts."""

    exit_code = 2


class DataError(ComptError):
    """Shards, samples or class files cannot be used."""

    exit_code = 3


class ArtefactError(ComptError):
    """A model folder or a checkpoint is missing, torn, or of another model."""

    exit_code = 4


class RunError(ComptError):
    """A run cannot go on: locked folder, changed recipe, full disk, too many non-finite steps."""

    exit_code = 5


class Gone(RunError):
    """A collective failed because another process has exited or cannot be reached. The ranks that are left raise it."""


class Interrupted(ComptError):
    """SIGTERM or SIGUSR1 arrived; a checkpoint was saved. Starting again continues (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's, Python's or the allocator's way to say that memory ran out."""
    words = ("out of memory", "can't allocate memory", "alloc_failed")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
