"""A child process that answers once, and ends in one of several ways."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from compt.dist import child
from compt.dist.child import answer_of, start_child


def hangs(sender: Any) -> None:
    sender.send("done")
    time.sleep(600)


def dies(sender: Any) -> None:
    os._exit(3)


def says_nothing(sender: Any) -> None:
    time.sleep(600)


@pytest.mark.parametrize(("target", "answer", "code"), [(hangs, "done", -9), (dies, None, 3), (says_nothing, None, -9)])
def test_the_answer_is_waited_for_and_not_the_end(
    target: Callable[..., None], answer: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_LEAVE", 0.5)
    process, receiver = start_child(target)
    assert answer_of(process, receiver, lambda: target is says_nothing) == answer
    assert process.exitcode == code
