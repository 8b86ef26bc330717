"""A model folder that several ranks write together appears whole or not at all, whatever happens to one of them."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compt import files
from compt.dist import collectives as dist
from compt.errors import ArtefactError, ComptError
from compt.expand.axes import parameters
from compt.models.presets import ModelSpec
from compt.weights import artefact
from compt.weights import safetensors as weight_file
from compt.weights.artefact import read_artefact, write_artefact
from tests.dist.spawn import run_ranks
from tests.unit.expand.cases import BIG

SHARD = 20_000


def weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(parameter.shape, generator=draw) for name, parameter in parameters(spec).items()}


def write(folder: Path, state: Mapping[str, Tensor] | None = None, together: bool = True, seed: int = 1) -> None:
    extra = {"ema": weights(BIG, seed + 1)}
    chosen = weights(BIG, seed) if state is None else state
    options: dict[str, Any] = {"max_shard_bytes": SHARD, "extra_states": extra, "together": together}
    artefact.write_artefact(folder, chosen, BIG, {"step": seed}, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone") / "model"
    write(folder, together=False)
    found = content(folder)
    assert sum(name.startswith("model-") for name in found) >= 8
    assert sum(name.startswith("ema/model-") for name in found) >= 8
    return found


# --- faults of a rank: called on every rank before it writes; they affect the whole process


class Unreadable(Mapping[str, Tensor]):
    """A teacher's folder. Reading the third parameter fails."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.left = state, 3

    def __getitem__(self, name: str) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise ArtefactError(f"{name} cannot be read")
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def failing_append(at: int) -> Callable[..., Any]:
    """An `_append` whose `at`-th call finds the disk full."""
    original, left = weight_file._append, [at]

    def append(*arguments: Any) -> tuple[str, int]:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    return append


def failing_json(name: str) -> Callable[..., None]:
    def write_json(path: Path, value: Any) -> None:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        files.write_json(path, value)

    return write_json


def broken_rename(*_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def refuse(made: str) -> None:
    raise ArtefactError(f"{made} is another hash")


def attempt(folder: Path, patch: tuple[Any, str, Any] | None, state: Mapping[str, Tensor] | None = None) -> str:
    """The message of the error that writing raises, or "". Undoes the patch."""
    with pytest.MonkeyPatch.context() as patches:
        if patch is not None:
            patches.setattr(*patch)
        try:
            write(folder, state, seed=2)
        except ComptError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def misfortunes(folder: Path, small: str | None, read_only: str | None) -> dict[str, str]:
    """All faults, one after the other in the same processes. Returns this rank's messages."""
    rank, last = dist.rank(), dist.world_size() - 1
    state = weights(BIG, 2)
    told = {}
    for bad_rank in range(dist.world_size()):
        told[f"unreadable on {bad_rank}"] = attempt(folder, None, Unreadable(state) if rank == bad_rank else state)
    for at in (1, 9):
        patch = (weight_file, "_append", failing_append(at)) if rank == last else None
        told[f"tensor {at} of the last rank"] = attempt(folder, patch)
    for name in (artefact.INDEX, artefact.CONFIG, artefact.MANIFEST):
        told[name] = attempt(folder, (artefact, "write_json", failing_json(name)))
    told["rename"] = attempt(folder, (files.os, "rename", broken_rename))
    if last:
        told["unseen"] = attempt(folder, (Path, "is_dir", lambda _: False) if rank == last else None)
    told["hash"] = attempt(folder, (artefact, "write_artefact", partial(write_artefact, check=refuse)))
    told["in use"] = attempt(folder.parent, None)
    told["other weights"] = attempt(folder, None, {name: state[name] for name in state if name != "visual.proj"})
    if small is not None:
        told["small disk"] = attempt(Path(small) / "model", None)
    if read_only is not None:
        told["read-only"] = attempt(Path(read_only) / "model", None)
    dist.barrier()
    told["after all that"] = attempt(folder.with_name("later"), None)
    return told


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str, str], str | None]]:
    """Mounts a tmpfs with the given options; None if that is not allowed."""
    places: list[Path] = []

    def mount(name: str, options: str) -> str | None:
        place = tmp_path / name
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "compt-test", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        places.append(place)
        return str(place)

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_on_one_rank_is_raised_on_all_and_leaves_nothing(
    world: int, tmp_path: Path, alone: dict[str, bytes], mounted: Callable[[str, str], str | None]
) -> None:
    small, read_only = mounted("small", "size=96k"), mounted("read_only", "ro")
    folder = tmp_path / "place" / "model"
    write(folder, together=False)
    (folder.parent / "other.txt").write_text("not ours")
    told, *others = run_ranks(misfortunes, world, folder, small, read_only)
    assert all(other == told for other in others), "every rank is told the same"
    assert told.pop("after all that") == ""
    expected = {
        **{f"unreadable on {rank}": "ArtefactError: .* cannot be read" for rank in range(world)},
        "tensor 1 of the last rank": "RunError: cannot write .*: No space left on device",
        "tensor 9 of the last rank": "RunError: cannot write .*: No space left on device",
        **dict.fromkeys(
            (artefact.INDEX, artefact.CONFIG, artefact.MANIFEST), "RunError: cannot write .*model: Input/output error"
        ),
        "rename": "RunError: cannot write .*model: Invalid cross-device link",
        "unseen": rf"RunError: cannot write .*: rank {world - 1} does not see it; all ranks need one file system",
        "hash": "ArtefactError: [0-9a-f]{64} is another hash",
        "in use": "ArtefactError: .*place: exists and is not a model folder that compt wrote, or holds other files too",
        "other weights": "ArtefactError: the weights to write are not those of model big: visual.proj",
        "small disk": "RunError: cannot write .*/small/model/[^.]*[.]safetensors: No space left on device",
        "read-only": "RunError: cannot write .*read_only/model: Read-only file system",
    }
    for name, message in told.items():
        assert re.search(expected[name], message), (name, message)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["later", "model", "other.txt"]
    assert content(folder) == alone, "the old folder is still there"
    assert read_artefact(folder.with_name("later")).manifest["step"] == 2
    for disk in (small, read_only):
        assert disk is None or list(Path(disk).iterdir()) == []


# --- death


def dying(folder: Path, who: list[int], at: int) -> None:
    """Kills each rank in `who` at its `at`-th tensor."""
    original, left = weight_file._append, [at]

    def append(*arguments: Any) -> tuple[str, int]:
        left[0] -= 1
        if left[0] == 0 and dist.rank() in who:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    weight_file._append = append
    write(folder, seed=2)


@pytest.mark.parametrize(
    ("who", "at", "old"), [([0], 5, True), ([1], 5, True), ([0, 1], 9, False)], ids=["first", "second", "both"]
)
def test_a_killed_rank_leaves_no_half_folder(
    who: list[int], at: int, old: bool, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    folder = tmp_path / "place" / "model"
    if old:
        write(folder, together=False)
    with pytest.raises(AssertionError, match=f"rank {who[0]}: died"):
        run_ranks(dying, 2, folder, who, at)
    assert (content(folder) == alone) if old else not folder.exists()
    left = [path.name for path in folder.parent.iterdir() if path != folder]
    assert all(name.startswith(".model.tmp-") for name in left)
    assert bool(left) or who == [1], "who makes the folder also removes it, unless it is killed"
    run_ranks(write, 2, folder)
    assert content(folder) == alone
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_folder_is_the_same_for_any_number_of_writers(world: int, tmp_path: Path, alone: dict[str, bytes]) -> None:
    shares = run_ranks(write_counting, world, tmp_path / "model")
    assert content(tmp_path / "model") == alone
    assert min(shares) > 0, "every rank wrote something"
    assert max(shares) <= 2 * min(shares)


def write_counting(folder: Path) -> int:
    """Writes its share; returns how many bytes of tensors it was."""
    original, sizes = weight_file._append, []

    def append(*arguments: Any) -> tuple[str, int]:
        kind, size = original(*arguments)
        sizes.append(size)
        return kind, size

    weight_file._append = append
    write(folder)
    weight_file._append = original
    return sum(sizes)
