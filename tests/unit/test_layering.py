"""The rules of the source, checked by reading it: imports, light modules, names, lengths."""

from __future__ import annotations

import ast
import fnmatch
import io
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "compt").rglob("*.py"))

# From the bottom up. A package imports only from those before it; within one, any order without a ring.
PACKAGES = (
    "errors",
    "files",
    "text",
    "models",
    "recipe",
    "cost",
    "expand",
    "plan",
    "dist",
    "data",
    "drawings",
    "weights",
    "engines",
    "train",
    "evaluate",
    "bench",
    "chain",
    "design",
    "report",
    "export",
    "api",
    "cli",
    "__main__",
)

# Modules that load neither torch nor a library that does: checking, planning and designing take a moment.
LIGHT = (
    "compt.errors",
    "compt.files",
    "compt.text",
    "compt.models",
    "compt.models.presets",
    "compt.models.growth",
    "compt.models.operators",
    "compt.recipe",
    "compt.recipe.*",
    "compt.cost",
    "compt.cost.*",
    "compt.plan",
    "compt.plan.*",
    "compt.design",
    "compt.design.*",
    "compt",
    "compt.api",
    "compt.api.*",
    "compt.chain.slurm",
    "compt.export",
    "compt.export.formats",
    "compt.dist.environment",
    "compt.cli",
    "compt.cli.*",
)
HEAVY = frozenset({"torch", "torchvision", "open_clip", "timm", "deepspeed", "matplotlib", "transformers", "nvidia"})

ONLY_IN = {
    "deepspeed": ("compt/engines/zero/*.py",),
    "nvidia.dali": ("compt/data/dali.py",),
    "matplotlib": ("compt/report/figures.py",),
}

# The one module that may unpickle, and only with torch's own restricted unpickler.
PICKLES = "compt/weights/pickles.py"

PRINTING = ("compt/cli/*.py", "compt/report/*.py", "compt/__main__.py")

# The public API imports lazily; every other face of a package is a docstring.
FACES_WITH_CODE = {
    "compt/__init__.py": "the version, and the public names, which are looked up when asked for",
    "compt/models/__init__.py": "register_swin, a name printed to users, is looked up when asked for",
}

FILE_LINES = 500
SMALL = 60
FUNCTION_LINES = 100
SILENT_LINES = 40
"""A longer function needs a comment."""

# "path" or "path::function": why it is longer.
LONGER: dict[str, str] = {}

# Files of fewer than 60 lines: why each is a file.
SMALLER: dict[str, str] = {
    "compt/bench/estimate.py": "one question: how long will this run take",
    "compt/chain/start.py": "the model that a chain starts from; jobs and calibration both open it",
    "compt/cli/doctor.py": "a command group of its own",
    "compt/cli/recipes.py": "a command group of its own",
    "compt/data/names.py": "tars, tables and class folders read names by the same rules",
    "compt/engines/average.py": "every engine has it",
    "compt/engines/scale.py": "every engine has it",
    "compt/evaluate/validation.py": "the validation loss",
    "compt/design/sizes.py": "the prediction of epochs and the reader of runs count positions by one rule",
    "compt/cli/export.py": "a command of its own",
    "compt/export/hub.py": "the one module that uploads",
    "compt/models/pixels.py": "training, evaluation and timings all turn bytes into input",
    "compt/models/swin.py": "imports timm, for those who register a Swin only",
}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = frozenset(map(module_of, SOURCES))


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def package_of(module: str) -> int | None:
    """The place of a module's package in PACKAGES, -1 for `compt` itself, None for one that is not listed."""
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    return PACKAGES.index(parts[1]) if parts[1] in PACKAGES else None


def names_of(node: ast.AST) -> list[str]:
    """The dotted names that an import statement imports. `from a import b` gives `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, in functions too."""
    for node in ast.walk(tree):
        yield from ((getattr(node, "lineno", 0), name) for name in names_of(node))


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names that are imported when the module is: not in a function, not for type checkers alone."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield from names_of(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
            waiting.extend(
                child
                for handler in getattr(node, "handlers", [])
                for child in ast.iter_child_nodes(handler)
                if isinstance(child, ast.stmt)
            )


def resolved(name: str, modules: frozenset[str] = MODULES) -> str:
    """The module behind an imported dotted name: `compt.files.write_json` is `compt.files`."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def heavy_modules(trees: Mapping[str, ast.Module]) -> dict[str, str]:
    """Module -> the import that makes it heavy, directly or through other modules. A module's packages come first."""
    modules = frozenset(trees)
    heavy: dict[str, str] = {}
    needs: dict[str, set[str]] = {}
    for module, tree in trees.items():
        needs[module] = {module.rpartition(".")[0]} & modules
        for name in top_level_imports(tree):
            if name.split(".")[0] in HEAVY:
                heavy[module] = name
            elif name.split(".")[0] == "compt":
                needs[module].add(resolved(name, modules))
    changed = True
    while changed:
        changed = False
        for module, others in needs.items():
            for other in sorted(others):
                if other in heavy and module not in heavy:
                    heavy[module] = other
                    changed = True
    return heavy


def wrong_imports(path: str, tree: ast.AST) -> Iterator[str]:
    own = package_of(module_of(path))
    if own is None:
        yield f"{path}: its package is not in PACKAGES"
    for line, name in imports(tree):
        if name.startswith("."):
            yield f"{path}:{line}: relative import of {name}"
        if name.split(".")[0] == "compt" and own is not None:
            other = package_of(name)
            # `compt` itself only offers what compt.api has, and imports it when a name is used.
            if other is not None and other > own and path != "compt/__init__.py":
                yield f"{path}:{line}: imports {name}, whose package comes after its own"
        for package, places in ONLY_IN.items():
            if f"{name}.".startswith(f"{package}.") and not any(fnmatch.fnmatch(path, place) for place in places):
                yield f"{path}:{line}: {package} is imported only in {', '.join(places)}"
        if name in ("torch.load", "torch.serialization.load"):
            yield f"{path}:{line}: torch.load unpickles: use safetensors"
        if name.split(".")[0] in ("pickle", "_pickle", "dill", "joblib", "cloudpickle") and path != PICKLES:
            yield f"{path}:{line}: {name} unpickles: use compt.weights.pickles"


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
    if lines < SMALL and path not in SMALLER and not path.endswith(("/__init__.py", "/__main__.py")):
        yield f"{path}: {lines} lines: put them where they are used, or give a reason in SMALLER"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.start[0] for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > SILENT_LINES and not any(node.lineno <= line < node.lineno + lines for line in comments):
                yield f"{path}:{node.lineno}: {node.name}() has {lines} lines and no comment that says why"
            if lines > FUNCTION_LINES and f"{path}::{node.name}" not in LONGER:
                yield f"{path}:{node.lineno}: {node.name}() has {lines} lines, {FUNCTION_LINES} at most"


def wrong_face(path: str, tree: ast.Module) -> Iterator[str]:
    """The face of a package is one docstring: what it imports would be loaded by every module of the package."""
    if path.endswith("/__init__.py") and path not in FACES_WITH_CODE:
        if ast.get_docstring(tree) is None:
            yield f"{path}: says nothing about its package"
        if len(tree.body) > 1:
            yield f"{path}:{tree.body[1].lineno}: code in the face of a package"
    if path.endswith("/__init__.py"):
        for name in top_level_imports(tree):
            if name.split(".")[0] == "compt":
                yield f"{path}: imports {name}"


def violations(path: str, source: str) -> list[str]:
    tree = ast.parse(source, path)
    return [
        *wrong_imports(path, tree),
        *wrong_calls(path, tree),
        *wrong_sizes(path, source, tree),
        *wrong_face(path, tree),
    ]


def wrong_names(paths: list[str]) -> list[str]:
    """Files `a_b.py` beside `a.py`, which are a folder or one file."""
    here = set(paths)
    found = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        words = name.removesuffix(".py").split("_")
        shorter = [f"{folder}/{'_'.join(words[:n])}.py" for n in range(1, len(words))]
        found += [f"{path} beside {other}" for other in shorter if other in here and words[0]]
    return found


def repeated_classes(trees: Mapping[str, ast.Module]) -> list[str]:
    """Class names that more than one module defines: two meanings of one word."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(path)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(places.items()) if len(paths) > 1]


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


def test_every_package_is_in_the_order() -> None:
    found = {module.split(".")[1] for module in MODULES if "." in module}
    assert found == set(PACKAGES)


def test_no_import_rings() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        # `compt.models` within `compt.models.clip` means the package's own __init__: Python has run it by then.
        targets = {resolved(name) for _, name in imports(tree_of(path))}
        graph[module_of(path)] = {name for name in targets & MODULES if not module_of(path).startswith(f"{name}.")}
    assert rings(graph) == []


def test_no_two_names_for_one_place() -> None:
    assert wrong_names(SOURCES) == []


def test_a_class_name_is_defined_once() -> None:
    assert repeated_classes({path: tree_of(path) for path in SOURCES}) == []


def test_light_modules_stay_light() -> None:
    heavy = heavy_modules({module_of(path): tree_of(path) for path in SOURCES})
    light = [module for module in MODULES if any(fnmatch.fnmatch(module, place) for place in LIGHT)]
    assert {module: heavy[module] for module in light if module in heavy} == {}
    unused = [place for place in LIGHT if not fnmatch.filter(MODULES, place)]
    assert unused == []


def test_a_light_command_line_really_loads_no_torch() -> None:
    """The reading of the source, compared with what Python imports."""
    code = f"import sys, compt.cli.main\nheavy = {set(HEAVY)!r} & set(sys.modules)\nassert not heavy, sorted(heavy)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exceptions_exist_and_have_reasons() -> None:
    for place, reason in (LONGER | SMALLER | FACES_WITH_CODE).items():
        path, _, function = place.partition("::")
        assert reason, place
        assert path in SOURCES, place
        names = {getattr(node, "name", "") for node in ast.walk(tree_of(path))}
        assert not function or function in names, place
    for path in SMALLER:
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) < SMALL, f"{path} needs no reason any more"


ENOUGH = "x = 1\n" * SMALL


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("compt/recipe/read.py", "from compt.train.loop import train", "comes after"),
        ("compt/recipe/read.py", "from compt import train", "comes after"),
        ("compt/train/losses.py", "def f():\n    import compt.chain.run", "comes after"),
        ("compt/models/clip.py", "from . import init", "relative import"),
        ("compt/mystery/a.py", "", "not in PACKAGES"),
        ("compt/train/loop.py", "import deepspeed", "only in compt/engines/zero/*.py"),
        ("compt/data/decode.py", "from nvidia.dali import fn", "only in compt/data/dali.py"),
        ("compt/train/metrics.py", "import matplotlib.pyplot as plt", "only in compt/report"),
        ("compt/train/checkpoint.py", "import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("compt/train/checkpoint.py", "from torch import load", "torch.load"),
        ("compt/train/checkpoint.py", "from torch.serialization import load", "torch.load"),
        ("compt/weights/pickles.py", "import torch\ntorch.load('x')", "torch.load"),
        ("compt/weights/pickles.py", "import torch\ntorch.load('x', weights_only=False)", "torch.load"),
        ("compt/weights/pickles.py", "import torch\ntorch.load('x', weights_only=bool(1))", "torch.load"),
        ("compt/weights/pickles.py", "import torch\nread = torch.load\nread('x')", "torch.load"),
        ("compt/weights/pickles.py", "from torch import load", "torch.load"),
        ("compt/weights/pickles.py", "import pickle\npickle.load(open('x', 'rb'))", "runs what the file says"),
        ("compt/weights/dcp.py", "import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("compt/weights/dcp.py", "import pickle", "unpickles"),
        ("compt/train/loop.py", "print('x')", "print()"),
        ("compt/train/loop.py", "def f():\n    raise NotImplementedError", "NotImplementedError"),
        ("compt/train/loop.py", "x = 1\n" * FILE_LINES, "lines"),
        ("compt/train/loop.py", "def f():\n" + "    x = 1\n" * FUNCTION_LINES, "f() has"),
        ("compt/train/__init__.py", '"""Doc."""\nfrom compt.train.loop import train', "face of a package"),
        ("compt/train/__init__.py", "", "says nothing"),
        ("compt/models/__init__.py", "from compt.models.clip import build", "imports compt.models.clip.build"),
    ],
)
def test_the_checker_reports(path: str, source: str, message: str) -> None:
    found = violations(path, f"{source}\n{ENOUGH}" if not path.endswith("__init__.py") else source)
    assert any(message in line for line in found), found


def test_the_checker_reports_a_small_file() -> None:
    assert violations("compt/train/loop.py", "x = 1\n") != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("compt/chain/run.py", "import compt.train.loop\nfrom compt import __version__"),
        ("compt/models/clip.py", "from compt.models.init import init_parameters"),
        ("compt/engines/zero/engine.py", "import deepspeed"),
        ("compt/weights/pickles.py", "import pickle, torch\ntorch.load('x', mmap=True, weights_only=True)"),
        ("compt/report/figures.py", "import matplotlib.pyplot as plt\nprint('x')"),
        ("compt/train/losses.py", "import torch\nimport deepspeed_like\ntorch.save({}, 'x')"),
    ],
)
def test_the_checker_lets_pass(path: str, source: str) -> None:
    assert violations(path, f"{source}\n{ENOUGH}") == []


def test_the_ring_finder() -> None:
    assert rings({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


def test_the_search_for_heavy_modules() -> None:
    sources = {
        "compt": "",
        "compt.a": "def f():\n    import torch",
        "compt.b": "if TYPE_CHECKING:\n    import torch\nelse:\n    x = 1",
        "compt.c": "from compt.d import thing",
        "compt.d": "try:\n    import torch\nexcept ImportError:\n    pass",
        "compt.e": "from compt import c",
        "compt.f": "import timm.layers",
        "compt.f.g": "x = 1",
    }
    found = heavy_modules({module: ast.parse(source) for module, source in sources.items()})
    assert set(found) == {"compt.c", "compt.d", "compt.e", "compt.f", "compt.f.g"}


def test_the_search_for_names() -> None:
    assert wrong_names(["compt/a/b.py", "compt/a/b_c.py", "compt/b_c.py"]) == ["compt/a/b_c.py beside compt/a/b.py"]
    classes = {"one": ast.parse("class A: ..."), "two": ast.parse("class _A: ...\nclass B: ...")}
    assert repeated_classes(classes) == ["A: one, two"]
