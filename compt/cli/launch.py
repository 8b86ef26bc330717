"""Launchers around `compt chain`: their options, exit codes and signals.

torchrun, deepspeed and accelerate end with exit codes of their own, kill a run 30 seconds after asking it to stop, and
die of SIGUSR1. `compt launch` runs a launcher, passes signals to the ranks, and ends with their exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compt.dist.environment import own_rank
from compt.errors import ConfigError, Interrupted
from compt.files import read_text

FOLDER = "COMPT_LAUNCH"
"""Environment variable with the folder in which each rank under `compt launch` leaves its record."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
POLL = 0.1

# --- the options of launchers/train.py

HELP = """launchers/train.py runs `compt chain`, whose options are below, in each process of a launcher. It also takes:

  --recipe FILE           the recipe, in place of the argument RECIPE
  --deepspeed_config FILE DeepSpeed's settings, which also name the engine (zero0 to zero3)
  --local_rank N          what old launchers pass on
"""


def chain_words(words: Sequence[str], environment: dict[str, str] | os._Environ[str]) -> list[str]:
    """Translate the arguments of launchers/train.py into those of `compt`, starting with `chain`.

    `--recipe R` becomes the argument R.
    `--local_rank N`, from deepspeed and old launchers, becomes LOCAL_RANK in `environment` unless it is set.
    `--deepspeed_config F` sets engine.deepspeed_config, and engine.name by the stage in the file unless `--set` does;
    `--deepspeed` beside it changes nothing. Raises ConfigError.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for names in (("--recipe",), ("--local_rank", "--local-rank"), ("--deepspeed_config",)):
        parser.add_argument(*names)
    parser.add_argument("--deepspeed", action="store_true")
    try:
        known, kept = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from None
    if known.recipe is not None:
        kept.insert(0, known.recipe)
    if known.local_rank is not None:
        environment.setdefault("LOCAL_RANK", known.local_rank)
    if known.deepspeed_config is not None:
        kept += ["--set", f"engine.deepspeed_config={json.dumps(known.deepspeed_config)}"]
        if not _sets_engine(kept):
            kept += ["--set", f"engine.name=zero{zero_stage(Path(known.deepspeed_config))}"]
    elif known.deepspeed:
        raise ConfigError("--deepspeed needs --deepspeed_config FILE, or --set engine.name=zero2")
    if {"-h", "--help"} & {*kept}:
        print(HELP)
    return ["chain", *kept]


def _sets_engine(words: Sequence[str]) -> bool:
    values = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    values += [after for word, after in itertools.pairwise(words) if word == "--set"]
    return any(value.startswith(("engine.name=", "engine=")) for value in values)


def zero_stage(path: Path) -> int:
    """Return the ZeRO stage in a JSON file of DeepSpeed. Raises ConfigError."""
    try:
        values = json.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed_config {path}: is not JSON ({error})") from None
    section = values.get("zero_optimization", {}) if isinstance(values, dict) else None
    stage = section.get("stage") if isinstance(section, dict) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"--deepspeed_config {path}: zero_optimization.stage should be 0, 1, 2 or 3, not {stage!r}")
    return int(stage)


# --- in each rank


@dataclass(frozen=True)
class LaunchRecord:
    """A rank's record: `code` is its exit code, None while it runs; `agreed`: all ranks ended with the same error."""

    pid: int
    rank: int
    code: int | None = None
    agreed: bool = False

    def write(self, folder: Path) -> None:
        """Replace the record. There is no such folder if `compt launch` runs on another machine."""
        with contextlib.suppress(OSError):
            new = folder / f"{self.pid}.new"
            new.write_text(json.dumps(self.__dict__), encoding="utf-8")
            new.rename(folder / f"{self.pid}.json")


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Leave a record for `compt launch`, if this process runs under it, and restore the handling of signals."""
    folder, rank = os.environ.get(FOLDER), own_rank(os.environ)
    if folder is None or not rank.isdecimal():
        yield
        return
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    begun = LaunchRecord(os.getpid(), int(rank))
    begun.write(Path(folder))
    try:
        yield
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        agreed = bool(getattr(error.__context__, "agreed", False))
        LaunchRecord(begun.pid, begun.rank, code, agreed).write(Path(folder))
        raise


# --- in `compt launch`


def exit_code(launcher: int, signalled: bool, records: Sequence[LaunchRecord]) -> int:
    """Return the code to end with: 75 only for a run that continues when it is started again.

    `launcher` is the return code of the launcher, negative for a signal; `signalled`: `compt launch` got a signal. When
    one rank fails, the launcher signals the others: they end with 75 too, but this was not agreed by all.
    """
    if launcher == 0:
        return 0
    own = 128 - launcher if launcher < 0 else launcher
    failed = [record for record in records if record.code not in (None, 0, Interrupted.exit_code)]
    if signalled:
        failed = [record for record in failed if record.agreed]
    if failed:
        code = min(failed, key=lambda record: record.rank).code
        assert code is not None
        return code
    if signalled or (records and all(record.code == Interrupted.exit_code and record.agreed for record in records)):
        return Interrupted.exit_code
    return own if own != Interrupted.exit_code or not records else 1


def _before_launcher() -> None:
    """In the launcher's process: leave stopping to the ranks, and hear SIGHUP, which `nohup` would have it ignore."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _started(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            # By default torchrun, and accelerate with it, would end a run 30 seconds after a signal.
            env={**os.environ, FOLDER: str(folder), "PET_SIGNALS_TO_HANDLE": "SIGHUP"},
            process_group=0,
            preexec_fn=_before_launcher,  # noqa: PLW1509  (this process has one thread)
        )
    except OSError as error:
        raise ConfigError(f"compt launch: '{command[0]}' cannot be started ({error.strerror})") from None


def _records(folder: Path) -> list[LaunchRecord]:
    """Read the records, also those of a rank that was started again."""
    return [LaunchRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]


def run_launcher(command: Sequence[str], folder: Path) -> int:
    """Start the launcher, wait for its end and return the exit code. Raises ConfigError."""
    wanted: list[int] = []
    sent: dict[int, int] = {}
    with _handled(lambda number, _: wanted.append(number)):
        child = _started(command, folder)
        while (code := child.poll()) is None:
            if wanted:
                _deliver(wanted, sent, child.pid, folder)
            time.sleep(POLL)
        found = _records(folder)
        for record in found:
            if record.code is None:
                _send(record.pid, signal.SIGKILL)
        return exit_code(code, bool(wanted), found)


def _deliver(wanted: Sequence[int], sent: dict[int, int], launcher: int, folder: Path) -> None:
    """Send the signals in `wanted` to all ranks, also to those that started later. `sent`: how many a rank has had."""
    running = [record.pid for record in _records(folder) if record.code is None]
    if not running and not sent:
        # No rank has started, so there is nothing to save.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher, signal.SIGHUP)
    for pid in running:
        for number in wanted[sent.get(pid, 0) :]:
            _send(pid, number)
        sent[pid] = len(wanted)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND", help="torchrun, deepspeed or accelerate, with options", show_default=False),
    ],
) -> None:
    """Run a launcher, and exit with the exit code of its ranks.

    \b
    compt launch torchrun --nproc_per_node 8 -m compt \\
        chain cc3m_vit --run-folder runs/cc3m

    Passes SIGTERM, SIGUSR1 and Ctrl-C on to the ranks, gives them time to save, and exits with code 75.
    """  # noqa: D301 - help keeps the lines after the character \b
    with tempfile.TemporaryDirectory(prefix="compt-launch-") as folder:
        sys.exit(run_launcher(command, Path(folder)))
