"""The house rules, held by reading the source: who imports whom, what is imported where, how long things are."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "compt").rglob("*.py"))

# From the bottom up. A module imports only from the rows below its own; the modules of one package are one row, and may
# import each other as long as no ring comes of it. A name stands for the module, its submodules, and `<name>_<more>`.
LAYERS = (
    "compt.errors",
    "compt.files",
    "compt.presets",
    "compt.growth",
    "compt.paper",
    "compt.config",
    "compt.macs",
    "compt.memory",
    "compt.planner",
    "compt.hardware",
    "compt.curves",
    "compt.design",
    "compt.forecast",
    "compt.formats",
    "compt.plan_tables",
    "compt.out_of_memory",
    "compt.slurm",
    "compt.dist",
    "compt.doctor",
    "compt.pixels",
    "compt.models",
    "compt.losses",
    "compt.task",
    "compt.expand",
    "compt.data",
    "compt.tensorfile",
    "compt.artefact",
    "compt.sources",
    "compt.engines",
    "compt.accumulate",
    "compt.checkpoint",
    "compt.metrics",
    "compt.stragglers",
    "compt.trainer",
    "compt.throughput",
    "compt.fit",
    "compt.estimate",
    "compt.evaluate",
    "compt.verify",
    "compt.scoring",
    "compt.jobs",
    "compt.chain",
    "compt.calibrate",
    "compt.summary",
    "compt.tables",
    "compt.report",
    "compt.demo",
    "compt.cli",
    "compt.__main__",
)

ONLY_IN = {
    "deepspeed": ("compt/engines/zero*.py",),
    "nvidia.dali": ("compt/data/dali.py",),
    "matplotlib": ("compt/report*.py", "compt/report/*.py"),
}

# The one module that may unpickle, and only with torch's own restricted unpickler.
PICKLES = "compt/sources/pickles.py"

PRINTING = ("compt/cli*.py", "compt/cli/*.py", "compt/report*.py", "compt/__main__.py")

# Everything up to the first row that computes: what `compt plan` is made of.
WITHOUT_TORCH = (*LAYERS[: LAYERS.index("compt.dist")], "compt.cli")

FILE_LINES = 450
FUNCTION_LINES = 100
# "path" or "path::function": why it is longer.
LONGER: dict[str, str] = {}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer_of(module: str) -> int | None:
    """The row of `LAYERS` a module is in, -1 for the package itself, None for a module that no row names."""
    if module == "compt":
        return -1
    top = ".".join(module.split(".")[:2])
    for row, name in enumerate(LAYERS):
        if top == name or top.startswith(f"{name}_"):
            return row
    return None


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands. `from a import b` is given as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}") for alias in node.names)


def resolved(name: str, modules: frozenset[str]) -> str:
    """The module behind an imported dotted name: `compt.files.write_json` is `compt.files`."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def wrong_imports(path: str, tree: ast.AST) -> Iterator[str]:
    own = layer_of(module_of(path))
    if own is None:
        yield f"{path}: the module is in no row of LAYERS"
    for line, name in imports(tree):
        if name.startswith("."):
            yield f"{path}:{line}: relative import of {name}"
        if name.split(".")[0] == "compt" and own is not None:
            other = layer_of(".".join(name.split(".")[:2]))
            if other is not None and other > own:
                yield f"{path}:{line}: {LAYERS[own] if own >= 0 else 'compt'} imports {name}, which is above it"
        for package, places in ONLY_IN.items():
            if f"{name}.".startswith(f"{package}.") and not any(fnmatch.fnmatch(path, place) for place in places):
                yield f"{path}:{line}: {package} is imported only in {', '.join(places)}"
        if name in ("torch.load", "torch.serialization.load"):
            yield f"{path}:{line}: torch.load unpickles: use safetensors"
        if name.split(".")[0] in ("pickle", "_pickle", "dill", "joblib", "cloudpickle") and path != PICKLES:
            yield f"{path}:{line}: {name} unpickles: use compt.sources.pickles"


def weights_only(call: ast.Call) -> bool:
    given = [word.value for word in call.keywords if word.arg == "weights_only"]
    return len(given) == 1 and isinstance(given[0], ast.Constant) and given[0].value is True


def wrong_calls(path: str, tree: ast.AST) -> Iterator[str]:
    prints = any(fnmatch.fnmatch(path, place) for place in PRINTING)
    restricted = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and weights_only(node)}
    for node in ast.walk(tree):
        loads = isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.serialization.load")
        if loads and not (path == PICKLES and id(node) in restricted):
            yield f"{path}:{node.lineno}: torch.load unpickles: use safetensors"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.load", "pickle.loads"):
            yield f"{path}:{node.lineno}: {ast.unparse(node)} runs what the file says"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and not prints:
            yield f"{path}:{node.lineno}: print() in library code"
        raised = node.exc if isinstance(node, ast.Raise) else None
        if raised is not None and "NotImplementedError" in ast.unparse(raised):
            yield f"{path}:{node.lineno}: NotImplementedError"


def wrong_sizes(path: str, source: str, tree: ast.AST) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > FILE_LINES and path not in LONGER:
        yield f"{path}: {lines} lines, {FILE_LINES} at most"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES and f"{path}::{node.name}" not in LONGER:
                yield f"{path}:{node.lineno}: {node.name}() has {lines} lines, {FUNCTION_LINES} at most"


def violations(path: str, source: str) -> list[str]:
    tree = ast.parse(source, path)
    return [*wrong_imports(path, tree), *wrong_calls(path, tree), *wrong_sizes(path, source, tree)]


def rings(graph: dict[str, set[str]]) -> list[str]:
    """Import rings, each as 'a -> b -> a'."""
    found: list[str] = []
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_a_module_keeps_the_house_rules(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_no_import_rings() -> None:
    modules = frozenset(map(module_of, SOURCES))
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        # `compt.models` within `compt.models.clip` means the package's own __init__: Python has run it by then.
        targets = {resolved(name, modules) for _, name in imports(tree)}
        graph[module_of(path)] = {name for name in targets & modules if not module_of(path).startswith(f"{name}.")}
    assert rings(graph) == []


def test_light_modules_do_not_import_torch() -> None:
    light = [layer_of(name) for name in WITHOUT_TORCH]
    present = [name for name in map(module_of, SOURCES) if layer_of(name) in light]
    code = (
        "import importlib, sys\n"
        f"for name in {present!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'open_clip', 'timm', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {sorted(heavy)}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exceptions_exist_and_have_reasons() -> None:
    for place, reason in LONGER.items():
        path, _, function = place.partition("::")
        assert reason, place
        assert path in SOURCES, place
        names = {getattr(node, "name", "") for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))}
        assert not function or function in names, place


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("compt/config.py", "from compt.trainer import train", "above it"),
        ("compt/config.py", "from compt import trainer", "above it"),
        ("compt/__init__.py", "import compt.errors", "above it"),
        ("compt/losses.py", "def f():\n    import compt.engines.ddp", "above it"),
        ("compt/jobs.py", "import compt.chain", "above it"),
        ("compt/models/clip.py", "from . import init", "relative import"),
        ("compt/mystery.py", "", "in no row"),
        ("compt/trainer.py", "import deepspeed", "only in compt/engines/zero*.py"),
        ("compt/data/decode.py", "from nvidia.dali import fn", "only in compt/data/dali.py"),
        ("compt/metrics.py", "import matplotlib.pyplot as plt", "only in compt/report"),
        ("compt/checkpoint.py", "import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("compt/checkpoint.py", "from torch import load", "torch.load"),
        ("compt/checkpoint.py", "from torch.serialization import load", "torch.load"),
        ("compt/sources/pickles.py", "import torch\ntorch.load('x')", "torch.load"),
        ("compt/sources/pickles.py", "import torch\ntorch.load('x', weights_only=False)", "torch.load"),
        ("compt/sources/pickles.py", "import torch\ntorch.load('x', weights_only=bool(1))", "torch.load"),
        ("compt/sources/pickles.py", "import torch\nread = torch.load\nread('x')", "torch.load"),
        ("compt/sources/pickles.py", "from torch import load", "torch.load"),
        ("compt/sources/pickles.py", "import pickle\npickle.load(open('x', 'rb'))", "runs what the file says"),
        ("compt/sources/dcp.py", "import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("compt/sources/dcp.py", "import pickle", "unpickles"),
        ("compt/trainer.py", "print('x')", "print()"),
        ("compt/trainer.py", "def f():\n    raise NotImplementedError", "NotImplementedError"),
        ("compt/trainer.py", "x = 1\n" * (FILE_LINES + 1), "lines"),
        ("compt/trainer.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES, "f() has"),
    ],
)
def test_the_checker_reports(path: str, source: str, message: str) -> None:
    found = violations(path, source)
    assert found
    assert all(message in line for line in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("compt/chain.py", "import compt.jobs\nfrom compt import __version__"),
        ("compt/models/clip.py", "from compt.models.init import init_parameters"),
        ("compt/engines/zero.py", "import deepspeed"),
        ("compt/sources/pickles.py", "import pickle, torch\ntorch.load('x', mmap=True, weights_only=True)"),
        ("compt/report_figures.py", "import matplotlib.pyplot as plt\nprint('x')"),
        ("compt/losses.py", "import torch\nimport deepspeed_like\ntorch.save({}, 'x')"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_the_ring_finder() -> None:
    assert rings({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]
