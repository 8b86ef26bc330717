"""Errors that the command line prints as one message without a traceback, and their exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ComptError(Exception):
    """An error that the user can fix. `str(error)` is the whole message."""

    exit_code = 1
    agreed = False
    """Whether all ranks raise it together. Then only rank 0 prints it."""
    printed = False
    """Whether the watch has printed it already."""

    def printed_by(self, rank: str) -> bool:
        """Whether this rank has to print it."""
        return not self.printed and (rank == "0" or not self.agreed)


class ConfigError(ComptError):
    """A recipe or an option is wrong. Raised before any work starts."""

    exit_code = 2


class DataError(ComptError):
    """Shards, samples or class files cannot be used."""

    exit_code = 3


class ArtefactError(ComptError):
    """A model folder or a checkpoint is missing, torn, or of another model."""

    exit_code = 4


class RunError(ComptError):
    """A run cannot continue: locked folder, changed recipe, full disk, too many non-finite steps."""

    exit_code = 5


class Gone(RunError):
    """A collective failed because another process exited or cannot be reached. Raised on the remaining ranks."""


class Interrupted(ComptError):
    """SIGTERM, SIGUSR1 or Ctrl-C stopped the run. The same command resumes it (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, Python or the allocator means that memory ran out."""
    words = ("out of memory", "can't allocate memory", "alloc_failed")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `choices`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
