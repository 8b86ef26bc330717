"""The command line: one table of commands. Every command works on files and can run alone."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import multiprocessing
import os
import pwd
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.text import Text

from compt import __version__
from compt.cli import bench, data, recipes, slurm
from compt.cli.chain import chain, compare, demo, report
from compt.cli.curves import curves
from compt.cli.doctor import doctor
from compt.cli.evaluate import evaluate, fetch
from compt.cli.expand.command import HELP as EXPAND_HELP
from compt.cli.expand.command import expand
from compt.cli.export import export
from compt.cli.from_open_clip import from_open_clip
from compt.cli.launch import SIGNALS, launch, recorded
from compt.cli.macs import macs_command
from compt.cli.options import DefaultGroup, PlainCommand, PlainGroup, option
from compt.cli.plan.command import plan
from compt.dist.environment import has_others, own_rank
from compt.errors import ComptError, ConfigError, RunError
from compt.text import VisibleFormatter, terminal, visible

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "plan": plan,
    "chain": chain,
    "report": report,
    "compare": compare,
    "curves": curves,
    "expand": expand,
    "export": export,
    "macs": macs_command,
    "doctor": doctor,
    "launch": launch,
}
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "recipes": (
        "List, show and copy recipes; make one from OpenCLIP's arguments.",
        {
            "list": recipes.list_recipes,
            "show": recipes.show_recipe,
            "copy": recipes.copy,
            "from-open-clip": from_open_clip,
        },
    ),
    "eval": ("Score models on evaluation sets, and download these.", {"score": evaluate, "fetch": fetch}),
    "data": (
        "Build, pack, check and index data sets.",
        {
            "emoji": data.emoji,
            "icons": data.icons,
            "clipart": data.clipart,
            "pack": data.pack,
            "dreamlip": data.dreamlip,
            "check": data.check,
            "index": data.index,
        },
    ),
    "bench": (
        "Measure training speed, and convert it into GPU-hours.",
        {"throughput": bench.throughput, "profile": bench.profile, "gpu-hours": bench.gpu_hours},
    ),
    "slurm": (
        "Run chains on a Slurm cluster.",
        {"submit": slurm.submit, "names": slurm.names, "copy": slurm.copy},
    ),
}
_HELP = {"expand": EXPAND_HELP}
# What follows these is for another program's parser.
_FOREIGN = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_CONTEXTS = {"launch": _FOREIGN, "from-open-clip": _FOREIGN}


def _typer(about: str, commands: Mapping[str, Callable[..., None]], kind: type[PlainGroup] = PlainGroup) -> typer.Typer:
    made = typer.Typer(
        cls=kind,
        help=about,
        no_args_is_help=True,
        # Panels of rich are cut into narrow columns at 80 characters.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        context: dict[str, Any] = {"help_option_names": ["-h", "--help"], **_CONTEXTS.get(name, {})}
        made.command(name, cls=PlainCommand, help=_HELP.get(name), context_settings=context)(command)
    return made


app = _typer("Chain-of-Models Pre-Training: train a family of CLIP models, each from the next smaller one.", COMMANDS)
for _name, (_about, _commands) in GROUPS.items():
    app.add_typer(_typer(_about, _commands, DefaultGroup if _name == "eval" else PlainGroup), name=_name)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, option("print the version and exit", "--version", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"compt {__version__}")
        raise typer.Exit


RANK_0_PRINTS = 3.0
"""Seconds that other ranks wait for rank 0 to print an error on which all agreed."""


def _print_error(error: ComptError, rank: str) -> None:
    agreed = error.agreed and has_others(os.environ)
    if agreed:
        # A launcher stops all ranks when the first of them exits: rank 0 gets time to print, and all keep their exit
        # code. Without this a fast rank 1 would take the message with it.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if error.printed_by(rank):
        name = "compt" if rank == "0" else f"compt, rank {rank}"
        terminal(stderr=True).print(Text.assemble((f"{name}:", "bold red"), " ", visible(str(error))), soft_wrap=True)
    elif agreed:
        time.sleep(RANK_0_PRINTS)


@recorded()
def main(words: Callable[[], list[str]] | None = None) -> None:
    """Entry point: one line for an error that the user can fix, with its own exit code.

    `words` makes the arguments, where they are not those of the command line.
    """
    _prepare_process()
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)  # libraries quote names and texts in their warnings
    try:
        try:
            app(None if words is None else words(), prog_name="compt")
        finally:
            sys.stdout.flush()
    except ComptError as error:
        _print_error(error, own_rank(os.environ))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is None and error.errno not in _OUTPUT_ERRORS:
            raise
        if error.filename is None:
            _end_output(error)
        kind = ConfigError if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) else RunError
        _print_error(kind(f"{error.filename}: {error.strerror}"), own_rank(os.environ))
        sys.exit(kind.exit_code)
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        text = f"compt: user {os.getuid()} has no home folder; set HOME to a folder that can be written"
        print(text, file=sys.stderr)
        sys.exit(ConfigError.exit_code)


_OUTPUT_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EPIPE, errno.EBADF)
"""What a write to standard output raises. Errors of files have become RunErrors, or have a file name."""


def _end_output(error: OSError) -> None:
    """End with one line where standard output cannot be written."""
    with contextlib.suppress(OSError):
        if error.errno != errno.EPIPE:
            print(f"compt: cannot write the output: {error.strerror}", file=sys.stderr)
    # What is left in the buffer cannot be written either, and Python would say so at its end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    sys.exit(RunError.exit_code)


def _prepare_process() -> None:
    """Provide what torch and Python require: open standard streams, and a user who has a name."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode))
    try:
        os.getcwd()
    except FileNotFoundError:  # torch's libraries would end the process
        print("compt: the current folder no longer exists; change to one that does", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", str(os.getuid()))  # torch asks for it when it is imported


def _print_traceback(*error: Any) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(*error))))


def run(words: Callable[[], list[str]] | None = None) -> None:
    """`main` as the whole of a process, which then ends at once where threads may be left.

    A call of torch's that waits in a thread for other processes would abort a Python that winds down under it, and so
    would gloo's own threads: they let go of tensors of Python a moment after a collective is over.
    """
    sys.excepthook = _print_traceback
    try:
        main(words)
    except BaseException as end:
        # A process that joined a group has torch loaded. Parts of DeepSpeed keep the group and its threads for ever.
        if "torch" not in sys.modules and not any(thread.daemon for thread in threading.enumerate()):
            raise
        code = end.code if isinstance(end, SystemExit) else 130 if isinstance(end, KeyboardInterrupt) else 1
        if not isinstance(end, (SystemExit, KeyboardInterrupt)):
            _print_traceback(type(end), end, end.__traceback__)
        for child in multiprocessing.active_children():
            child.terminate()  # multiprocessing would wait for those that are no daemons
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
