"""Packages that the README's environment may lack."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def optional(module: str, extra: str) -> ModuleType:
    """The module. Skips the test without it, and fails where COMPT_TEST_ALL says that every package is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if os.environ.get("COMPT_TEST_ALL"):
            pytest.fail(f"COMPT_TEST_ALL is set, but {error}: pip install 'compt[test-all]'")
        return pytest.skip(f"{module} is not installed: pip install 'compt[{extra}]'")
