"""Odd files, values and environments on the command line: one clear line and the right exit code, no traceback."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

import pytest

from compt.cli.main import main
from compt.text import terminal
from tests.helpers.recipe import make_data, write_recipe

LONG = "a" * 300


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are no recipes, models or runs."""
    folder = tmp_path_factory.mktemp("odd")
    write_recipe(make_data(folder) / "recipe.yaml")
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_text("x")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "utf16.yaml").write_bytes("name: a".encode("utf-16"))
    (folder / "twice.yaml").write_text("name: a\nname: b\n")
    (folder / "tabs.yaml").write_text("name:\n\t- a\n")
    (folder / "itself.yaml").write_text("name: &a [*a]\n")
    for name in ("piped", "deep"):
        (folder / name).mkdir()
    os.mkfifo(folder / "piped" / "run.json")
    (folder / "deep" / "run.json").write_text("[" * 100_000)
    letters = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise(letters)]
    (folder / "anchors.yaml").write_text("\n".join(lines))
    return folder


# (words, exit code, what the line says)
WORDS: list[tuple[str, int, str]] = [
    ("plan .", 2, "no such file"),
    ("plan fifo", 2, "it is not a plain file"),
    ("plan socket", 2, "it is not a plain file"),
    ("plan /dev/zero", 2, "it is not a plain file"),
    ("plan loop", 2, "no such file"),
    ("plan binary.yaml", 2, "cannot be read: 'utf-8'"),
    ("plan utf16.yaml", 2, "cannot be read: 'utf-8'"),
    ("plan twice.yaml", 2, "line 2: the key 'name' occurs twice"),
    ("plan tabs.yaml", 2, "is not YAML"),
    ("plan itself.yaml", 2, "name: "),
    ("plan anchors.yaml", 2, "a: unknown key"),
    ("plan " + LONG, 2, "File name too long"),
    ("recipes show binary.yaml", 2, "cannot be read: 'utf-8'"),
    ("recipes show fifo", 2, "it is not a plain file"),
    ("recipes copy /dev/zero copied.yaml", 2, "it is not a plain file"),
    ("recipes copy recipe.yaml file/copied.yaml", 5, "file"),
    ("plan recipe.yaml --set optimizer.lr=.nan", 2, "should be a finite number"),
    ("plan recipe.yaml --set data.images=.inf", 2, "should be a valid integer"),
    ("plan recipe.yaml --set optimizer.batch=999999999999999999", 2, "is larger than data.images"),
    ("plan recipe.yaml --set optimizer.batch=99999999999999999999", 2, "should be at most 1e+18"),
    ("plan recipe.yaml --set name=2020-01-01", 2, "name: should be a valid string"),
    ("plan recipe.yaml --set chain.links.9.model=x", 2, "has the items 0 to 1, not '9'"),
    ("plan recipe.yaml --set chain.links.-1.model=x", 2, "has the items 0 to 1, not '-1'"),
    ("plan recipe.yaml --set chain.links.².model=x", 2, "has the items 0 to 1, not '²'"),
    ("plan recipe.yaml --set optimizer.[x=1", 2, "optimizer.[x = 1: unknown key"),
    ("plan recipe.yaml --set ...=1", 2, "unknown key"),
    ("plan recipe.yaml --set =1", 2, "should be KEY=VALUE"),
    ("plan recipe.yaml --set chain=", 2, "chain: should be a section"),
    ("plan recipe.yaml --set data={[}", 2, "is not YAML"),
    ("plan recipe.yaml --set data=!!python/object/apply:os.getcwd", 2, "is not YAML"),
    ("bench throughput --captions ²", 2, "--captions ²: should be numbers"),
    ("report file", 5, "file/run.json: cannot be read"),
    ("report loop", 5, "loop/run.json: cannot be read"),
    ("report " + LONG, 5, "File name too long"),
    ("report piped", 5, "piped/run.json: cannot be read: [Errno 22] it is not a plain file"),
    ("report deep", 5, "deep/run.json: cannot be read: nested too deeply"),
    ("plan recipe.yaml --throughput fifo", 2, "cannot read fifo: it is not a plain file"),
    ("plan recipe.yaml --throughput /dev/zero", 2, "cannot read /dev/zero: it is not a plain file"),
    ("data check train --captions-csv fifo", 3, "table of captions fifo: it is not a plain file"),
    ("data check train --captions-csv /dev/zero", 3, "table of captions /dev/zero: it is not a plain file"),
    ("data check " + LONG, 2, "File name too long"),
    ("eval " + LONG + " --data x", 2, "File name too long"),
    ("eval fifo --data x", 4, "fifo"),
    ("eval file --data x", 4, "file"),
    ("expand " + LONG + " vit_pico out", 2, "File name too long"),
    ("chain recipe.yaml --run-folder file", 5, "file"),
    ("chain recipe.yaml --run-folder loop", 5, "loop"),
    ("doctor file", 5, "file"),
]


@pytest.mark.parametrize(("words", "code", "said"), WORDS, ids=[words[:60] for words, *_ in WORDS])
def test_odd_files_and_values(
    words: str, code: int, said: str, odd: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(odd)
    with pytest.raises(SystemExit) as end:
        main(words.split)
    out, err = capfd.readouterr()
    assert said in err
    assert err.startswith("compt: ")
    assert err.count("\n") == 1 or "mistakes" in err
    assert (end.value.code, out) == (code, "")


RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (RANKS | {"RANK": "a"}, "RANK=a: must be a whole number"),
        (RANKS | {"RANK": "²"}, "RANK=²: must be a whole number"),
        (RANKS | {"RANK": "5"}, "RANK=5 must be below WORLD_SIZE=2"),
        (RANKS | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be a whole number"),
        (RANKS | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: ports end at 65535"),
        (RANKS | {"COMPT_CONNECT_SECONDS": "x"}, "COMPT_CONNECT_SECONDS=x: must be a number"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "-3"}, "SLURM_STEP_NUM_TASKS=-3: must be a whole number"),
        (SLURM | {"SLURM_PROCID": "-1"}, "SLURM_PROCID=-1: must be a whole number"),
        (SLURM | {"SLURM_STEP_NODELIST": "n["}, "'n[' is not a list of Slurm nodes"),
    ],
)
def test_odd_environments(
    environment: dict[str, str],
    said: str,
    odd: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(odd)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main("chain recipe.yaml".split)
    err = capfd.readouterr().err
    assert said in err
    assert err.startswith("compt")
    assert err.count("\n") == 1
    assert end.value.code == 2


def test_a_folder_that_was_deleted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        main("report x".split)
    assert capfd.readouterr().err == "compt: the current folder no longer exists; change to one that does\n"
    assert end.value.code == 2


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 80), ("-5", 80), ("x", 80), ("40", 40)])
def test_odd_widths(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal().width == width
