"""Output is shown as it is: no part of it becomes an emoji or markup."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compt.cli.main import _prepare_process, main
from compt.errors import RunError
from compt.models.clip import build
from compt.models.presets import PRESETS
from compt.text import TextTable, terminal
from compt.train.metrics import MetricsWriter
from compt.weights.artefact import write_artefact
from tests.helpers.curves import NANO, link, write_run
from tests.helpers.recipe import write_recipe
from tests.helpers.states import export_state

PLAIN = "a:x:b [bold]c[/]"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compt", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["plan", PLAIN], PLAIN),
        (["chain", PLAIN], PLAIN),
        (["macs", "vit_nano", "--tokens", "5:x:b"], "5:x:b"),
        (["plan", "RECIPE", "--set", "a:x:b=1"], "a:x:b"),
        (["curves", PLAIN], PLAIN),
        (["report", PLAIN], PLAIN),
        (["macs", "a:x:b"], "a:x:b"),
        (["export", PLAIN, "RECIPE"], PLAIN),
        (["expand", PLAIN, "vit_nano", "--dry-run"], PLAIN),
        (["expand", "RECIPE", "vit_nano", PLAIN, "--both", f"width={PLAIN}"], PLAIN),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_errors(
    words: list[str], shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "tiny.yaml"))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(recipe if word == "RECIPE" else word for word in words)) != 0
    assert shown in capsys.readouterr().err


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    for width in (60, 300):
        console = terminal()
        console.width = width
        console.print(TextTable(f"1 {PLAIN}", (f"2 {PLAIN}", f"3 {PLAIN}"), [(f"4 {PLAIN}", f"5 {PLAIN}")]))
        output = " ".join(capsys.readouterr().out.split())
        assert all(f"{number} {PLAIN}" in output for number in range(1, 6)), output


def test_where_results_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a:x:b [bold]c"
    folder = write_run(tmp_path / "a:x:b", [NANO, link(5, 20.0)])
    assert run(monkeypatch, "curves", folder, "--out", out) == 0
    assert f"Wrote {out}" in capsys.readouterr().out
    assert json.loads((out / "curves.json").read_text())


def test_where_a_model_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a:x:b [bold]c"
    write_artefact(tmp_path / "a:x:b", export_state(build(PRESETS["vit_pico"], seed=0)), PRESETS["vit_pico"], {})
    assert run(monkeypatch, "expand", tmp_path / "a:x:b", "vit_pico", out) == 0
    assert f"Wrote {out}" in capsys.readouterr().out
    assert (out / "manifest.json").exists()


def test_lines_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, total_steps=2, batch=1, title=PLAIN) as writer:
        writer.log(1, {"loss": 1.0})
        writer.log_evaluation(1, {"a:x:b/top1": 50.0})
    output = capsys.readouterr().err
    assert PLAIN in output
    assert "a:x:b/top1" in output


def test_there_is_one_console(root: Path) -> None:
    makers = [path for path in root.glob("compt/**/*.py") if f"{Console.__name__}(" in path.read_text(encoding="utf-8")]
    assert [str(path.relative_to(root)) for path in makers] == ["compt/text.py"]


@pytest.mark.parametrize(("threads", "torch"), [(0, False), (1, False), (0, True)])
def test_a_process_whose_threads_may_still_wait_ends_without_winding_down(
    threads: int, torch: bool, tmp_path: Path
) -> None:
    """If a thread waits within torch's C++, shutting down Python would abort the process."""
    script = (
        "import atexit, sys, threading\n"
        "from compt.cli.main import run\n"
        "class Late:\n"
        "    def __del__(self): print('wound down')\n"
        "kept = Late()\n"
        "atexit.register(print, 'atexit')\n"
        f"sys.modules.update({{'torch': None}} if {torch} else {{}})\n"
        f"for _ in range({threads}): threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "sys.argv = ['compt', 'plan', 'nowhere.yaml']\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert done.stdout.split("\n")[:-1] == (["atexit"] if threads or torch else ["atexit", "wound down"])


def test_a_fault_of_the_program_is_shown_and_ends_the_process_too(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from compt.cli import main as cli\n"
        "def app(*_, **__): raise KeyError('no such thing')\n"
        "cli.app, sys.modules['torch'] = app, None\n"
        "cli.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'no such thing'\n")
    assert done.stderr.count("Traceback") == 1


def test_an_agreed_error_of_a_single_process_leaves_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With signals ignored, neither a process nor a caller of `main` could end its children."""

    def fail(*_: object, **__: object) -> None:
        error = RunError("no such run")
        error.agreed = True
        raise error

    monkeypatch.setattr("compt.cli.main.app", fail)
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit):
        main()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# --- standard output that cannot be written, and a user without a name


@pytest.mark.parametrize(
    ("to", "code", "said"), [("/dev/full", 5, "compt: cannot write the output: No space left"), ("&-", 0, "")]
)
def test_output_that_cannot_be_written(to: str, code: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m compt recipes list >{to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == bool(said)


def test_a_user_without_an_entry_has_a_name_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> Any:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _prepare_process()
    assert getpass.getuser() == str(os.getuid())


@pytest.mark.skipif(
    subprocess.run(["unshare", "-U", "--map-user=54321", "true"], capture_output=True, check=False).returncode != 0,
    reason="other users cannot be tried here",
)
def test_a_user_that_the_system_does_not_know() -> None:
    """As with `docker run --user 54321`."""
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    done = subprocess.run(
        ["unshare", "-U", "--map-user=54321", sys.executable, "-m", "compt", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key not in names},
    )
    assert "Traceback" not in done.stderr
    (home,) = [item for item in json.loads(done.stdout)["findings"] if item["check"] == "home folder"]
    assert (home["found"].split(" on ")[0], home["remedy"].split(":")[0]) == (
        "user 54321 has none",
        "set HOME to a folder that can be written",
    )
