"""The files around the code: the package, the targets of make, what CI runs, and words that no file may contain."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import compt

PINS = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9._+]+)$", re.MULTILINE)
CALLED_BY_PEOPLE = ("help", "demo", "test", "lint", "type", "fresh-check", "clean")
# What no module of compt imports, and who uses it.
BEHIND = {
    "accelerate": "people, who start launchers/train.py with it",
    "compt": "the extras that join others",
    "deepspeed": "the tests, which write with it the folders that compt.weights reads",
    "nvidia-dali-cuda120": "compt.data.dali, where it is installed",
    "nvidia-dali-cuda130": "compt.data.dali, where it is installed",
    "mlflow-skinny": "compt.train.loggers, where it is installed",
    "wandb": "compt.train.loggers, where it is installed",
    "onnx": "torch.onnx, which compt.export.programs calls",
    "onnxscript": "torch.onnx, which compt.export.programs calls",
    "obstore": "compt.data.stores, where it is installed",
    "tensorboard": "torch.utils.tensorboard",
    "timm": "open_clip, for the Swins",
}
# Written in parts, so that this file does not contain these words itself.
HOSTS = [
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("npmjs", "org"),
    ("npmjs", "com"),
    ("deb.debian", "org"),
    ("download.pytorch", "org"),
]
FORBIDDEN = ["/" + "work/", ".." + "/shared", *(".".join(host) for host in HOSTS)]


def pins(path: Path) -> dict[str, str]:
    return {name.lower().replace("_", "-"): version for name, version in PINS.findall(path.read_text(encoding="utf-8"))}


def project(root: Path) -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "EXTRAS", "CONSTRAINTS"}  # of a make that started the tests
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    return subprocess.run(["make", *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_make_help_lists_the_targets(root: Path) -> None:
    shown = make(root, "help")
    assert shown.returncode == 0, shown.stderr
    for target in CALLED_BY_PEOPLE:
        assert re.search(rf"^  make {target} +\S", shown.stdout, re.MULTILINE), target


def test_make_names_a_missing_python_in_one_line(root: Path) -> None:
    done = make(root, "venv", "PYTHON=/nowhere/python3", "MADE_FROM=nothing")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(lines) == 1
    assert lines[0].startswith("make venv needs python 3.11")


def test_an_environment_remembers_what_it_was_made_with(root: Path, tmp_path: Path) -> None:
    """Otherwise the next command would replace the packages for a CUDA 12 driver."""
    for name in ("Makefile", "pyproject.toml", "setup.py", *(path.name for path in root.glob("constraints*.txt"))):
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()

    def planned(*words: str) -> str:
        return make(tmp_path, "--dry-run", "test", "PYTHON=python3", *words).stdout

    def remember(*words: str) -> None:
        lines = planned(*words).splitlines()
        at, pip = (next(at for at, line in enumerate(lines) if word in line) for word in ("printf", "pip --log"))
        assert at < pip, "an installation that fails does not forget it"
        subprocess.run(lines[at], shell=True, cwd=tmp_path, check=True)

    assert "-c constraints.txt -e '.[dev,data," in planned()
    remember("CONSTRAINTS=constraints-cu12.txt")
    assert "-c constraints-cu12.txt -e '.[dev,data," in planned()
    remember("CONSTRAINTS=constraints.txt")
    assert "-c constraints.txt -e '.[dev,data," in planned()


def test_setup_py_is_thin(root: Path) -> None:
    lines = [line for line in (root / "setup.py").read_text(encoding="utf-8").splitlines() if line]
    assert lines[1:] == ["from setuptools import setup", "setup()"]


def test_folders_of_the_package_are_shown_at_the_top(root: Path) -> None:
    """Links, so that there is one copy of each file."""
    for name in ("recipes", "ds_configs", "slurm"):
        assert (root / name).readlink() == Path("compt", name)
        assert list((root / name).iterdir())


def test_extras_and_console_script(root: Path) -> None:
    table = project(root)
    single = {
        "accelerate",
        "browser",
        "dali-cuda12",
        "dali-cuda13",
        "data",
        "deepspeed",
        "dev",
        "interop",
        "mlflow",
        "onnx",
        "parquet",
        "remote",
        "tiled",
        "wandb",
    }
    assert set(table["optional-dependencies"]) == single | {"cluster", "test-all"}
    assert table["optional-dependencies"]["test-all"] == [f"compt[{','.join(sorted(single - {'dali-cuda12'}))}]"]
    assert table["scripts"] == {"compt": "compt.cli.main:run"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", compt.__version__)


@pytest.mark.parametrize(
    ("file", "versions"),
    [
        ("constraints.txt", {"torch": "2.11.0", "torchvision": "0.26.0", "nvidia-nccl-cu13": None}),
        ("constraints-cu12.txt", {"torch": "2.10.0", "torchvision": "0.25.0", "nvidia-nccl-cu12": None}),
    ],
)
def test_constraints_pin_what_is_installed(root: Path, file: str, versions: dict[str, str | None]) -> None:
    pinned = pins(root / file)
    for name, version in versions.items():
        assert name in pinned
        assert version is None or pinned[name] == version
    lines = [line for line in (root / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) == len(pinned), "a line is not NAME==VERSION, or stands twice"
    table = project(root)
    wanted = [*table["dependencies"], *itertools.chain(*table["optional-dependencies"].values())]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    dali = {"nvidia-dali-cuda120", "nvidia-dali-cuda130"}
    assert names - dali - {"compt"} <= set(pinned)
    assert dali & set(pinned) == {"nvidia-dali-cuda120" if "cu12" in file else "nvidia-dali-cuda130"}


def test_the_wheel_holds_every_file_of_the_package(root: Path) -> None:
    tools = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed = subprocess.run(["git", "ls-files", "-z", "compt"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name.removeprefix("compt/") for name in listed.stdout.split("\0") if name and not name.endswith(".py")]
    missing = [name for name in names if not any(fnmatch(name, place) for place in tools["package-data"]["compt"])]
    assert names
    assert missing == []


@pytest.mark.parametrize("number", ["0.48145466", "0.26862954"])
def test_the_statistics_of_openai_stand_in_one_place(root: Path, number: str) -> None:
    found = [path.name for path in (root / "compt").rglob("*.py") if number in path.read_text(encoding="utf-8")]
    assert found == ["presets.py"]


def test_every_dependency_is_imported(root: Path) -> None:
    table = project(root)
    imported = set()
    for path in [*(root / "compt").rglob("*.py"), root / "sample" / "emoji" / "render.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":  # render.py's
                imported |= {word.value.split(".")[0] for word in node.args[:1] if isinstance(word, ast.Constant)}
    providers = {
        name.lower().replace("_", "-")
        for module, names in packages_distributions().items()
        if module in imported
        for name in names
    }
    extras = [
        packages
        for extra, packages in table["optional-dependencies"].items()
        if extra not in ("browser", "dev", "interop")
    ]
    for requirement in itertools.chain(table["dependencies"], *extras):
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")
        assert name in providers or name in BEHIND, f"{name} is installed, but imported nowhere"


def test_ci_runs_what_people_run(root: Path) -> None:
    script = (root / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert os.access(root / ".ci" / "run", os.X_OK)
    for command in ("make lint type", "make test"):
        assert re.search(rf"^(timeout [^\n]*)?{command}$", script, re.MULTILINE), command


def test_precommit_hooks_are_local(root: Path) -> None:
    import yaml

    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]


def test_no_file_names_a_place_that_only_its_author_has(root: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = root / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_no_folder_of_tests_is_passed_over(root: Path, pytestconfig: pytest.Config) -> None:
    """pytest looks into no folder called "dist" unless it is told to."""
    folders = {part for path in (root / "tests").rglob("test_*.py") for part in path.relative_to(root).parts[:-1]}
    passed_over = [
        name for name in folders for pattern in pytestconfig.getini("norecursedirs") if fnmatch(name, pattern)
    ]
    assert "dist" in folders
    assert passed_over == []
    ruff = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert not folders & set(ruff["exclude"]), "without this list, ruff passes over every folder called dist"
