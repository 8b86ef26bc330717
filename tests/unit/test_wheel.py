"""The wheel and the sdist: what they hold, and the README's main path with the wheel in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

BUILT_FROM = ("compt", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")
FEW = "{steps: 2}"
SHORT = (
    *("--set", f"chain.links.0.train={FEW}", "--set", "chain.links.0.warmup.steps=1"),
    *("--set", f"chain.links.1.train={FEW}", "--set", "chain.links.1.warmup.steps=1"),
    *("--set", f"chain.links.2.train={FEW}", "--set", "chain.links.2.warmup.steps=1"),
    # The smallest test set: 184 images.
    *("--set", "evaluation.sets=[{name: test_style, data: data/emoji/test_concepts/*.tar}]"),
)


def built(code: str, folder: Path) -> Path:
    """What setuptools builds in a folder, with the packages of this environment."""
    command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{code}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz")))


@pytest.fixture(scope="module")
def files(root: Path) -> list[str]:
    """The committed files that belong into both."""
    command = ["git", "ls-files", "-z", *BUILT_FROM]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (root / name).exists()]


@pytest.fixture(scope="module")
def packages(root: Path, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the committed files, and the wheel that is built from the sdist alone."""
    folder = tmp_path_factory.mktemp("packages")
    for name in files:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / "copy" / name)
    sdist = built("build_sdist('.')", folder / "copy").rename(folder / "compt.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    wheel = built("build_wheel('.')", source)
    wheel = wheel.rename(folder / wheel.name)
    # Nothing may need what they were built from.
    shutil.rmtree(folder / "copy")
    shutil.rmtree(folder / "unpacked")
    return sdist, wheel


@dataclass(frozen=True)
class Installed:
    """A new environment with the wheel, and an empty folder to work in."""

    python: Path
    folder: Path

    def run(self, *words: str) -> str:
        """What a command of the environment prints."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMPT", "COVERAGE"))}
        environment = {**own, "PATH": f"{self.python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("stranger")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    # The new environment sees the other packages, but no .pth file among them: an editable compt is one.
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", str(packages[1])], check=True)
    (folder / "empty").mkdir()
    return Installed(python, folder / "empty")


@pytest.mark.slow
def test_both_hold_every_file_of_the_package(packages: tuple[Path, Path], files: list[str]) -> None:
    with tarfile.open(packages[0]) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(packages[1]) as archive:
        packed = set(archive.namelist())
    assert set(files) - source == set()
    assert {name for name in files if name.startswith("compt/")} - packed == set()
    assert not [name for name in packed if name.split("/")[0] not in ("compt",) and ".dist-info/" not in name]
    assert {"compt/slurm/link.sbatch", "compt/drawings/data/noto.webp", "compt/ds_configs/zero2_offload.json"} <= packed
    # The licences of the drawings travel with the metadata too.
    assert [name for name in packed if name.endswith("licenses/compt/drawings/data/licences/CC-BY-SA-4.0.txt")]


@pytest.mark.slow
def test_the_readme_s_main_path_works_in_an_empty_folder(installed: Installed) -> None:
    """A demo of two steps a model, its scores, and a chain on two processes."""
    run = installed.run
    place = Path(run("python", "-c", "import compt; print(compt.__file__)").strip())
    assert installed.python.parents[1] in place.parents
    assert "compt" in run("compt", "--help")
    assert "cc3m_vit_7" in run("compt", "recipes", "list")
    assert "vit_l16" in run("compt", "recipes", "show", "cc3m_vit")
    assert "vit_l16" in run("compt", "plan", "cc3m_vit", "--gpus", "8", "--kind", "a100-80")
    shown = run("compt", "demo", *SHORT)
    assert re.search(r"^3-vit_mini +\d\.\d", shown, re.MULTILINE), shown
    # What docs/wheel.md shows: costs of the chain, and what the demo has no time to compare with.
    assert re.search(r"^Model +MACs so far +Time so far", shown, re.MULTILINE), shown
    assert re.search(r"^3-vit_mini +vit_mini, chain's MACs .* not run$", shown, re.MULTILINE), shown
    assert (installed.folder / "runs" / "demo" / "report.html").is_file()
    scored = run("compt", "eval", "runs/demo/jobs/3-vit_mini/model", "--data", "data/emoji/test_concepts/*.tar")
    assert re.search(r"\b184\b", scored), scored
    assert run("compt", "slurm", "copy") == "Wrote slurm\n"
    assert "slurm/link.sbatch" in run("compt", "slurm", "submit", "cc3m_vit", "--set", "evaluation=null")
    # torchrun is this module; the script of that name belongs to the environment that has torch.
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one = "chain.links=[{model: vit_nano, train: {steps: 2}, warmup: {steps: 1}}]"
    words = ("-m", "compt", "chain", "demo", "--run-folder", "runs/two", "--set", one, "--set", "evaluation=null")
    assert "1-vit_nano" in run("compt", "launch", *torchrun, *words)
    assert sorted(path.name for path in installed.folder.iterdir()) == ["data", "runs", "slurm"]
