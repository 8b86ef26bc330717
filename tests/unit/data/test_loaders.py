from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import open_clip
import psutil
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from compt.data import workers as loader_processes
from compt.data.batch import Batch
from compt.data.decode import MAX_PIXELS, Encoded, PillowDecoder, Unusable, evaluation_pixels, open_image, to_rgb
from compt.data.index import Index, open_index
from compt.data.loaders import MAX_SUBSTITUTES, _BadShare, eval_loader, fixed_caption_batches, train_loader
from compt.data.order import EpochOrder, caption_choice
from compt.data.samples import ShardSamples
from compt.data.tokens import CaptionTokens
from compt.data.workers import read_batches
from compt.errors import DataError, Interrupted, RunError
from compt.models.preprocess import Preprocess
from tests.helpers.process import finish, start
from tests.helpers.shards import make_shards, picture, sample, texts, write_tar

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = SimpleTokenizer()
N, BATCH = 22, 6


@pytest.fixture
def index(tmp_path: Path) -> Index:
    make_shards(tmp_path, n=N, shards=3)
    return open_index("*.tar", tmp_path)


def batches_of(index: Index, **other) -> Iterator[Batch]:
    settings = {
        "seed": 5,
        "batch": BATCH,
        "image_size": 16,
        "captions": 2,
        "context_length": 12,
        "start_step": 0,
        "total_steps": 8,
        "window": 2,
        "crop_scale": (0.5, 1.0),
        "tokenizer": TOKENIZER,
    }
    return iter(train_loader(index, **(settings | other)))


def load(index: Index, **other) -> list[Batch]:
    return list(batches_of(index, **other))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.tokens, two.tokens)
        assert (one.skipped, one.few_captions) == (two.skipped, two.few_captions)


def test_batches_are_what_the_order_says(index: Index) -> None:
    batches = load(index)
    assert len(batches) == 8
    per_epoch = N // BATCH
    for step, batch in enumerate(batches):
        epoch, place = divmod(step, per_epoch)
        ids = EpochOrder(5, epoch, index.sizes, 2)[place * BATCH : (place + 1) * BATCH]
        assert batch.keys == [index.key(i) for i in ids]
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (BATCH, 3, 16, 16)
        assert batch.images.is_contiguous()
        chosen = [[texts(int(i), 3)[c] for c in caption_choice(5, epoch, index.key(i), 3, 2)] for i in ids]
        expected = TOKENIZER([text for image in chosen for text in image], context_length=12).view(BATCH, 2, 12)
        longest = int((expected != 0).sum(-1).max())
        assert torch.equal(batch.tokens, expected[..., :longest])
        assert (batch.skipped, batch.few_captions) == ({}, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_any_step_opens_as_if_the_run_had_come_there(index: Index, workers: int, cache: bool) -> None:
    whole = load(index)
    for first in (0, 1, 3, 5):
        assert_same(load(index, start_step=first, workers=workers, cache=cache), whole[first:])


def test_ranks_cut_the_same_global_batch(index: Index) -> None:
    whole = load(index)
    for world in (2, 3):
        parts = [load(index, rank=rank, world_size=world) for rank in range(world)]
        for step, batch in enumerate(whole):
            assert [key for part in parts for key in part[step].keys] == batch.keys
            assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
            for rank in range(world):
                tokens = parts[rank][step].tokens
                share = batch.tokens[rank * BATCH // world : (rank + 1) * BATCH // world]
                assert torch.equal(tokens, share[..., : tokens.shape[-1]])
                assert not share[..., tokens.shape[-1] :].any()


def test_epochs_draw_new_crops_captions_and_order(index: Index) -> None:
    batches = load(index, total_steps=6)
    first, second = batches[:3], batches[3:]
    assert len({key for batch in first for key in batch.keys}) == 18, "no sample twice in an epoch"
    assert [key for batch in first for key in batch.keys] != [key for batch in second for key in batch.keys]
    where = {key: batch.images[i] for batch in first for i, key in enumerate(batch.keys)}
    again = {key: batch.images[i] for batch in second for i, key in enumerate(batch.keys)}
    shared = where.keys() & again.keys()
    assert sum(torch.equal(where[key], again[key]) for key in shared) < len(shared) / 4
    assert not torch.equal(load(index, seed=6)[0].images, batches[0].images)


def test_too_small_sets_and_uneven_ranks_are_refused_at_once(index: Index) -> None:
    with pytest.raises(DataError, match="22 samples are fewer than one batch of 23"):
        load(index, batch=23)
    with pytest.raises(DataError, match="batch of 6 cannot be cut into 4 equal parts"):
        load(index, world_size=4)
    with pytest.raises(ValueError, match=r"should be 'pillow', 'torch' or 'dali' \(did you mean 'pillow'"):
        load(index, decoder="pilow")


BROKEN = b"\x89PNG\r\n\x1a\n broken"


def faulty(folder: Path, n: int = 30, bad: tuple[int, ...] = (3, 11), bare: tuple[int, ...] = (7,)) -> Index:
    """Samples of which some have undecodable images, some no usable caption, and number 5 one empty caption."""
    members = []
    for i in range(n):
        image, text = sample(f"{i:09d}", i)
        if i in bad:
            image = (image[0], BROKEN if i % 2 else picture(i, 40, 36)[:150])
        if i in bare:
            text = (text[0], json.dumps({"captions": ["  ", ""], "class": i % 7}).encode())
        if i == 5:
            text = (text[0], json.dumps({"captions": ["", *texts(5, 3)], "class": 5}).encode())
        members += [image, text]
    write_tar(folder / "f.tar", members)
    return open_index("f.tar", folder)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_replaced_and_counted(tmp_path: Path, workers: int, cache: bool) -> None:
    index = faulty(tmp_path, bad=(3, 10))
    batches = load(index, total_steps=10, workers=workers, cache=cache)
    skipped = sum((Counter(batch.skipped) for batch in batches), Counter())
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 60
    assert not {"000000003", "000000010", "000000007"} & set(keys)
    assert skipped["image"] >= 4, "each of two broken images comes once in each of two epochs"
    assert skipped["caption"] >= 2, "sample 7 comes once an epoch"
    assert skipped["empty"] >= 2, "sample 5 comes once an epoch"
    assert skipped.keys() == {"image", "caption", "empty"}
    assert_same(batches, load(index, total_steps=10))
    assert_same(batches[4:], load(index, start_step=4, total_steps=10))


def test_empty_captions_are_never_drawn(tmp_path: Path) -> None:
    index = faulty(tmp_path, n=6, bad=(), bare=())
    empty = 2  # start and end only
    for batch in load(index, total_steps=20):
        assert ((batch.tokens != 0).sum(-1) > empty).all()
        assert batch.skipped == {"empty": 1}


def test_few_captions_are_counted(index: Index) -> None:
    batch = load(index, captions=5, total_steps=1)[0]
    assert batch.tokens.shape[:2] == (BATCH, 5)
    assert batch.few_captions == BATCH


def test_too_many_unusable_samples_stop_the_run(tmp_path: Path) -> None:
    index = faulty(tmp_path, n=100, bad=(1, 3, 5, 7), bare=())
    settings = {"batch": 50, "image_size": 8, "total_steps": 40}
    assert len(load(index, max_bad_share=0.1, **settings)) == 40
    seen = 0
    with pytest.raises(
        DataError,
        match=r"of the last 10\d\d samples that.*max_bad_share 0\.01.*f\.tar: 00000000[1357]: image: not an image",
    ):
        for batch in train_loader(
            index,
            seed=0,
            captions=1,
            context_length=12,
            start_step=0,
            tokenizer=TOKENIZER,
            max_bad_share=0.01,
            **settings,
        ):
            seen += len(batch)
    assert seen >= 950, "fewer than 1,000 samples are no judgement"


@pytest.mark.parametrize(("share", "stops"), [(0.009, False), (0.014, True)])
def test_chance_does_not_stop_a_run(share: float, stops: bool) -> None:
    """Of a million samples at nearly the allowed share, some thousands in a row have more."""
    bad = np.random.default_rng(0).binomial(512, share, size=2_000)
    read = SimpleNamespace(batch=range(512), replaced=0, offender="a.tar: 1")
    watch = _BadShare(0.01)
    with pytest.raises(DataError, match="more than data.max_bad_share 0.01 allows") if stops else nullcontext():
        for read.replaced in bad:
            watch.add(cast("Any", read))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_replaced_by_one_of_the_same_size_and_time(index: Index, tmp_path: Path, workers: int) -> None:
    shard = tmp_path / index.shards[0].name
    entry, stat, blob = index.entry(0), shard.stat(), bytearray(shard.read_bytes())
    blob[entry.image_offset] ^= 1
    shard.write_bytes(blob)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=f"{shard.name} holds other data than when it was indexed"):
        load(index, workers=workers)


def test_there_are_no_more_loader_processes_than_cores(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores, real, made = len(os.sched_getaffinity(0)), loader_processes._loader, []

    def noted(dataset: Any, sampler: Any, workers: int) -> list[Any]:
        made.append(real(dataset, sampler, workers).num_workers)
        return []

    monkeypatch.setattr(loader_processes, "_loader", noted)
    for workers in (cores + 3, 0):
        assert list(read_batches(Unsendable(), [0], workers)) == []
    assert made == [cores, 0]
    assert not recwarn.list, "torch has nothing to warn of"


def die_in_a_step() -> None:
    """A loader process is killed while the program does something else."""
    list(DataLoader(Numbers(), sampler=[0], num_workers=1))  # other code's, which installs torch's handler of SIGCHLD
    before, batches = psutil.Process().children(), read_batches(Numbers(), [0, 1], 1)
    next(batches)
    (process,) = {*psutil.Process().children()} - {*before}
    process.kill()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass


class Numbers(Dataset[Any]):
    def __getitem__(self, number: int) -> int:
        return number


@pytest.mark.slow
def test_torch_raises_no_death_of_a_loader_process_in_the_middle_of_a_step() -> None:
    assert finish(start(die_in_a_step)) == 0


class Held(Dataset[Any]):
    """Each batch is read by a process that keeps the lock under which torch's workers look whether to end."""

    def __getitem__(self, number: int) -> int:
        frame = sys._getframe()
        while frame.f_back and "done_event" not in frame.f_locals:
            frame = frame.f_back
        frame.f_locals["done_event"]._cond.acquire()
        return number


def end_while_a_lock_is_held() -> None:
    batches = read_batches(Held(), range(9), 1)
    next(batches)
    batches.close()


def test_a_loader_process_killed_under_a_shared_lock_blocks_nobody() -> None:
    assert finish(start(end_while_a_lock_is_held), 60) == 0


def one_that_fails() -> Iterator[int]:
    """Two items, of which the first is read, and then no third: torch asks for it while it starts."""
    yield from (0, 1)
    time.sleep(1)
    raise DataError("no third")


def fail_while_a_loader_starts() -> None:
    list(read_batches(Held(), one_that_fails(), 1))


def test_an_item_that_fails_while_loader_processes_start() -> None:
    assert finish(start(fail_while_a_loader_starts), 60) == DataError.exit_code


def test_loader_processes_leave_no_folders() -> None:
    code = (
        "import torch\nfrom compt.data.workers import read_batches\n"
        "batches = read_batches([torch.zeros(9)] * 9, range(9), 2)\n"
        "next(batches)\nbatches.close()\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # a short path, as sockets need
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": folder}, check=True)
        assert os.listdir(folder) == []


class Unsendable(Dataset[Any]):
    """A batch that no loader process can pass on, as when /dev/shm is full."""

    def __getitem__(self, _: int) -> Any:
        return lambda: None


def test_a_batch_that_cannot_be_passed_on_ends_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"loader process \d+ ended with code 1. Batches pass through /dev/shm"):
        list(read_batches(Unsendable(), [0], 1))
    assert "cannot pass on a batch: " in capfd.readouterr().err


def test_loader_processes_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", full)
    with pytest.raises(RunError, match=r"cannot start engine.workers=1 loader processes: .*No space left.*/dev/shm"):
        list(read_batches(Unsendable(), [0], 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_that_yields_nothing_stops_naming_shard_key_and_cause(tmp_path: Path, workers: int) -> None:
    index = faulty(tmp_path, n=8, bad=tuple(range(8)), bare=())
    with pytest.raises(DataError) as error:
        load(index, workers=workers)
    assert str(error.value).startswith(
        f"{MAX_SUBSTITUTES} samples in a row cannot be used; the last is f.tar: 00000000"
    )
    assert ": image: " in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_shard_cut_after_indexing_is_counted_as_tar(tmp_path: Path) -> None:
    shard = make_shards(tmp_path, n=12, shards=1)[0]
    index = open_index("*.tar", tmp_path)
    shard.write_bytes(shard.read_bytes()[: index.entry(10).image_offset + 5])
    skipped = sum((Counter(batch.skipped) for batch in load(index)), Counter())
    assert skipped.keys() == {"tar"}


@pytest.mark.parametrize("size", [(40, 36), (64, 20), (17, 90), (16, 16), (33, 33), (16, 31), (7, 5)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_pixels_are_those_of_open_clip(size: tuple[int, int], mode: str) -> None:
    data = picture(3, *size, mode=mode)
    transform = open_clip.image_transform(16, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = (transform(Image.open(io.BytesIO(data))) * 255).round().to(torch.uint8)
    assert np.array_equal(evaluation_pixels(data, 16), theirs.numpy())


def test_transparency_lies_on_white_and_modes_become_rgb() -> None:
    def decoded(image: Image.Image, file_format: str = "PNG", **options) -> np.ndarray:
        blob = io.BytesIO()
        image.save(blob, file_format, **options)
        return np.asarray(to_rgb(open_image(blob.getvalue())))

    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decoded(clear) == 255).all()
    assert (decoded(clear.convert("LA")) == 255).all()
    assert (decoded(clear, "WEBP", lossless=True) == 255).all()
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette(list(range(30)))
    assert (decoded(palette) == [9, 10, 11]).all()
    assert (decoded(palette, transparency=3) == 255).all()
    deep = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert (decoded(deep) == 0x80).all()
    assert decoded(Image.new("CMYK", (4, 4)), "JPEG").shape == (4, 4, 3)
    assert (decoded(Image.new("1", (4, 4), 1)) == 255).all()


def test_orientation_in_exif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    blob = io.BytesIO()
    Image.new("RGB", (8, 4)).save(blob, "JPEG", exif=exif)
    assert to_rgb(open_image(blob.getvalue())).size == (8, 4)


@pytest.mark.parametrize("name", ["open", "load"])
def test_a_signal_while_an_image_is_read_does_not_count_it_as_broken(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise Interrupted("stopped by SIGTERM")

    blob = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blob, "PNG")
    monkeypatch.setattr(Image if name == "open" else Image.Image, name, asked)
    if name == "load":
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", asked)
    with pytest.raises(Interrupted):
        to_rgb(open_image(blob.getvalue()))


@pytest.mark.parametrize("extension", ["PNG", "JPEG", "WEBP"])
def test_kept_images_give_the_same_pixels(extension: str) -> None:
    image = Encoded(picture(1, 300, 170, extension), 300, 170)
    decoder = PillowDecoder()
    kept = decoder.keep(image, 16)
    for box in [(0, 0, 300, 170), (10, 20, 150, 160), (3, 3, 40, 40), (0, 0, 20, 18)]:
        assert np.array_equal(decoder.pixels(kept, box, 16), decoder.pixels(image, box, 16))
    assert sorted(kept.scaled) == ([1, 2, 4, 8] if extension == "JPEG" else [1])


def test_reduced_decoding_stays_near_the_full_one() -> None:
    data = picture(2, 320, 320, "JPEG")
    box = (16, 32, 272, 288)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC, box=box)).transpose(
        2, 0, 1
    )
    ours = PillowDecoder().pixels(Encoded(data, 320, 320), box, 32)
    assert np.abs(full.astype(int) - ours).max() <= 4


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_broken_images_are_unusable() -> None:
    wide = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 9000 + 1, 9000)).save(wide, "PNG")
    half = picture(0, 60, 60, "JPEG")
    for data in (
        wide.getvalue(),
        b"",
        b"\x00" * 100,
        half[: len(half) // 2],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ):
        for decode in (
            lambda d: PillowDecoder().pixels(Encoded(d, 60, 60), (0, 0, 60, 60), 8),
            lambda d: evaluation_pixels(d, 8),
        ):
            with pytest.raises(Unusable) as error:
                decode(data)
            assert error.value.cause == "image"


def test_a_cut_caption_keeps_its_end() -> None:
    tokens = CaptionTokens(8, TOKENIZER)
    for text in ("a", "a b c d e f g h i j k", "ÄÖ &amp; ☃"):
        expected = TOKENIZER([text], context_length=8)[0]
        ids = tokens.ids(text)
        assert ids.tolist() == expected[expected != 0].tolist()
        assert ids[-1] == TOKENIZER.eot_token_id
    assert tokens.length("a b c d e f g h i j k") == 13


def test_memory_bounds_the_cache_not_the_result(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(index)
    monkeypatch.setattr("compt.data.loaders.CACHE_BYTES", 40_000)
    loader = train_loader(
        index,
        seed=5,
        batch=BATCH,
        image_size=16,
        captions=2,
        context_length=12,
        start_step=0,
        total_steps=8,
        window=2,
        crop_scale=(0.5, 1.0),
        tokenizer=TOKENIZER,
        cache=True,
    )
    assert_same(list(loader), whole)
    assert 1 < len(loader.reads._drawer._kept) < 10


def test_memory_is_pinned_only_where_a_gpu_is_used(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[bool] = []
    monkeypatch.setattr("compt.data.workers.DataLoader", lambda *_, pin_memory, **__: pinned.append(pin_memory) or [])
    # A machine with a GPU, on which a run was told to take the CPU, and one that has put its model there.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        load(index)
        list(eval_loader(ShardSamples(index), image_size=8, batch=2))
    assert pinned == [False, False, True, True]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once(tmp_path: Path, workers: int, world: int) -> None:
    make_shards(tmp_path, n=23, shards=2, classes=5)
    index = open_index("*.tar", tmp_path)
    ids: list[int] = []
    for rank in range(world):
        loader = eval_loader(
            ShardSamples(index, "cls", captions=True),
            image_size=16,
            batch=4,
            rank=rank,
            world_size=world,
            workers=workers,
        )
        for batch in loader:
            assert len(batch) == len(batch.ids) == len(batch.images) <= 4
            assert batch.keys == [index.key(i) for i in batch.ids]
            assert batch.labels.tolist() == [i % 5 for i in batch.ids]
            assert batch.captions == [texts(i, 3) for i in batch.ids]
            for image, i in zip(batch.images, batch.ids, strict=True):
                assert np.array_equal(image, evaluation_pixels(picture(i, 40, 36), 16))
            ids += batch.ids
    assert sorted(ids) == list(range(23))


def test_evaluation_names_what_it_cannot_use(tmp_path: Path) -> None:
    index = faulty(tmp_path, n=12)
    batches = list(eval_loader(ShardSamples(index, "class", captions=True), image_size=8, batch=5))
    assert sum((Counter(batch.skipped) for batch in batches), Counter()) == {"image": 2, "caption": 1}
    bad = [line for batch in batches for line in batch.bad]
    assert [line[:25] for line in bad] == [
        "f.tar: 000000003: image: ",
        "f.tar: 000000007: caption",
        "f.tar: 000000011: image: ",
    ]
    assert [i for batch in batches for i in batch.ids] == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert [label for batch in batches for label in batch.labels.tolist()] == [
        i % 7 for i in (0, 1, 2, 4, 5, 6, 8, 9, 10)
    ]
    plain = next(iter(eval_loader(ShardSamples(index), image_size=8, batch=2)))
    assert (plain.labels, plain.captions) == (None, None)
    for label, cause in (("cls", "label"), ("nothing", "label"), ("captions", "label_text")):
        first = next(iter(eval_loader(ShardSamples(index, label), image_size=8, batch=5)))
        assert (first.skipped, len(first), first.bad[0][:17]) == ({cause: 5}, 0, "f.tar: 000000000:")
    ranged = [*eval_loader(ShardSamples(index, "class"), image_size=8, batch=12, classes=6)]
    assert ranged[0].skipped == {"label_range": 1, "image": 2}
    assert "f.tar: 000000006: label_range: label 6, but the classes are 0 to 5" in ranged[0].bad


def test_validation_batches_are_fixed_and_whole(index: Index) -> None:
    settings = {"batch": 5, "image_size": 16, "captions": 2, "context_length": 12, "tokenizer": TOKENIZER}
    whole = list(fixed_caption_batches(index, **settings))
    assert [len(batch) for batch in whole] == [5, 5, 5, 5]
    assert len({key for batch in whole for key in batch.keys}) == 20
    assert_same(list(fixed_caption_batches(index, **settings, workers=2)), whole)
    parts = [list(fixed_caption_batches(index, **settings, rank=rank, world_size=3)) for rank in range(3)]
    for number, batch in enumerate(whole):
        assert_same([parts[number % 3][number // 3]], [batch])
    key = whole[0].keys[0]
    number = int(key[4:])
    assert np.array_equal(whole[0].images[0], evaluation_pixels(picture(number, 40, 36), 16))
    squash = Preprocess(resize_mode="squash")
    squashed = next(iter(fixed_caption_batches(index, **settings, preprocess=squash)))
    assert np.array_equal(squashed.images[0], evaluation_pixels(picture(number, 40, 36), 16, squash))
    assert not np.array_equal(squashed.images[0], whole[0].images[0])
    expected = [texts(number, 3)[0], texts(number, 3)[1]]
    ids = TOKENIZER(expected, context_length=12)[:, : whole[0].tokens.shape[-1]]
    assert torch.equal(whole[0].tokens[0], ids)
    assert [len(batch) for batch in fixed_caption_batches(index, **(settings | {"batch": 50}))] == [N]
