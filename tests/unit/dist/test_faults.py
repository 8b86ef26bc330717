"""What goes wrong: bad data, bad recipes, full disks, damaged files. Each is a clear error or a counted skip, nothing
that was finished is lost, and the same command finishes once it is fixed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compt.chain import job as jobs
from compt.chain.job import JobRun
from compt.data import loaders as dataset
from compt.data.batch import SKIPPED
from compt.errors import ArtefactError, ComptError, ConfigError, DataError, RunError
from compt.recipe.read import load_recipe
from compt.train.checkpoint import Saver, find_latest
from compt.train.loop import TrainResult, TrainSettings
from compt.train.metrics import MetricsWriter
from tests.helpers.recipe import (
    FIRST,
    SECOND,
    chain,
    equal,
    lines,
    make_data,
    manifest,
    plan_of,
    stopped_at,
    weights,
    write_recipe,
)
from tests.helpers.shards import sample, write_tar


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    chain(base, base / "whole")
    return base / "whole"


@pytest.fixture(scope="module")
def stopped(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = shutil.copytree(whole, tmp_path_factory.mktemp("stopped") / "run")
    shutil.rmtree(run / "jobs" / SECOND)
    stopped_at(whole.parent, run, 3, "engine.checkpoint_every={steps: 2}")
    assert len(checkpoints(run)) == 2
    return run


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    """A finished first link, and a second one that was stopped at step 3 with checkpoints of steps 2 and 3."""
    return shutil.copytree(stopped, tmp_path / "half")


@pytest.fixture
def data(base: Path, tmp_path: Path) -> Path:
    """A copy of the data that may be damaged."""
    folder = tmp_path / "data"
    for name in ("train", "val", "eval"):
        shutil.copytree(base / name, folder / name)
    return folder


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "jobs" / SECOND / "checkpoints").glob("step-*"))


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def assert_finishes(base: Path, run: Path, whole: Path) -> None:
    chain(base, run)
    for job in (FIRST, SECOND):
        assert equal(weights(whole, job), weights(run, job))
        assert lines(whole, job) == lines(run, job)


def rewritten(shard: Path, change: Callable[[str, bytes], bytes]) -> None:
    with tarfile.open(shard) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    write_tar(shard, [(name, change(name, blob)) for name, blob in members])


# --- data


def test_a_missing_shard(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"there is no shard '.*train/000009\.tar' \(from 'train/\{000000..000009..9\}\.tar'\)"
    ):
        chain(base, tmp_path / "run", "data.train=train/{000000..000009..9}.tar")
    with pytest.raises(DataError, match=r"no shard matches '.*nowhere/\*\.tar'"):
        chain(base, tmp_path / "run", "data.train=nowhere/*.tar")
    with pytest.raises(DataError, match="nowhere"):
        chain(base, tmp_path / "run", "evaluation.validation=[nowhere/*.tar]")
    with pytest.raises(DataError, match="nowhere"):
        chain(base, tmp_path / "run", "evaluation.sets.0.data=nowhere/*.tar")
    assert not (tmp_path / "run").exists(), "nothing was started"


def test_a_shard_that_vanishes_while_it_trains(data: Path, base: Path, whole: Path, half: Path) -> None:
    finished = stamps(half / "jobs" / FIRST)
    shard = data / "train" / "000002.tar"
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(RunError, match=f"the training shards changed since {FIRST} started"):
        chain(data, half)
    shard.write_bytes(kept)
    assert_finishes(data, half, whole)
    assert stamps(half / "jobs" / FIRST) == finished


def test_a_truncated_shard_loses_its_end_only(data: Path, tmp_path: Path) -> None:
    shard = data / "train" / "000001.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    run = tmp_path / "run"
    chain(data, run)
    images = json.loads((run / "run.json").read_text())["images"]
    assert 36 < images < 48
    assert manifest(run, SECOND)["state"] == "done"


def test_undecodable_images_and_empty_captions_are_counted_and_replaced(data: Path, tmp_path: Path) -> None:
    names: list[str] = []

    def damage(name: str, blob: bytes) -> bytes:
        names.append(name)
        if name.endswith(".png") and len(names) < 3:
            return b"not a picture"
        if name.endswith(".json") and 20 < len(names) <= 22:
            return json.dumps({"captions": ["", "   "]}).encode()
        return blob

    rewritten(data / "train" / "000000.tar", damage)
    run = tmp_path / "run"
    chain(data, run, "chain.links.0.train={epochs: 2}")
    trained = manifest(run, FIRST)["trained"]
    assert trained["skipped_samples"] == {**dict.fromkeys(SKIPPED, 0), "image": 2, "caption": 2}, (
        "one sample of each, in two epochs"
    )
    assert [line["skipped_image"] for line in lines(run, FIRST) if line["kind"] == "train"][-1] == 2
    assert trained["samples"] == 96


def test_too_many_bad_samples_stop_the_run_and_name_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "WATCHED_SAMPLES", (24, 24))
    for shard in ("000000.tar", "000001.tar"):
        rewritten(data / "train" / shard, lambda name, blob: b"no" if name.endswith("png") else blob)
    run = tmp_path / "run"
    with pytest.raises(
        DataError,
        match=r"of the last \d+ samples that were tried cannot be used, more than data\.max_bad_share 0\.05 allows",
    ) as e:
        chain(data, run, "data.max_bad_share=0.05")
    assert "for example 00000" in str(e.value)
    assert ".tar: 000" in str(e.value)
    # With an allowed share the same folder resumes.
    chain(data, run, "data.max_bad_share=0.9")
    assert manifest(run, FIRST)["trained"]["skipped_samples"]["image"] > 10


def test_a_set_without_one_good_sample(data: Path, tmp_path: Path) -> None:
    for shard in (data / "train").glob("*.tar"):
        rewritten(shard, lambda name, blob: b"no" if name.endswith("png") else blob)
    with pytest.raises(
        DataError, match=r"20 samples in a row cannot be used; the last is 00000\d\.tar: 000\d+: image: "
    ):
        chain(data, tmp_path / "run")


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    make_data(tmp_path)
    for shard in ("000001.tar", "000002.tar", "000003.tar"):
        (tmp_path / "train" / shard).unlink()
    write_tar(tmp_path / "train" / "000000.tar", sample("a", 1))
    with pytest.raises(ConfigError, match=r"optimizer\.batch = 12: there are only 1 images"):
        chain(tmp_path, tmp_path / "run")


# --- recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.batsch=3", r"tiny\.yaml: optimizer\.batsch = 3: unknown key \(did you mean 'batch'\?\)"),
        ("chain.links.1.model=lage", r"tiny\.yaml: .*'lage' is not a member of the family \(did you mean 'large'\?\)"),
        ("chain.links.0.train=6", r"chain\.links\.0\.train = 6: needs a unit"),
        ("family.members.0.preset=vit_pixo", r"unknown model 'vit_pixo' \(did you mean 'vit_pico'\?\)"),
        ("engine.device=gpu", r"engine\.device = 'gpu'"),
    ],
)
def test_a_typo_in_the_recipe(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path / "tiny.yaml", change))


def test_a_batch_that_cannot_be_split(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.micro_batch 5 does not divide the 12 images"):
        chain(base, tmp_path / "run", "engine.micro_batch=5")
    assert not (tmp_path / "run").exists()


# --- full and unwritable disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a tmpfs of the given KiB. File sizes decide what fits, not free space."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "small"
        folder.mkdir(exist_ok=True)
        options = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{options}size={kib}k", "compt-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root; the errors themselves are tested with a patched write")
    yield mount
    if mounted:
        subprocess.run(["umount", str(mounted[0])], check=True)


def used_kib(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.rglob("*")) // 2


@pytest.mark.parametrize("place", ["checkpoints", "model", "metrics.jsonl"])
def test_a_full_disk(
    place: str, base: Path, whole: Path, half: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is filled just before the write in question."""
    disk = small_disk(120_000)
    run = Path(shutil.copytree(half, disk / "run"))
    finished = stamps(run / "jobs" / FIRST)
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("wb") as file:
            left = os.statvfs(disk)
            with contextlib.suppress(OSError):  # it may be full already
                file.write(b"\0" * (left.f_bavail * left.f_bsize - (64 << 10 if place != "metrics.jsonl" else 0)))
                file.flush()

    with monkeypatch.context() as patch:
        target: tuple[Any, str] = {
            "checkpoints": (Saver, "save"),
            "model": (jobs, "write_artefact"),
            "metrics.jsonl": (MetricsWriter, "_write"),
        }[place]
        owner, name = target
        original = getattr(owner, name)

        def full(*arguments: Any, **options: Any) -> Any:
            fill()
            return original(*arguments, **options)

        patch.setattr(owner, name, full)
        with pytest.raises(RunError, match=rf"cannot write .*{place}.*[Nn]o space left on device"):
            chain(base, run)
    assert stamps(run / "jobs" / FIRST) == finished
    assert find_latest(run / "jobs" / SECOND / "checkpoints") is not None, "the checkpoint before it is whole"
    ballast.unlink()
    assert_finishes(base, run, whole)


@pytest.mark.parametrize("place", ["checkpoint", "artefact"])
def test_a_full_disk_without_a_disk(
    place: str, base: Path, whole: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {
        "checkpoint": "torch.distributed.checkpoint.filesystem._write_item",
        "artefact": "compt.weights.safetensors._append",
    }[place]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = [path.name for path in checkpoints(half)]
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(RunError, match=r"cannot write .*No space left on device"):
            chain(base, half)
    assert set(before) <= {path.name for path in checkpoints(half)} or place == "artefact"
    assert not list(half.rglob(".*tmp*")), "what was begun is removed"
    assert_finishes(base, half, whole)


def test_a_run_folder_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=rf"cannot write {run}: (File exists|Not a directory)"):
            chain(base, run)
    assert (tmp_path / "file").read_text() == "x"


def test_a_read_only_run_folder(base: Path, half: Path, whole: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(120_000)
    run = Path(shutil.copytree(half, disk / "run"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(RunError, match=rf"cannot write {run}: Read-only file system"):
        chain(base, run)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert_finishes(base, run, whole)


# --- damaged files of a run


def spoil(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


def test_a_damaged_checkpoint_is_passed_over(
    base: Path, whole: Path, half: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = checkpoints(half)
    spoil(newest / "state" / "__0_0.distcp")
    assert find_latest(newest.parent) == older
    assert_finishes(base, half, whole)
    assert f"skipping checkpoint {newest}: state/__0_0.distcp does not have its recorded hash" in caplog.text


def test_without_a_whole_checkpoint_it_starts_from_the_expanded_weights(base: Path, whole: Path, half: Path) -> None:
    for path in checkpoints(half):
        (path / "state.json").write_text("{")
    assert_finishes(base, half, whole)


def test_a_checkpoint_of_the_last_step_that_is_damaged_is_no_model(
    base: Path, whole: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint never becomes the final model: the missing steps are trained again."""
    run_steps = JobRun._run_steps

    def damaged(self: JobRun, settings: TrainSettings) -> TrainResult:
        result = run_steps(self, settings)
        spoil(checkpoints(half)[-1] / "state" / "__0_0.distcp")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(JobRun, "_run_steps", damaged)
        with pytest.raises(RunError, match=r"step-\d+: the checkpoint of the last step is damaged .* go on from step-"):
            chain(base, half)
    assert not (half / "jobs" / SECOND / "model").exists()
    assert_finishes(base, half, whole)


def test_a_damaged_model_of_a_finished_link(base: Path, half: Path, whole: Path) -> None:
    model = half / "jobs" / FIRST / "model" / "open_clip_model.safetensors"
    kept = model.read_bytes()
    spoil(model)
    with pytest.raises(ArtefactError, match=rf"{model}: its content is not what the manifest says"):
        chain(base, half)
    model.unlink()
    with pytest.raises(ArtefactError, match=rf"{model}: missing"):
        chain(base, half)
    model.write_bytes(kept)
    assert_finishes(base, half, whole)


def test_damaged_expanded_weights(base: Path, half: Path, whole: Path) -> None:
    initial = half / "jobs" / SECOND / "initial" / "open_clip_model.safetensors"
    kept = initial.read_bytes()
    spoil(initial)
    with pytest.raises(ArtefactError, match=rf"{initial}: its content is not what the manifest says"):
        chain(base, half)
    initial.write_bytes(kept)
    assert_finishes(base, half, whole)


def test_a_damaged_manifest(base: Path, half: Path, whole: Path) -> None:
    path = half / "jobs" / SECOND / "manifest.json"
    kept = path.read_bytes()
    for text in (b"{", b"", b"[]", b'{"state": "dreaming"}', b"\xff"):
        path.write_bytes(text)
        with pytest.raises(RunError, match=rf"{path}.*remove {path.parent} to train it again"):
            chain(base, half)
    path.write_bytes(kept)
    assert_finishes(base, half, whole)


def test_a_damaged_record_of_the_run(base: Path, half: Path, whole: Path) -> None:
    path = half / "run.json"
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(RunError, match=rf"{path} (cannot be read|is damaged): .*; remove it: it is written again"):
            chain(base, half)
    path.unlink()
    assert_finishes(base, half, whole)


def test_a_torn_metrics_line_is_cut(base: Path, half: Path, whole: Path) -> None:
    with (half / "jobs" / SECOND / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    assert_finishes(base, half, whole)


def test_every_error_is_one_that_the_command_shows() -> None:
    for kind in (ArtefactError, ConfigError, DataError, RunError):
        assert issubclass(kind, ComptError)
    assert {kind.exit_code for kind in (ConfigError, DataError, ArtefactError, RunError)} == {2, 3, 4, 5}


def test_the_plan_is_checked_before_the_run_folder_is_made(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        plan_of(base, tmp_path / "run", "chain.links=[]")
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_middle_gives_the_folder_back(base: Path, half: Path, whole: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(JobRun, "_run_steps", lambda *_: {}["a bug"])
        chain(base, half)
    assert_finishes(base, half, whole)
