"""Every decoder of training images: the same samples, crops and captions, and pixels near those of a plain resize."""

from __future__ import annotations

import gc
import io
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

from compt.data.dali import DaliDecoder, Ready
from compt.data.decode import Encoded, TorchDecoder, Unusable, open_image, to_rgb
from compt.data.index import Index, open_index
from compt.errors import ConfigError
from compt.recipe.schema import DECODERS
from tests.helpers.optional import optional
from tests.helpers.recipe import FIRST, chain, equal, lines, make_data, stopped_at, weights
from tests.helpers.shards import make_shards, write_tar
from tests.unit.data.test_loaders import assert_same, batches_of, faulty, load

ONE_LINK = ("chain.links=[{model: small, train: {steps: 4}, warmup: {steps: 1}}]", "baselines=", "evaluation=")


@pytest.fixture(params=DECODERS.table)
def decoder(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        optional("nvidia.dali", "dali-cuda13")
    return str(request.param)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    make_shards(tmp_path, n=22, shards=3)
    return open_index("*.tar", tmp_path)


def scene(seed: int, width: int, height: int) -> Image.Image:
    """Something like a photograph: edges and gradients at all scales, and a little noise."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3))
    for cells in (2, 5, 13, 40):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers += np.asarray(coarse.resize((width, height), rng.choice([Resampling.NEAREST, Resampling.BICUBIC])))
    return Image.fromarray((layers / 4 + rng.normal(0, 4, layers.shape)).clip(0, 255).astype(np.uint8))


def file(image: Image.Image, kind: str, **options: object) -> bytes:
    blob = io.BytesIO()
    image.save(blob, kind, **options)
    return blob.getvalue()


TURNED = Image.Exif()
TURNED[0x112] = 6
FILES = {
    "JPEG": lambda image: file(image, "JPEG", quality=90),
    "JPEG, no subsampling": lambda image: file(image, "JPEG", quality=90, subsampling=0),
    "JPEG, progressive": lambda image: file(image, "JPEG", quality=80, progressive=True),
    "JPEG, grey": lambda image: file(image.convert("L"), "JPEG"),
    "JPEG, CMYK": lambda image: file(image.convert("CMYK"), "JPEG"),
    "JPEG, turned by EXIF": lambda image: file(image, "JPEG", exif=TURNED),
    "PNG": lambda image: file(image, "PNG"),
    "PNG, alpha": lambda image: file(Image.merge("RGBA", (*image.split(), image.convert("L"))), "PNG"),
    "PNG, palette": lambda image: file(image.quantize(64), "PNG"),
    "PNG, 16 bits": lambda image: file(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    "GIF": lambda image: file(image, "GIF"),
    "WEBP": lambda image: file(image, "WEBP"),
    "TIFF": lambda image: file(image, "TIFF"),
    "BMP": lambda image: file(image, "BMP"),
}  # fmt: skip
BY_DALI = {form for form in FILES if form.startswith("JPEG")} - {"JPEG, CMYK"}
SIZES = [(300, 260), (257, 509), (120, 90), (224, 224), (91, 400)]


@pytest.mark.parametrize("form", FILES)
def test_pixels_are_near_those_of_a_full_decoding_and_pillows_resize(decoder: str, form: str) -> None:
    datas = [FILES[form](scene(at, *size)) for at, size in enumerate(SIZES)]
    boxes = [(0, 0, *size) for size in SIZES[:2]] + [(11, 7, 101, 80), (3, 0, 220, 217), (0, 17, 91, 333)]
    made = DECODERS.load(decoder)()
    if decoder == "dali" and form in BY_DALI:
        made._cpu = None  # what DALI refuses is decoded there
    images = [Encoded(data, *size) for data, size in zip(datas, SIZES, strict=True)]
    # Drafts of Pillow have other pixels: 160 is above half of all boxes, so none is drafted.
    size = 160
    images = [made.prepare(image, box, size) for image, box in zip(images, boxes, strict=True)]
    pixels, broken = made.decode(["-"] * len(images), images, boxes, size)
    assert not broken
    for got, data, box in zip(pixels.numpy(), datas, boxes, strict=True):
        whole = to_rgb(open_image(data))
        # Pillow's own resize also looks at pixels beside the box; the others cut it out first, as torchvision does.
        cut = {"box": box} if decoder == "pillow" else {}
        plain = (whole if cut else whole.crop(box)).resize((size, size), Resampling.BICUBIC, **cut)
        off = np.abs(np.asarray(plain).transpose(2, 0, 1).astype(int) - got)
        mean, most = {"pillow": (0, 0), "torch": (0.25, 2), "dali": (0.3, 2)}[decoder]
        assert off.mean() <= mean
        assert off.max() <= most


@pytest.mark.parametrize("times", [2, 3])
def test_torch_keeps_what_pillows_scaled_decoding_loses(times: int) -> None:
    data = FILES["JPEG"](scene(0, 64 * times, 64 * times))
    image, box = Encoded(data, 64 * times, 64 * times), (0, 0, 64 * times, 64 * times)
    plain = np.asarray(to_rgb(open_image(data)).resize((64, 64), Resampling.BICUBIC)).transpose(2, 0, 1)
    pillow, ours = (DECODERS.load(name)().pixels(image, box, 64).astype(int) for name in ("pillow", "torch"))
    assert np.abs(ours - plain).max() <= 1
    assert np.abs(pillow - plain).mean() > 0.2


@pytest.mark.parametrize("times", [4, 9])
def test_torch_takes_pillows_way_where_it_is_faster(times: int) -> None:
    data = FILES["JPEG"](scene(0, 32 * times, 32 * times))
    image, box = Encoded(data, 32 * times, 32 * times), (0, 0, 32 * times, 32 * times)
    pillow, ours = (DECODERS.load(name)().pixels(image, box, 32) for name in ("pillow", "torch"))
    assert np.array_equal(pillow, ours)


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (0, True), (2, False), (2, True), (8, False)])
def test_samples_crops_and_captions_are_the_same(index: Index, decoder: str, workers: int, cache: bool) -> None:
    pillow = load(index)
    ours = load(index, decoder=decoder, workers=workers, cache=cache)
    assert len(ours) == len(pillow)
    for one, two in zip(ours, pillow, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.tokens, two.tokens)
        assert (one.skipped, one.few_captions) == (two.skipped, two.few_captions)
        # The crops, too: another box would be far off.
        assert (one.images.int() - two.images.int()).abs().float().mean() < 1
        assert one.images.is_contiguous()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_opens_exactly(index: Index, decoder: str, workers: int) -> None:
    whole = load(index, decoder=decoder)
    for first in (1, 4):
        assert_same(load(index, decoder=decoder, start_step=first, workers=workers), whole[first:])


def test_ranks_cut_the_same_batch(index: Index, decoder: str) -> None:
    whole = load(index, decoder=decoder)
    parts = [load(index, decoder=decoder, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_images_are_replaced_and_counted_alike(tmp_path: Path, decoder: str, workers: int) -> None:
    index = faulty(tmp_path)
    pillow = load(index, max_bad_share=1.0)
    ours = load(index, decoder=decoder, workers=workers, max_bad_share=1.0)
    assert sum(batch.skipped.get("image", 0) for batch in ours) > 0
    for one, two in zip(ours, pillow, strict=True):
        assert (one.keys, one.skipped) == (two.keys, two.skipped)


def test_damaged_jpegs_get_pillows_verdict(decoder: str) -> None:
    rng = random.Random(0)
    whole = [FILES[form](scene(0, 200, 160)) for form in ("JPEG", "JPEG, grey", "JPEG, progressive")]
    files = []
    for number in range(60):
        data = bytearray(rng.choice(whole))
        match number % 3:
            case 0:
                del data[rng.choice([-1, -2, -20, -len(data) // 20, -len(data) // 2]) :]
            case 1:
                del data[rng.randrange(700, len(data)) :]
            case _:
                at = rng.randrange(700, len(data))
                data[at : at + 40] = bytes(len(data[at : at + 40]))
        files.append(bytes(data))
    verdicts = {}
    for name in ("pillow", decoder):
        made, verdicts[name] = DECODERS.load(name)(), []
        for data in files:
            image = Encoded(data, 200, 160)
            try:
                _, broken = made.decode(["-"], [made.prepare(image, (0, 0, 200, 160), 120)], [(0, 0, 200, 160)], 120)
            except Unusable as error:
                broken = {0: error}
            verdicts[name].append(str(broken[0]) if broken else "")
    assert 10 < sum(map(bool, verdicts["pillow"])) < 50
    assert verdicts[decoder] == verdicts["pillow"]


def jpegs(folder: Path, **changed: bytes) -> Index:
    """Shards of JPEGs; `changed` has other files for some keys, which begin with `k`."""
    datas = {f"k{at:02d}": FILES["JPEG"](scene(at, 60, 50)) for at in range(24)} | changed
    for shard in range(2):
        members = [(f"{key}.{kind}", blob) for key, data in list(datas.items())[shard::2]
                   for kind, blob in (("jpg", data), ("txt", b"a caption"))]  # fmt: skip
        write_tar(folder / f"{shard}.tar", members)
    return open_index("*.tar", folder)


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_flat_over_5000_batches(tmp_path: Path, decoder: str, workers: int) -> None:
    own, marks = psutil.Process(), []
    for number, _ in enumerate(batches_of(jpegs(tmp_path), decoder=decoder, workers=workers, total_steps=5100)):
        if number % 1000 == 0:
            marks.append(sum(process.memory_full_info().uss for process in (own, *own.children(recursive=True))))
    assert len(marks) == 6
    assert marks[-1] - marks[1] < 10e6


@pytest.mark.parametrize("decoder", ["torch", "dali"], indirect=True)
def test_libjpegs_own_messages_reach_no_terminal(
    tmp_path: Path, decoder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = FILES["JPEG"](scene(0, 60, 50))
    harmless = data[:-2] + bytes(9) + data[-2:]
    TorchDecoder().pixels(Encoded(harmless, 60, 50), (0, 0, 60, 50), 40)
    assert "Corrupt JPEG data" in capfd.readouterr().err, "libjpeg writes nothing about this image"
    # DALI leaves an image that ends otherwise to torch, in the worker.
    load(jpegs(tmp_path, k03=harmless + b"more" * (decoder == "dali")), decoder=decoder, workers=1)
    assert not capfd.readouterr().err


class TestDali:
    """What is particular to DALI."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        optional("nvidia.dali", "dali-cuda13")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_batch_that_it_refuses_is_decoded_image_by_image(self, tmp_path: Path, workers: int) -> None:
        data = FILES["JPEG"](scene(3, 60, 50))
        index = jpegs(tmp_path, k03=data[:300] + data[-2:])  # no pixels, though an end
        pillow, ours = (load(index, decoder=name, workers=workers, max_bad_share=1.0) for name in ("torch", "dali"))
        assert sum(batch.skipped.get("image", 0) for batch in ours) == 2, "once an epoch"
        for one, two in zip(ours, pillow, strict=True):
            assert (one.keys, one.skipped) == (two.keys, two.skipped)
            assert (one.images.int() - two.images.int()).abs().max() <= 4
        # The other images are what DALI makes of them without the broken one.
        parts = [load(index, decoder="dali", max_bad_share=1.0, rank=rank, world_size=6) for rank in range(6)]
        for step, one in enumerate(ours):
            assert torch.equal(one.images, torch.cat([part[step].images for part in parts]))

    def test_batches_stay_as_they_are_while_others_are_decoded(self, tmp_path: Path) -> None:
        index = jpegs(tmp_path)
        kept = [(batch, batch.images.clone()) for batch in load(index, decoder="dali", workers=1, total_steps=40)]
        assert all(torch.equal(batch.images, first) for batch, first in kept)

    def test_only_what_it_decodes_as_pillow_does_reaches_it(self) -> None:
        made = DaliDecoder()
        taken = {}
        for form, write in FILES.items():
            data = write(scene(0, 80, 60))
            taken[form] = not isinstance(made.prepare(Encoded(data, 80, 60), (0, 0, 80, 60), 32), Ready)
        assert {form for form, there in taken.items() if there} == BY_DALI

    def test_a_forked_process_frees_no_pipeline_of_its_parent(self) -> None:
        data = FILES["JPEG"](scene(0, 60, 50))
        gc.disable()
        try:
            made = DaliDecoder()
            made.decode(["-"], [Encoded(data, 60, 50)], [(0, 0, 60, 50)], 16)
            ring = [made]
            ring.append(ring)
            del made, ring  # garbage, which the child finds
            child = os.fork()
            if child == 0:
                gc.collect()
                os._exit(0)
        finally:
            gc.enable()
        deadline, ended = time.monotonic() + 20, (0, 0)
        while not ended[0] and time.monotonic() < deadline:
            ended = os.waitpid(child, os.WNOHANG)
            time.sleep(0.05)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)

    def test_memory_stays_flat(self) -> None:
        made, rng = DaliDecoder(), random.Random(0)
        datas = [FILES["JPEG"](scene(at, rng.randrange(60, 200), rng.randrange(60, 200))) for at in range(40)]
        sizes = [open_image(data).size for data in datas]
        process, marks = psutil.Process(), []
        for _ in range(3):
            for _ in range(60):
                chosen = rng.sample(range(40), 16)
                images = [Encoded(datas[at], *sizes[at]) for at in chosen]
                made.decode(["-"] * 16, images, [(0, 0, *sizes[at]) for at in chosen], 64)
            marks.append(process.memory_info().rss)
        assert marks[-1] - marks[0] < 20e6


def test_without_dali_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"^data.decoder: dali needs NVIDIA DALI .*Install compt\[dali-cuda13\]"):
        DECODERS.load("dali")()


def test_a_run_says_so_before_it_reads_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match="needs NVIDIA DALI"):
        chain(make_data(tmp_path / "data"), tmp_path / "run", "data.decoder=dali")
    assert not list((tmp_path / "data").rglob("*.npz"))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_exactly(tmp_path: Path, decoder: str, workers: int) -> None:
    base = make_data(tmp_path / "data")
    changes = [*ONE_LINK, f"data.decoder={decoder}", f"engine.workers={workers}"]
    chain(base, tmp_path / "whole", *changes)
    stopped_at(base, tmp_path / "stopped", 3, *changes)
    chain(base, tmp_path / "stopped", *changes)
    assert equal(weights(tmp_path / "whole", FIRST), weights(tmp_path / "stopped", FIRST))
    assert lines(tmp_path / "whole", FIRST) == lines(tmp_path / "stopped", FIRST)
