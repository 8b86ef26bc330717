"""Write results of the engine benchmarks as JSON in docs/results/engines and as tables in docs/engines.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import rounded
from benchmarks.engines.cells import SEED
from compt.bench.throughput import device_name
from compt.errors import RunError
from compt.files import write_text
from compt.text import TextTable
from compt.weights.artefact import versions

DOCS = Path(__file__).resolve().parents[2] / "docs"
OUT = DOCS / "results" / "engines"
PAGE = DOCS / "engines.md"
DIGITS = 2


def scientific(value: float) -> str:
    """1.3e-06."""
    return f"{value:.{DIGITS - 1}e}"


def about() -> dict[str, Any]:
    """Machine, versions, seed and date of a measurement."""
    found = versions()
    try:
        found["deepspeed"] = version("deepspeed")
    except PackageNotFoundError:
        found["deepspeed"] = "none"
    return {
        "machine": device_name(torch.device("cpu")),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": "gloo",
        "versions": found,
        "seed": SEED,
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


def sources(results: Mapping[str, Any]) -> str:
    """One line that says where and when the numbers were measured."""
    names = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    where = f"{results['machine']}, CPU processes with {results['backend']}"
    return f"Measured {results['date'][:10]} on {where}; {names}; seed {results['seed']}."


def section(file: str, results: Mapping[str, Any], tables: list[TextTable]) -> str:
    """The text that belongs between the marks of `file`."""
    parts = [table.markdown().strip() for table in tables]
    return "\n\n".join([*parts, f"{sources(results)} All numbers: [{file}](results/engines/{file})."])


def marks(file: str) -> tuple[str, str]:
    """The two lines of the page that enclose the tables of a results file."""
    name = file.removesuffix(".json")
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def shown(page: str, file: str) -> str:
    """The text on a page between the marks of `file`. Raises RunError if a mark is missing."""
    return _parts(page, file)[1].strip("\n")


def _parts(page: str, file: str) -> tuple[str, str, str]:
    begin, end = marks(file)
    before, found, rest = page.partition(begin)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise RunError(f"{PAGE}: needs the lines {begin} and {end}; the tables go between them")
    return before + begin, inside, end + after


def write_results(
    file: str, results: Mapping[str, Any], tables: list[TextTable], folder: Path = OUT, page: Path | None = None
) -> Path:
    """Write the JSON, and the tables between the marks of `page` if given. Raises RunError if a mark is missing."""
    path = folder / file
    write_text(path, json.dumps(rounded(results), indent=1, ensure_ascii=False) + "\n")
    if page is not None:
        before, _, after = _parts(page.read_text(encoding="utf-8"), file)
        write_text(page, f"{before}\n{section(file, rounded(results), tables)}\n{after}")
    return path


def read_results(file: str, folder: Path = OUT) -> dict[str, Any]:
    """Read the JSON that a benchmark wrote."""
    return dict(json.loads((folder / file).read_text(encoding="utf-8")))
