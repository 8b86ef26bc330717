"""Which cases of a matrix run with the slow tests, and which only with the complete one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def matrix(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Parameters for `parametrize`: the `chosen` cases are slow tests, the others run with `make test-full` alone."""
    listed = list(cases)
    assert all(case in listed for case in chosen), "a chosen case is not in the matrix"
    marks = {True: pytest.mark.slow, False: pytest.mark.full}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[case in chosen]) for case in listed
    ]
