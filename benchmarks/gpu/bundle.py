"""`make gpu-bundle`: pack wheels for a GPU machine without a network, in parts that can be copied one by one.

It writes `run.py`, `bundle.json` and folders `part-01`, `part-02`, … of at most 40 MiB each to `build/gpu-bundle`. A
larger wheel (DALI's) is split into slices. The machine must have torch, torchvision and their dependencies.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "gpu-bundle"
PART_BYTES = 40 * 2**20
EXPECTED = re.compile(r"torch|torchvision|triton|nvidia-(?!dali|nvimgcodec|nvjpeg2k|nvtiff|libnvcomp).*|cuda-.*")
"""Packages that the GPU machine must have, in builds that fit its driver."""
TOOLS = ("deepspeed>=0.16", "webdataset>=0.2.86", "pytest>=8.2", "hypothesis>=6.100")
"""Packages besides the project's dependencies: an engine, and imports of the GPU tests."""
DALI = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}
"""NVIDIA DALI's package, by the CUDA of the machine's driver."""
SOURCES = ("deepspeed",)
"""Packages without wheels on PyPI. They are built here, and contain no compiled code."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


class BundleError(Exception):
    """The bundle cannot be made; the message says why."""


def read_present(path: Path) -> dict[str, str]:
    """Versions by name, from what `pip list --format=freeze` printed on the machine."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, equal, version = line.strip().partition("==")
        if equal:
            found[canonicalize_name(name)] = version
    if not found:
        raise BundleError(f"{path}: has no line NAME==VERSION; it should be the output of pip list --format=freeze")
    return found


def required() -> list[str]:
    """The requirements of the package and its GPU tests, without those that the machine must have."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [text for text in (*table["dependencies"], *TOOLS) if not _expected(Requirement(text).name)]


def expected() -> list[str]:
    """The requirements that the machine must already meet."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [text for text in table["dependencies"] if _expected(Requirement(text).name)]


def _expected(name: str) -> bool:
    return EXPECTED.fullmatch(canonicalize_name(name)) is not None


def closure(requirements: Iterable[str], python: str, present: Mapping[str, str]) -> dict[str, str]:
    """Names and versions of `requirements` and all their dependencies, as installed here, without those in `present`.

    `python` is the machine's version, such as 3.12. Raises BundleError for a package that is not installed here.
    """
    markers = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    markers |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    found: dict[str, str] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(markers):
            continue
        there = present.get(name)
        if name in found or _expected(name) or (there and requirement.specifier.contains(there, prereleases=True)):
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise BundleError(
                f"{requirement} is not installed here: make the bundle in the project's environment"
            ) from None
        found[name] = distribution.version
        waiting += [Requirement(text) for text in distribution.requires or []]
    return dict(sorted(found.items()))


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise BundleError(f"pip {words[0]} failed: {lines[-1] if lines else done.returncode}")


def _for(python: str) -> list[str]:
    words = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return words + [word for platform in PLATFORMS for word in ("--platform", platform)]


def fetch(packages: Mapping[str, str], python: str, folder: Path) -> None:
    """Download wheels of exactly these packages for the machine's Python into `folder`."""
    built = [name for name in packages if name in SOURCES]
    if ready := [f"{name}=={version}" for name, version in packages.items() if name not in built]:
        _pip("download", "-q", "--no-deps", *_for(python), "-d", str(folder), *ready)
    for name in built:
        _pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), f"{name}=={packages[name]}")


def fetch_dali(name: str, packages: Mapping[str, str], python: str, folder: Path, known: Iterable[str]) -> list[Path]:
    """DALI's wheel and its dependencies that are not in `packages` or `known`. DALI's, the largest, is last."""
    with tempfile.TemporaryDirectory() as place:
        same = Path(place) / "same.txt"
        same.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()), encoding="utf-8")
        _pip("download", "-q", *_for(python), "-c", str(same), "-d", place, name)
        there = {canonicalize_name(name) for name in (*packages, *known)}
        wheels = [path for path in Path(place).glob("*.whl") if canonicalize_name(path.name.split("-")[0]) not in there]
        moved = [Path(shutil.move(path, folder / path.name)) for path in wheels]
    return sorted(moved, key=lambda path: path.stat().st_size)


def sha256(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slices_of(path: Path, most: int) -> list[tuple[str, int, int]]:
    """Name, start and end of a file's pieces of at most `most` bytes. A single piece keeps the file's name."""
    size = path.stat().st_size
    if size <= most:
        return [(path.name, 0, size)]
    return [
        (f"{path.name}.{at + 1:02}", start, min(size, start + most)) for at, start in enumerate(range(0, size, most))
    ]


def pack(wheels: Sequence[Path], folder: Path, most: int = PART_BYTES) -> tuple[list[dict[str, object]], int]:
    """Distribute wheels, or slices of them, over parts of at most `most` bytes, in this order.

    Returns a record for each wheel, and how many parts there are.
    """
    records: list[dict[str, object]] = []
    part, filled = 1, 0
    for wheel in wheels:
        pieces = []
        whole = wheel.read_bytes()
        for name, start, end in slices_of(wheel, most):
            if filled and filled + end - start > most:
                part, filled = part + 1, 0
            filled += end - start
            path = folder / f"part-{part:02}" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole[start:end])
            pieces.append({"file": f"{path.parent.name}/{name}", "sha256": sha256(path)})
        records.append({"wheel": wheel.name, "sha256": sha256(wheel), "pieces": pieces})
    return records, part


def make(out: Path, python: str, present: Mapping[str, str], dali: str | None) -> dict[str, object]:
    """Make the bundle in `out`, replacing it, with the package `dali`; returns the content of `bundle.json`."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        packages = closure(required(), python, present)
        fetch(packages, python, place)
        core = sorted(place.glob("*.whl"), key=lambda path: path.stat().st_size)
        more = fetch_dali(dali, packages, python, place, present) if dali else []
        made = out.with_name(f".{out.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        records, parts = pack([*core, *more], made)
        optional = {path.name for path in more}
        value: dict[str, object] = {
            "python": python,
            "parts": parts,
            "expected": expected(),
            "requirements": required(),
            "optional": [dali] if dali else [],
            "wheels": [{**record, "optional": record["wheel"] in optional} for record in records],
        }
        (made / "bundle.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        shutil.copy(Path(__file__).with_name("offline.py"), made / "run.py")
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return value


def shown(path: Path) -> Path:
    """The path relative to the checkout, if it is inside."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_bundle", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python version (default 3.12)")
    parser.add_argument("--present", type=Path, help="leave out packages in this output of pip list --format=freeze")
    parser.add_argument(
        "--dali",
        nargs="?",
        const="13",
        choices=tuple(DALI),
        help="add NVIDIA DALI for this CUDA (default 13), in slices",
    )
    options = parser.parse_args(argv)
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python {options.python}: should be a version such as 3.12")
    try:
        present = read_present(options.present) if options.present else {}
        made = make(options.out, options.python, present, DALI.get(options.dali))
    except (BundleError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for part in sorted(options.out.glob("part-*")):
        files = list(part.iterdir())
        print(f"{part}: {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB, {len(files)} files")
    print(f"For python {made['python']} with {', '.join(expected())}.")
    print(f"There, in the checkout: python3 {shown(options.out)}/run.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
