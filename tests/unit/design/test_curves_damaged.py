"""Damaged files of a run: one clear error, or a job that is left out with its reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.cli.curves import curves_table
from compt.design.curves import read_curves
from compt.design.epochs import EpochModel, paper_matches
from compt.design.runs import stored_answers
from compt.errors import ConfigError, Interrupted, RunError
from compt.files import read_json
from tests.helpers.curves import BASELINE, NANO, SET, link, write_run

LINK = "2-vit_micro"
FILES = ("run.json", *(f"jobs/{name}/manifest.json" for name in (LINK, BASELINE["name"], NANO["name"])))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def a_run(folder: Path) -> Path:
    same = {"name": "control", "kind": "control", "same_as": LINK}
    return write_run(folder, [NANO, BASELINE, link(5, 20.0), link(20, 28.0, "longer")], listed=[same], answers=False)


def keys(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """All places in a JSON value: every key, every item, and the whole."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from keys(item, (*path, key))


def replaced(value: Any, path: tuple[str | int, ...], by: Any) -> Any:
    if not path:
        return by
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], by)
    return changed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("run"))


def read(run: Path) -> str:
    """The text that a user sees of it."""
    found = read_curves([run], on=SET)
    json.dumps(found.to_json(), allow_nan=False)
    EpochModel.fit(paper_matches(), found.links)
    table = curves_table(found)
    return " ".join([*(cell for row in table.rows for cell in row), *table.notes])


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([1, -1, "1"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_value_anywhere(run: Path, file: str, data: st.DataObject) -> None:
    kept = read_json(run / file)
    path = data.draw(st.sampled_from(list(keys(kept))), "place")
    try:
        write_json(run / file, replaced(kept, path, data.draw(values, "value")))
        read(run).encode()
    except (RunError, ConfigError) as error:
        str(error).encode()
    finally:
        write_json(run / file, kept)


WRONG: tuple[Any, ...] = (2, ["a"], {}, "", "\ud800", None, float("nan"), 10**400)


@pytest.mark.parametrize("file", FILES[:2])
def test_each_wrong_value_at_each_place(run: Path, file: str) -> None:
    kept, wrong = read_json(run / file), []
    for path in keys(kept):
        for value in WRONG:
            try:
                write_json(run / file, replaced(kept, path, value))
                read(run).encode()
            except (RunError, ConfigError) as error:
                str(error).encode()
            except Exception as error:
                wrong.append(f"{path} = {value!r:.20}: {error!r}")
    write_json(run / file, kept)
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("primary",), 2, "primary = 2: should be a valid string"),
        (("primary",), ["a"], r"primary = \['a'\]: should be a valid string"),
        (("data_fingerprint",), None, "data_fingerprint = None: should be a valid string"),
        (("jobs", 1, "kind"), [], r"jobs\.1\.kind = \[\]: should be a valid string"),
        (("jobs", 0, "name"), {}, r"jobs\.0\.name: should be a valid string"),
        (("jobs", 4, "same_as"), 0, r"jobs\.4\.same_as = 0: should be a valid string"),
        (("jobs", 0), 1, r"jobs\.0 = 1: should be a valid dictionary"),
    ],
)
def test_the_key_is_named(path: tuple[str | int, ...], value: Any, message: str, tmp_path: Path) -> None:
    state = read_json(a_run(tmp_path) / "run.json")
    write_json(tmp_path / "run.json", replaced(state, path, value))
    with pytest.raises(RunError, match=f"{tmp_path / 'run.json'} is damaged: {message}"):
        read_curves([tmp_path])


def test_deep_nesting_and_no_texts(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for text in ("[" * 100_000, "{", '"\\ud800"', "\xff"):
        (run / "jobs" / LINK / "manifest.json").write_text(text, encoding="latin-1")
        assert [item.reason for item in read_curves([run]).skipped if "cannot be read" in item.reason], text[:9]
    (run / "run.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        read_curves([run])


def test_a_signal_while_answers_are_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(np, "load", stopped)
    with pytest.raises(Interrupted):
        stored_answers(tmp_path, "1-a", "set")
