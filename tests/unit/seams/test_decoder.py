"""A decoder from outside the package: one class and one line in the table are all that it takes."""

from __future__ import annotations

import io
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from compt.data.batch import Batch
from compt.data.decode import Decoder, Encoded, Unusable
from compt.data.index import Index, open_index
from compt.data.loaders import MAX_SUBSTITUTES, train_loader
from compt.data.order import Box
from compt.errors import ConfigError, DataError, RunError
from compt.plan.jobs import make_plan
from compt.recipe.read import parse_recipe
from compt.recipe.reference import reference
from compt.recipe.schema import DECODERS, Recipe
from tests.helpers import run as runs
from tests.helpers.recipe import FIRST, chain, equal, lines, make_data, stopped_at, weights
from tests.helpers.shards import make_shards
from tests.unit.data.test_loaders import assert_same, faulty, load


class MeanColour(Decoder):
    """Paints each image in the mean colour of its box, in the training process."""

    in_worker: ClassVar[bool] = False
    processes: ClassVar[set[int]] = set()

    def decode(
        self, keys: Sequence[str], images: Sequence[Encoded], boxes: Sequence[Box], size: int
    ) -> tuple[Tensor, dict[int, Unusable]]:
        self.processes.add(os.getpid())
        pixels = torch.empty(len(keys), 3, size, size, dtype=torch.uint8)
        broken = {}
        for place, (image, box) in enumerate(zip(images, boxes, strict=True)):
            assert image.header is None, "it could not have come through the queue of a worker"
            try:
                part = np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB").crop(box))
                pixels[place] = torch.from_numpy(part.mean(axis=(0, 1)).astype(np.uint8))[:, None, None]
            except OSError as error:
                broken[place] = Unusable("image", f"cannot be decoded: {error}")
        return pixels, broken


class MeanColourInWorker(MeanColour):
    in_worker = True


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("mean_colour", MeanColour), ("in_worker", MeanColourInWorker)):
        monkeypatch.setitem(DECODERS.table, name, f"{__name__}:{kind.__name__}")
    monkeypatch.setattr(MeanColour, "processes", set())


def painted(index: Index, **other: object) -> list[Batch]:
    return load(index, decoder="mean_colour", **other)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_it_gets_the_keys_captions_and_boxes_that_pillow_gets(tmp_path: Path, workers: int, cache: bool) -> None:
    make_shards(tmp_path, n=22, shards=3)
    index = open_index("*.tar", tmp_path)
    ours, pillow = painted(index, workers=workers, cache=cache), load(index)
    assert MeanColour.processes == {os.getpid()}
    for one, two in zip(ours, pillow, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.tokens, two.tokens)
        assert one.images.shape == two.images.shape
        assert (one.images == one.images[:, :, :1, :1]).all()
        # The mean over the box, which only pixels of the same box are near to.
        difference = one.images[:, :, 0, 0].float() - two.images.float().mean(dim=(2, 3))
        assert difference.abs().max() < 4
    # Any step opens as if the run had come there.
    assert_same(painted(index, workers=workers, cache=cache, start_step=3), ours[3:])


def test_the_class_says_where_it_runs(tmp_path: Path) -> None:
    make_shards(tmp_path, n=22, shards=3)
    index = open_index("*.tar", tmp_path)
    with pytest.raises(AssertionError):
        load(index, decoder="in_worker", workers=0)
    assert MeanColour.processes == {os.getpid()}
    MeanColour.processes.clear()
    with pytest.raises(AssertionError):
        load(index, decoder="in_worker", workers=1)
    assert MeanColour.processes == set(), "it ran in the worker"


def unpinned(*arguments: Any, pin_memory: bool, **options: Any) -> Any:
    return DataLoader(*arguments, **options)


def test_its_thread_is_on_the_gpu_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on the first GPU: each rank of a machine would open a context there."""
    make_shards(tmp_path, n=22, shards=3)
    entered: list[tuple[str, int]] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.set_device", lambda at: entered.append((threading.current_thread().name, at)))
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    monkeypatch.setattr("compt.data.workers.DataLoader", unpinned)
    painted(open_index("*.tar", tmp_path), workers=1)
    assert entered == [("decoder_0", 3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_counted_as_with_pillow(tmp_path: Path, workers: int) -> None:
    # An even one is cut: its header can be read, so that only the decoder finds out.
    index = faulty(tmp_path, bad=(3, 10))
    ours, pillow = painted(index, workers=workers, total_steps=10), load(index, total_steps=10)
    assert [batch.keys for batch in ours] == [batch.keys for batch in pillow]
    assert [batch.skipped for batch in ours] == [batch.skipped for batch in pillow]
    assert sum((Counter(batch.skipped) for batch in ours), Counter())["image"] >= 4
    assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(ours, pillow, strict=True))


def test_a_set_that_yields_nothing_stops(tmp_path: Path) -> None:
    index = faulty(tmp_path, n=8, bad=tuple(range(8)), bare=())
    with pytest.raises(DataError, match=f"{MAX_SUBSTITUTES} samples in a row cannot be used; the last is f.tar: "):
        painted(index, workers=1)
    with pytest.raises(DataError, match=r"more than data\.max_bad_share"):
        loader = train_loader(
            faulty(tmp_path, n=100, bad=tuple(range(0, 40, 2)), bare=()),
            seed=0,
            batch=50,
            image_size=8,
            captions=1,
            context_length=12,
            start_step=0,
            total_steps=40,
            decoder="mean_colour",
        )
        list(loader)


def named(decoder: str | None) -> Recipe:
    data = {**runs.RECIPE["data"], **({} if decoder is None else {"decoder": decoder})}
    return parse_recipe({**runs.RECIPE, "data": data})


def test_it_is_a_part_of_a_runs_identity_and_pillow_changes_no_hash() -> None:
    plain, pillow, other = (make_plan(named(name)).jobs[0] for name in (None, "pillow", "mean_colour"))
    assert "decoder" not in plain.result["data"]
    assert plain.hash == pillow.hash
    assert other.result["data"]["decoder"] == "mean_colour"
    assert other.hash != plain.hash
    assert "`mean_colour`" in reference()


def test_a_recipe_can_only_name_decoders_of_the_table() -> None:
    with pytest.raises(ConfigError, match=r"data\.decoder = 'ffmpeg': should be 'pillow', 'torch'"):
        named("ffmpeg")


ONE_LINK = ("chain.links=[{model: small, train: {steps: 4}, warmup: {steps: 1}}]", "baselines=", "evaluation=")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_trains_with_it_and_resumes_exactly(tmp_path: Path, workers: int) -> None:
    base = make_data(tmp_path / "data")
    changes = [*ONE_LINK, "data.decoder=mean_colour", f"engine.workers={workers}"]
    chain(base, tmp_path / "whole", *changes)
    assert MeanColour.processes == {os.getpid()}
    stopped_at(base, tmp_path / "stopped", 3, *changes)
    with pytest.raises(RunError, match=r"data\.decoder"):
        chain(base, tmp_path / "stopped", *ONE_LINK)
    chain(base, tmp_path / "stopped", *changes)
    assert equal(weights(tmp_path / "whole", FIRST), weights(tmp_path / "stopped", FIRST))
    assert lines(tmp_path / "whole", FIRST) == lines(tmp_path / "stopped", FIRST)
