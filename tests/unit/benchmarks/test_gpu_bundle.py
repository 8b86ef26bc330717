"""The bundle for GPU machines without a network: what goes into it, that parts join again, what is said otherwise."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from benchmarks.gpu import bundle as gpu_bundle
from benchmarks.gpu import offline as gpu_bundle_run
from benchmarks.gpu.bundle import closure, expected, pack, read_present, required

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def bundle(tmp_path: Path) -> dict[str, Any]:
    """Three wheels, of which one is optional and has to be cut up, in parts of 1000 bytes."""
    wheels = []
    for name, size in (("a.whl", 400), ("b.whl", 700), ("dali.whl", 2500)):
        (tmp_path / name).write_bytes(os.urandom(size))
        wheels.append(tmp_path / name)
    records, parts = pack(wheels, tmp_path / "bundle", 1000) if (tmp_path / "bundle").mkdir() is None else ([], 0)
    assert parts == 5
    return {"wheels": [{**record, "optional": record["wheel"] == "dali.whl"} for record in records]}


def test_parts_stay_below_their_limit_and_join_bit_for_bit(tmp_path: Path, bundle: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    sizes = {part.name: sum(path.stat().st_size for path in part.iterdir()) for part in folder.iterdir()}
    assert sorted(sizes) == [f"part-{at:02}" for at in range(1, 6)]
    assert max(sizes.values()) <= 1000
    assert sum(sizes.values()) == 3600
    assert gpu_bundle_run.join(folder, bundle, tmp_path / "out") == []
    for name in ("a.whl", "b.whl", "dali.whl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    # What was joined once is not read again.
    before = (tmp_path / "out" / "dali.whl").stat().st_mtime_ns
    gpu_bundle_run.join(folder, bundle, tmp_path / "out")
    assert (tmp_path / "out" / "dali.whl").stat().st_mtime_ns == before


def test_a_damaged_part_is_named(tmp_path: Path, bundle: dict[str, Any]) -> None:
    piece = tmp_path / "bundle" / "part-04" / "dali.whl.02"
    content = bytearray(piece.read_bytes())
    content[17] ^= 1
    piece.write_bytes(content)
    with pytest.raises(gpu_bundle_run.BundleError, match=r"part-04/dali\.whl\.02 is damaged") as error:
        gpu_bundle_run.join(tmp_path / "bundle", bundle, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_only_optional_wheels_may_be_missing(tmp_path: Path, bundle: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    away = folder / "part-04" / "dali.whl.02"
    away.rename(tmp_path / "later")
    left = gpu_bundle_run.join(folder, bundle, tmp_path / "out")
    assert left == ["dali.whl (without part-04/dali.whl.02)"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.whl", "b.whl"]
    (tmp_path / "later").rename(away)
    assert gpu_bundle_run.join(folder, bundle, tmp_path / "out") == []
    assert (tmp_path / "out" / "dali.whl").read_bytes() == (tmp_path / "dali.whl").read_bytes()
    (folder / "part-01" / "a.whl").unlink()
    with pytest.raises(gpu_bundle_run.BundleError, match=r"part-01/a\.whl is missing: copy that part here too"):
        gpu_bundle_run.join(folder, bundle, tmp_path / "out")


def test_everything_but_torch_is_in_the_bundle() -> None:
    found = closure(required(), PYTHON, {})
    assert {"open-clip-torch", "timm", "deepspeed", "pydantic-core", "ninja", "webdataset", "pytest"} <= set(found)
    assert not [name for name in found if re.match(r"torch|nvidia|triton|cuda", name)]
    assert found["timm"] == importlib.metadata.version("timm")
    assert sorted(re.split("[><=]", text)[0] for text in expected()) == ["torch", "torchvision"]


def test_packages_on_the_machine_are_left_out(tmp_path: Path) -> None:
    present = tmp_path / "machine.txt"
    present.write_text("numpy==2.5.2\ntimm==1.0.1\nPillow==13.0.0\n-e git+somewhere\n")
    versions = read_present(present)
    assert versions == {"numpy": "2.5.2", "timm": "1.0.1", "pillow": "13.0.0"}
    found = closure(required(), PYTHON, versions)
    assert not {"numpy", "pillow"} & set(found)
    assert "timm" in found  # too old there
    present.write_text("Package Version\n")
    with pytest.raises(gpu_bundle.BundleError, match=r"machine\.txt: has no line NAME==VERSION"):
        read_present(present)
    with pytest.raises(gpu_bundle.BundleError, match="no-such-package>=1 is not installed here"):
        closure(["no-such-package>=1"], PYTHON, {})


def test_a_wrong_python_or_missing_torch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        gpu_bundle_run.BundleError, match=rf"this is python {PYTHON}, the bundle is for 3\.9: make gpu-bundle"
    ):
        gpu_bundle_run.check_machine({"python": "3.9", "expected": expected()})
    monkeypatch.setattr(gpu_bundle_run.sys, "executable", "/bin/false")
    with pytest.raises(gpu_bundle_run.BundleError, match=r"/bin/false has to have torch>=2\.10, torchvision>=0\.25"):
        gpu_bundle_run.check_machine({"python": PYTHON, "expected": expected()})


@pytest.mark.parametrize(
    ("torch", "torchvision", "told"),
    [
        ("2.10.0+cu126", "0.25.0", None),
        ("2.11.0a0+git1234", "0.26.0a0", None),
        ("2.9.1+cu128", "0.25.0", "torch 2.9.1+cu128, and has to have torch>=2.10"),
        ("2.10.0", "0.24.1", "torchvision 0.24.1, and has to have torchvision>=0.25"),
    ],
)
def test_a_torch_that_is_too_old_is_one_line(
    torch: str, torchvision: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {torch} {torchvision} True\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_bundle_run.sys, "executable", str(python))
    bundle = {"python": PYTHON, "expected": ["torch>=2.10", "torchvision>=0.25"]}
    if told is None:
        gpu_bundle_run.check_machine(bundle)
    else:
        with pytest.raises(gpu_bundle_run.BundleError, match=re.escape(told)):
            gpu_bundle_run.check_machine(bundle)


def machine(folder: Path) -> Path:
    """A python that has torch and what comes with it, by links to this one's, and pip, but nothing else."""
    needs = [*(importlib.metadata.requires("torch") or []), *(importlib.metadata.requires("torchvision") or [])]
    has = {"pip", *closure(needs, PYTHON, {})}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = folder / "lib" / f"python{PYTHON}" / "site-packages"
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if gpu_bundle._expected(name) or name in has:
            tops = {Path(str(file)).parts[0] for file in distribution.files or []} - {".."}
            for top in tops:
                if not (site / top).exists():
                    (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def test_a_bundle_finds_the_checkout_it_lies_in(root: Path, tmp_path: Path) -> None:
    assert gpu_bundle_run.checkout_of(root / "build" / "gpu-bundle", None) == root
    assert gpu_bundle_run.checkout_of(tmp_path, root) == root
    with pytest.raises(gpu_bundle_run.BundleError, match="name it with --source"):
        gpu_bundle_run.checkout_of(root, tmp_path)


@pytest.mark.full
def test_the_suite_runs_from_a_bundle_where_only_torch_is_installed(root: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    words = ["-m", "benchmarks.gpu.bundle", "--out", str(place), "--python", PYTHON]
    made = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, check=False)
    if "pip download failed" in made.stderr:
        pytest.skip(f"no package index: {made.stderr}")
    assert made.returncode == 0, made.stderr
    for part in place.glob("part-*"):
        assert sum(path.stat().st_size for path in part.iterdir()) <= 40 * 2**20
    python = machine(tmp_path / "machine")
    environment = {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert "No module named" in run("-c", f"import sys; sys.path.insert(0, '{root}'); import compt.models.clip").stderr
    out = tmp_path / "found.json"
    suite = ["--device", "cpu", "--out", str(out), "--only", "check/arithmetic"]
    done = run(str(place / "run.py"), "--source", str(root), "--", *suite)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "check/arithmetic: passed" in done.stdout
    assert json.loads(out.read_text())["gpu_suite"][0]["passed"]
    env = tmp_path / "gpu-env" / "bin" / "python"
    code = "import torch, open_clip, deepspeed, webdataset; print(torch.__file__); print(open_clip.__file__)"
    shown = subprocess.run([str(env), "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    torch_file, open_clip_file = shown.split()[-2:]
    assert torch_file.startswith(str(tmp_path / "machine"))
    assert open_clip_file.startswith(str(tmp_path / "gpu-env"))
    wheel = max((place / "part-01").iterdir(), key=lambda path: path.stat().st_size)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    broken = run(str(place / "run.py"), "--source", str(root))
    assert broken.returncode == 1
    assert len(broken.stderr.splitlines()) == 1
    assert f"{wheel.name} is damaged" in broken.stderr


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ((), None),
        (("--dali",), "nvidia-dali-cuda130"),
        (("--dali", "13"), "nvidia-dali-cuda130"),
        (("--dali", "12"), "nvidia-dali-cuda120"),
    ],
)
def test_dali_is_that_of_the_driver(
    words: tuple[str, ...], package: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def make(out: Path, python: str, present: object, dali: str | None) -> dict[str, object]:
        asked.append(dali)
        return {"python": python}

    monkeypatch.setattr(gpu_bundle, "make", make)
    assert gpu_bundle.main(["--out", str(tmp_path), *words]) == 0
    assert asked == [package]
