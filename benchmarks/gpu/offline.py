"""On a GPU machine without a network: install this folder's wheels beside the machine's own torch, and run the suite.

python3 build/gpu-bundle/run.py                     # install, then benchmarks.gpu.suite; again: it goes on there
python3 build/gpu-bundle/run.py --tests             # install, then pytest tests/gpu
python3 build/gpu-bundle/run.py -- --only 'check/*' # what follows -- goes to the suite, or to pytest
"""

# Only the standard library: nothing else is there yet.
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class BundleError(Exception):
    """What is wrong with the bundle or the machine, in one line."""


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def join(folder: Path, bundle: dict[str, Any], into: Path) -> list[str]:
    """Put every whole wheel into `into`, checked; returns the names of optional ones whose pieces are not all here.

    Raises BundleError for a damaged piece, and for a missing piece of a wheel that is needed.
    """
    into.mkdir(parents=True, exist_ok=True)
    left = []
    for record in bundle["wheels"]:
        target = into / record["wheel"]
        missing = [piece["file"] for piece in record["pieces"] if not (folder / piece["file"]).is_file()]
        if missing and record["optional"]:
            left.append(f"{record['wheel']} (without {', '.join(missing)})")
            continue
        if missing:
            raise BundleError(f"{folder / missing[0]} is missing: carry that part here too")
        for piece in record["pieces"]:
            if _hash(folder / piece["file"]) != piece["sha256"]:
                raise BundleError(f"{folder / piece['file']} is damaged (its sha256 is another): carry that part again")
        if target.is_file() and _hash(target) == record["sha256"]:
            continue
        with target.open("wb") as file:
            for piece in record["pieces"]:
                with (folder / piece["file"]).open("rb") as source:
                    shutil.copyfileobj(source, file)
        if _hash(target) != record["sha256"]:
            raise BundleError(f"{target} did not come out as it was packed: is the disk full?")
    return left


def check_machine(bundle: dict[str, Any]) -> None:
    """Raises BundleError where this python cannot take the wheels, or has no torch that is new enough."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if own != bundle["python"]:
        raise BundleError(
            f"this is python {own}, the bundle is for {bundle['python']}: make gpu-bundle GPU_PYTHON={own}"
        )
    code = "import torch, torchvision; print(torch.__version__, torchvision.__version__, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        wanted = ", ".join(bundle["expected"])
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it was killed"
        raise BundleError(f"{sys.executable} has to have {wanted}: {why}")
    torch, torchvision, cuda = done.stdout.split()[-3:]
    for wanted in bundle["expected"]:
        name, _, least = wanted.partition(">=")
        found = {"torch": torch, "torchvision": torchvision}[name]
        if _numbers(found) < _numbers(least):
            raise BundleError(f"{sys.executable} has {name} {found}, and has to have {wanted}")
    print(f"{sys.executable}: python {own}, torch {torch}, torchvision {torchvision}, CUDA {cuda}", flush=True)


def _numbers(version: str) -> list[int]:
    """2.10.0a0+cu128 -> [2, 10, 0]"""
    release = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in release[0].split(".")] if release else []


def stack(env: Path) -> Path:
    """A virtual environment in `env` on top of the one that runs this; returns its python.

    `--system-site-packages` would show the packages of the python that lies below, not those of a virtual environment.
    """
    python = env / "bin" / "python"
    if not python.is_file():
        venv.create(env, system_site_packages=True, with_pip=False, clear=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)}))
    below = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "below.pth").write_text("\n".join(below) + "\n", encoding="utf-8")
    return python


def _pip(python: Path, wheels: Path, wanted: list[str]) -> str:
    """Install from `wheels` alone; returns what went wrong, empty where nothing did."""
    words = ["install", "-q", "--no-index", "--disable-pip-version-check", "--find-links", str(wheels), *wanted]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(
        [str(python), "-m", "pip", *words], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["?"]
    return lines[0] if done.returncode else ""


def install(folder: Path, env: Path, deps: bool = True) -> Path:
    """Install what is missing for the python that runs this; without `deps` all wheels. Returns the python to use."""
    bundle = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    check_machine(bundle)
    wheels = env.with_name(f"{env.name}-wheels")
    left = join(folder, bundle, wheels)
    python = stack(env)
    whole = [str(wheels / record["wheel"]) for record in bundle["wheels"] if (wheels / record["wheel"]).is_file()]
    if error := _pip(python, wheels, bundle["requirements"] if deps else ["--no-deps", *whole]):
        raise BundleError(f"pip could not install the bundle: {error}; --no-deps takes all of its wheels")
    if deps and bundle["optional"] and not left and (error := _pip(python, wheels, bundle["optional"])):
        left.append(f"{', '.join(bundle['optional'])}: {error}")
    print(f"installed what was missing: {python}", flush=True)
    for name in left:
        print(f"not installed: {name}", flush=True)
    return python


def checkout_of(folder: Path, given: Path | None) -> Path:
    """The checkout that the suite runs in: the one given, else the nearest above the bundle or the working folder."""
    for place in [given] if given else [*folder.parents, Path.cwd()]:
        if (place / "benchmarks" / "gpu_suite.py").is_file():
            return place.resolve()
    raise BundleError(f"{given or folder}: no checkout of the project is here or above; name it with --source")


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code is that of what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, help="the environment to make (default: gpu-env beside the bundle)")
    parser.add_argument("--source", type=Path, help="the checkout (default: the one that the bundle lies in)")
    parser.add_argument("--tests", action="store_true", help="run tests/gpu instead of the suite")
    parser.add_argument("--no-deps", action="store_true", help="install every wheel of the bundle, whatever is there")
    parser.add_argument("--only-install", action="store_true", help="install and stop")
    parser.add_argument("more", nargs="*", help="after --: arguments of the suite, or of pytest")
    given = parser.parse_args(argv)
    try:
        python = install(HERE, (given.env or HERE.with_name("gpu-env")).resolve(), not given.no_deps)
        if given.only_install:
            return 0
        source = checkout_of(HERE, given.source)
    except (BundleError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    module = ["pytest", "-q", "tests/gpu"] if given.tests else ["benchmarks.gpu.suite"]
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(python), "-m", *module, *given.more], cwd=source, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
