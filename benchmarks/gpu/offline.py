"""On a GPU machine without a network, install this folder's wheels beside the machine's torch and run the suite.

python3 build/gpu-bundle/run.py                     # install, then run benchmarks.gpu.suite; run it again to continue
python3 build/gpu-bundle/run.py --tests             # install, then run pytest tests/gpu
python3 build/gpu-bundle/run.py -- --only 'check/*' # arguments after -- go to the suite or to pytest
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
    """Something is wrong with the bundle or the machine; the message is one line."""


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def join(folder: Path, bundle: dict[str, Any], into: Path) -> list[str]:
    """Check the pieces and join them to wheels in `into`; returns the names of incomplete optional wheels.

    Raises BundleError for a damaged piece, or a missing piece of a required wheel.
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
            raise BundleError(f"{folder / missing[0]} is missing: copy that part here too")
        for piece in record["pieces"]:
            if _hash(folder / piece["file"]) != piece["sha256"]:
                raise BundleError(f"{folder / piece['file']} is damaged (wrong SHA-256): copy that part again")
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
    """Raises BundleError if this Python has the wrong version for the wheels, or no torch that is new enough."""
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
    """Make a virtual environment `env` on top of the running one; returns its Python.

    `--system-site-packages` would show the packages of the base Python, not those of a running virtual environment.
    """
    python = env / "bin" / "python"
    if not python.is_file():
        venv.create(env, system_site_packages=True, with_pip=False, clear=True)
    # The scheme of the running Python may be another, as Debian's own `local/lib/python3/dist-packages`.
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(env), "platbase": str(env)}))
    below = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "below.pth").write_text("\n".join(below) + "\n", encoding="utf-8")
    return python


def _pip(python: Path, wheels: Path, wanted: list[str]) -> str:
    """Install only from `wheels`; returns the error, or an empty string."""
    words = ["install", "-q", "--no-index", "--disable-pip-version-check", "--find-links", str(wheels), *wanted]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(
        [str(python), "-m", "pip", *words], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["?"]
    return lines[0] if done.returncode else ""


def install(folder: Path, env: Path, deps: bool = True) -> Path:
    """Install missing packages (without `deps`: every wheel) for the running Python. Returns the Python to use."""
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
    """The checkout to run in: the given one, else the nearest above the bundle or the working folder."""
    for place in [given] if given else [*folder.parents, Path.cwd()]:
        if (place / "benchmarks" / "gpu" / "suite.py").is_file():
            return place.resolve()
    raise BundleError(f"{given or folder}: no checkout of the project is here or above; name it with --source")


def main(argv: list[str] | None = None) -> int:
    """The command line. The exit code is that of the suite or of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, help="environment to make (default: gpu-env beside the bundle)")
    parser.add_argument("--source", type=Path, help="the checkout (default: the one that contains the bundle)")
    parser.add_argument("--tests", action="store_true", help="run tests/gpu instead of the suite")
    parser.add_argument(
        "--no-deps", action="store_true", help="install every wheel of the bundle, even over installed packages"
    )
    parser.add_argument("--only-install", action="store_true", help="install and stop")
    parser.add_argument("more", nargs="*", help="after --: arguments for the suite or pytest")
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
