"""Options pass through launchers; exit codes and signals pass through `compt launch`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer.main

from compt.cli.launch import LaunchRecord, chain_words, exit_code
from compt.cli.main import app
from compt.errors import ConfigError
from tests.helpers.cases import matrix
from tests.helpers.optional import optional
from tests.helpers.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "launch" / "worker.py"

# --- options


@pytest.fixture
def zero2(tmp_path: Path) -> Path:
    path = tmp_path / "zero2.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--recipe r.yaml", "r.yaml"),
        ("--recipe=r.yaml --baselines", "r.yaml --baselines"),
        ("r.yaml --run-folder runs/a", "r.yaml --run-folder runs/a"),
        ("r.yaml --run-folder=runs/a", "r.yaml --run-folder=runs/a"),
        ("--local_rank=3 --recipe r.yaml", "r.yaml"),
        ("--local-rank 3 --recipe r.yaml --set a.b=c", "r.yaml --set a.b=c"),
    ],
)
def test_options_of_launchers(words: str, expected: str) -> None:
    assert chain_words(words.split(), {}) == ["chain", *expected.split()]


def test_help_names_the_options_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert chain_words(["--help"], {}) == ["chain", "--help"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--recipe FILE", "--deepspeed_config FILE", "--local_rank N"))


def test_the_local_rank_option_sets_a_missing_variable() -> None:
    for before in ({}, {"LOCAL_RANK": "5"}):
        environment = dict(before)
        chain_words(["--local_rank=3", "r.yaml"], environment)
        assert environment == {"LOCAL_RANK": "3", **before}


@pytest.mark.parametrize(
    "spelling", ["--deepspeed_config {}", "--deepspeed_config={}", "--deepspeed --deepspeed_config {}"]
)
def test_a_deepspeed_file_sets_the_engine(zero2: Path, spelling: str) -> None:
    words = chain_words(["--recipe", "r.yaml", *spelling.format(zero2).split()], {})
    assert words == ["chain", "r.yaml", "--set", f'engine.deepspeed_config="{zero2}"', "--set", "engine.name=zero2"]


@pytest.mark.parametrize(
    "given",
    [
        ["--set", "engine.name=zero3"],
        ["--set=engine.name=zero3"],
        ["--set", "engine={name: fsdp2}"],
        ["--set=engine={device: cpu}"],
    ],
)
def test_a_given_engine_takes_precedence_over_the_file(zero2: Path, given: list[str]) -> None:
    words = chain_words(["r.yaml", *given, "--deepspeed_config", str(zero2)], {})
    assert words == ["chain", "r.yaml", *given, "--set", f'engine.deepspeed_config="{zero2}"']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ('{"zero_optimization": {"stage": 4}}', "stage should be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "stage should be 0, 1, 2 or 3"),
        ('{"zero_optimization": 2}', "stage should be 0, 1, 2 or 3"),
        ("[]", "stage should be 0, 1, 2 or 3"),
        ("{}", "stage should be 0, 1, 2 or 3, not None"),
    ],
)
def test_a_file_that_is_not_for_deepspeed_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"--deepspeed_config .*ds.json: .*{message}"):
        chain_words(["r.yaml", "--deepspeed_config", str(path)], {})


@pytest.mark.parametrize("words", [["--recipe"], ["r.yaml", "--deepspeed_config"], ["r.yaml", "--local_rank"]])
def test_a_missing_value_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected one argument"):
        chain_words(words, {})


def test_deepspeed_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="--deepspeed needs --deepspeed_config"):
        chain_words(["r.yaml", "--deepspeed"], {})


def commands(group: Any, *words: str) -> Iterator[tuple[list[str], list[str]]]:
    """The words of each command of compt, and its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            options = [text for option in command.params for text in (*option.opts, *option.secondary_opts)]
            yield [*words, name], [text for text in options if text.startswith("-")]


def passed_on(launcher: str, words: list[str]) -> list[str]:
    """The words that a launcher passes on after those that name the module or the script."""
    found: Any
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(["--nproc_per_node", "2", *words]).training_script_args
    elif launcher == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(["--num_processes", "2", *words]).training_script_args
    else:
        from deepspeed.launcher import launch, runner

        words = ["--no_local_rank", "--module", *words[1:]] if words[0] == "-m" else words
        args = runner.parse_args(["--num_gpus", "2", *words])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["launch", "--node_rank=0", args.user_script, *args.user_args])
            found = launch.parse_args().training_script_args
    return list(found)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_no_launcher_consumes_our_options(launcher: str) -> None:
    """argparse takes the start of an option for the option: torchrun refused --run, which could be its --run-path."""
    optional("torch" if launcher == "torchrun" else launcher, launcher)
    found = {" ".join(words): options for words, options in commands(typer.main.get_command(app))}
    assert {"--set", "--run-folder"} <= set(found["chain"])
    for words, options in found.items():
        for name in options:
            # torchrun parses all words in a hundredth of a second; one value a name is enough.
            after = [*words.split(), name, "value", f"{name}=value", "--set", "a=b"]
            assert passed_on(launcher, ["-m", "compt", *after]) == after
    after = [word for name in ("--recipe", "--deepspeed_config", *found["chain"]) for word in (name, f"{name}=value")]
    assert passed_on(launcher, ["train.py", *after]) == after


# --- exit codes


def records(*codes: int | None, agreed: bool = False) -> list[LaunchRecord]:
    return [LaunchRecord(100 + rank, rank, code, agreed) for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("launcher", "signalled", "ranks", "expected"),
    [
        (0, False, records(0, 0), 0),
        (0, True, records(0, 0), 0),
        (1, False, records(75, 75, agreed=True), 75),
        (1, False, records(75, 75), 1),
        (75, False, records(75, 75), 1),
        (1, True, records(75, 75), 75),
        (1, True, [], 75),
        (1, True, records(75, None), 75),
        (1, False, records(75, None), 1),
        (1, False, records(5, 5, agreed=True), 5),
        (1, False, records(75, 3), 3),
        (1, False, records(4, 3), 4),
        (1, True, records(75, 5), 75),
        (1, True, records(5, 5, agreed=True), 5),
        (3, False, [], 3),
        (75, False, [], 75),
        (-9, False, [], 137),
        (-9, False, records(None, None), 137),
    ],
)
def test_the_exit_code_of_a_launch(launcher: int, signalled: bool, ranks: list[LaunchRecord], expected: int) -> None:
    assert exit_code(launcher, signalled, ranks) == expected


Start = Any
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        *("-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", str(ROOT / "launchers" / "accelerate" / "cpu.yaml")),
    ],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "0"],
}
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
FAILURES = (("1=fail", (3,)), ("1=die", (1, 137, 247)))
OTHERS = ("accelerate", "deepspeed")


def with_launchers(cases: Sequence[Any]) -> list[Any]:
    """Every case under every launcher. Each test run has the first case of torchrun, and one of each other launcher."""
    others = [*product(cases[1:], ["torchrun"]), *product(cases, OTHERS)]
    return [(cases[0], "torchrun"), *matrix(others, [(cases[0], OTHERS[0]), (cases[-1], OTHERS[-1])])]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(launcher: str, *plans: str) -> subprocess.Popen[str]:
        optional("torch" if launcher == "torchrun" else launcher, launcher)
        words = [word if word != "0" else str(free_port()) for word in LAUNCHERS[launcher]]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "compt", "launch", sys.executable, *words, str(WORKER), str(tmp_path), *plans],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    for path in tmp_path.glob("begun-*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def until_begun(process: subprocess.Popen[str], folder: Path) -> list[int]:
    """The processes that the launcher started, when both are there."""
    deadline = time.monotonic() + 100
    while len(found := [path for path in folder.glob("begun-*") if path.read_text()]) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(path.read_text()) for path in found]


def children(pid: int) -> list[int]:
    """A process and its results."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task/{pid}").glob("children"):
        for child in path.read_text().split():
            found += children(int(child))
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("number", "launcher"), with_launchers(SIGNALS))
def test_a_stop_request_saves_and_exits_75(start: Start, tmp_path: Path, launcher: str, number: signal.Signals) -> None:
    process = start(launcher)
    until_begun(process, tmp_path)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


@pytest.mark.dist
@pytest.mark.parametrize("number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.full), signal.SIGTERM])
def test_a_signal_to_every_process_as_from_slurm(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("torchrun")
    until_begun(process, tmp_path)
    everyone = children(process.pid)
    assert len(everyone) >= 4
    for pid in everyone:
        os.kill(pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert "got signal" not in output, "torchrun took it for its own, and would have killed them after 30 seconds"


@pytest.mark.dist
@pytest.mark.parametrize(("failure", "launcher"), with_launchers(FAILURES))
def test_a_failure_is_not_reported_as_a_stop(
    start: Start, tmp_path: Path, failure: tuple[str, tuple[int, ...]], launcher: str
) -> None:
    plan, codes = failure
    process = start(launcher, plan)
    output, _ = process.communicate(timeout=100)
    assert process.returncode in codes, output
    if (tmp_path / "saved-0").exists():
        assert (tmp_path / "saved-0").read_text() == "SIGTERM", "the launcher asked what was left to stop"


@pytest.mark.parametrize("under", [[], ["nohup"]])
def test_a_launch_that_has_not_started_is_ended(under: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import pathlib, time; pathlib.Path('up').touch(); time.sleep(60)"]
    process = subprocess.Popen([*under, sys.executable, "-m", "compt", "launch", *words], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_a_missing_launcher_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compt", "launch", "torchrunn", "train.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "compt: compt launch: 'torchrunn' cannot be started (No such file or directory)\n"
