"""Several sets with weights: what an epoch has, against a plain loop, and that one set stays as it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from compt.data.check import check
from compt.data.index import Index, open_index
from compt.data.loaders import train_loader
from compt.data.mixture import open_training
from compt.data.order import EpochOrder, Mixture, caption_choice, crop_box
from compt.data.samples import SampleReader
from compt.errors import ConfigError, DataError
from compt.recipe.read import load_recipe
from compt.recipe.schema import Data, TrainSet
from tests.helpers.shards import make_shards, sample, write_tar


def open_sets(sets: list[TrainSet | str], folder: Path) -> Index:
    return open_training(Data(train=sets, images=1), folder)


def two_sets(folder: Path, first: float = 2.5, second: float = 1.0) -> Index:
    """Sets of 11 and 7 samples, in 3 and 2 shards."""
    if not (folder / "a").exists():
        make_shards(folder / "a", n=11, shards=3)
        for at in range(2):
            members = [each for n in range(3 + at) for each in sample(f"b{at}{n}", 50 + 10 * at + n)]
            write_tar(folder / "b" / f"{at}.tar", members)
    sets = [TrainSet(shards=["a/*.tar"], weight=first), TrainSet(shards=["b/*.tar"], weight=second)]
    return open_sets(sets, folder)


def epoch(index: Index, number: int, seed: int = 3) -> list[int]:
    """The samples of an epoch in their order, with copies."""
    assert index.mixture is not None
    order = EpochOrder(seed, number, index.mixture.sizes, 2)
    return index.mixture.find(number, order[:], index.sizes).tolist()


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 1), (2.5, 1), (0.5, 3), (0.3, 0.7), (1.25, 2.1)])
def test_each_sample_comes_as_often_as_its_weight_says(tmp_path: Path, first: float, second: float) -> None:
    index = two_sets(tmp_path, first, second)
    assert len(index) == 18
    assert index.images == round(first * 11) + round(second * 7)
    seen: Counter[int] = Counter()
    for number in range(20):
        ids = epoch(index, number)
        assert len(ids) == len(set(ids)) == index.images  # never the same copy twice
        times = Counter(each % 18 for each in ids)
        for at in range(18):
            weight = first if at < 11 else second
            assert int(weight) <= times[at] <= -(-weight // 1)
        # A sample that comes c times comes as copies 0 to c - 1, but for a share alone.
        assert {each // 18 for each in ids} <= set(range(int(-(-max(first, second) // 1))))
        seen.update(times)
    for low, high, weight in ((0, 11, first), (11, 18, second)):
        assert sum(seen[at] for at in range(low, high)) == 20 * round(weight * (high - low))
        assert all(abs(seen[at] - 20 * weight) < 10 for at in range(low, high))


def test_the_mixture_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    index = two_sets(tmp_path, 2.5)
    sizes = [4, 4, 3, 3, 4]
    assert index.sizes.tolist() == sizes
    starts = [0, 4, 8, 11, 15]
    for number in range(5):
        expected = []
        for copy in (0, 1):
            expected += [at + 18 * copy for at in range(11)]
        taken = [2, 2, 2]  # halves of 4, 4 and 3: rounded sums 2, 4, 5.5 -> 6
        for shard, count in enumerate(taken):
            expected += [36 + starts[shard] + (number * count + place) % sizes[shard] for place in range(count)]
        expected += list(range(11, 18))
        assert index.mixture is not None
        assert index.mixture.find(number, np.arange(index.images), index.sizes).tolist() == expected


@pytest.mark.parametrize("plain", [False, True])
def test_sets_of_weight_1_are_read_as_without_weights(tmp_path: Path, plain: bool) -> None:
    mixed = two_sets(tmp_path, 1.0)
    if plain:
        mixed = open_sets(["a/*.tar", TrainSet(shards=["b/*.tar"])], tmp_path)
    single = open_index(["a/*.tar", "b/*.tar"], tmp_path)
    assert (mixed.fingerprint, mixed.content, mixed.images) == (single.fingerprint, single.content, len(single))
    assert (mixed.account.used, mixed.account.unused) == (single.account.used, single.account.unused)
    settings = {"seed": 5, "batch": 4, "image_size": 16, "captions": 2, "context_length": 20}
    batches = [
        list(train_loader(index, start_step=0, total_steps=9, window=2, **settings)) for index in (mixed, single)
    ]
    for first, second in zip(*batches, strict=True):
        assert first.keys == second.keys
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.tokens, second.tokens)


def test_copies_differ_and_any_step_opens_with_any_ranks_and_workers(tmp_path: Path) -> None:
    index = two_sets(tmp_path, 2.5)
    settings = {"seed": 5, "image_size": 16, "captions": 1, "context_length": 20, "crop_scale": (0.3, 0.6)}

    def batches(start: int, rank: int = 0, world: int = 1, workers: int = 0, cache: bool = False) -> list:
        loader = train_loader(
            index,
            start_step=start,
            total_steps=12,
            batch=8,
            rank=rank,
            world_size=world,
            workers=workers,
            cache=cache,
            **settings,
        )
        return list(loader)

    whole = batches(0)
    assert index.images // 8 == 4  # steps of an epoch: three epochs
    for start, workers, cache in [(5, 0, False), (11, 2, False), (0, 0, True), (3, 2, True)]:
        for first, second in zip(whole[start:], batches(start, workers=workers, cache=cache), strict=True):
            assert first.keys == second.keys
            assert torch.equal(first.images, second.images)
            assert torch.equal(first.tokens, second.tokens)
    halves = [batches(0, rank, 2) for rank in range(2)]
    for whole_one, first, second in zip(whole, *halves, strict=True):
        assert whole_one.keys == first.keys + second.keys
        assert torch.equal(whole_one.images, torch.cat([first.images, second.images]))
    images: dict[str, list[torch.Tensor]] = {}
    for batch in whole[:4]:
        for key, image in zip(batch.keys, batch.images, strict=True):
            images.setdefault(key, []).append(image)
    repeated = [found for found in images.values() if len(found) > 1]
    assert len(repeated) >= 9
    assert all(not torch.equal(first, other) for first, *rest in repeated for other in rest)
    assert crop_box(5, 0, "k\0001", 40, 36, (0.3, 0.6)) != crop_box(5, 0, "k", 40, 36, (0.3, 0.6))
    assert any(caption_choice(5, 0, f"k\0{copy}", 9, 3) != caption_choice(5, 0, "k", 9, 3) for copy in (1, 2))


def test_an_unusable_sample_of_a_copy_is_replaced_and_named(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", n=9, shards=1)
    write_tar(tmp_path / "b" / "0.tar", [("bad.png", b"x"), ("bad.txt", b"y"), *sample("good", 1)])
    sets = [TrainSet(shards=["a/*.tar"]), TrainSet(shards=["b"], weight=3)]
    index = open_sets(sets, tmp_path)
    assert index.images == 15
    loader = train_loader(
        index, seed=0, batch=15, image_size=16, captions=1, context_length=9, start_step=0, total_steps=1
    )
    (batch,) = list(loader)
    assert batch.skipped["image"] >= 3
    assert "bad" not in batch.keys
    assert len(batch) == 15


def test_weights_are_a_part_of_the_identity(tmp_path: Path) -> None:
    found = {two_sets(tmp_path, *weights).fingerprint for weights in [(1, 1), (2, 1), (1, 2), (2.5, 1)]}
    assert len(found) == 4
    assert len({two_sets(tmp_path, *weights).content for weights in [(1, 1), (2.5, 1)]}) == 1


def test_sets_are_counted_apart(tmp_path: Path) -> None:
    write_tar(tmp_path / "b" / "2.tar", [("lone.txt", b"x"), *sample("c", 0)])
    make_shards(tmp_path / "a", n=11, shards=3)
    index = open_sets([TrainSet(shards=["a/*.tar"], weight=1.5), "b"], tmp_path)
    first, second = index.sets
    assert (first["shards"], first["weight"], first["samples"], first["images"]) == ("a/*.tar", 1.5, 11, 16)
    assert (first["account"]["unused"], second["account"]["unused"]) == ({}, {"no_image": 1})
    assert index.account.unused == {"no_image": 1}
    assert index.account.first["no_image"] == "b: 2.tar: lone.txt"
    assert index.account.used["shard"] == 4


def test_each_set_has_captions_of_its_own_table(tmp_path: Path) -> None:
    """The keys of the sets are alike, as those of img2dataset; a third set has no table."""
    sets: list[TrainSet | str] = ["c/*.tar"]
    for name in "cba":
        make_shards(tmp_path / name, n=9, shards=3, captions=1)
        keys = [f"{at // 3:04d}{at:05d}" for at in range(9)]
        (tmp_path / f"{name}.csv").write_text("key,caption\n" + "".join(f"{key},{name} {key}\n" for key in keys[:-1]))
        if name != "c":
            sets.insert(0, TrainSet(shards=[f"{name}/*.tar"], captions_csv=f"{name}.csv", weight=1.5))
    index = open_sets(sets, tmp_path)
    reader, own = SampleReader(index), SampleReader(open_index("c/*.tar", tmp_path))
    for at in range(27):
        entry = index.entry(at)
        name = index.shards[entry.shard].parent.name
        plain = name == "c" or at % 9 == 8  # the last sample has no row
        assert reader.captions(entry).texts == (
            own.captions(own.index.entry(at % 9)).texts if plain else [f"{name} {entry.key}"]
        )
    assert [one["account"]["used"].get("row", 0) for one in index.sets] == [8, 8, 0]
    assert index.account.used["row"] == 16
    found = check(index, workers=1)
    assert found.table == (16, {"caption": 16})
    assert index.fingerprint != open_sets(["a", "b", "c"], tmp_path).fingerprint
    (tmp_path / "b.csv").write_text("key,caption\n000000000,b\n")
    with pytest.raises(DataError, match=r"1 of 9 samples have a row in .*b\.csv"):
        open_sets(sets, tmp_path)


def test_one_table_for_every_set_is_read_as_without_sets(tmp_path: Path) -> None:
    two_sets(tmp_path)
    single = open_index(["a/*.tar", "b/*.tar"], tmp_path)
    rows = "".join(f"{single.key(at)},of {at}\n" for at in range(18))
    (tmp_path / "t.csv").write_text(f"key,caption\n{rows}")
    mixed = open_sets([TrainSet(shards=[f"{name}/*.tar"], captions_csv="t.csv") for name in "ab"], tmp_path)
    single = open_index(["a/*.tar", "b/*.tar"], tmp_path, captions_csv=tmp_path / "t.csv")
    assert (mixed.fingerprint, mixed.content) == (single.fingerprint, single.content)


def test_a_shard_in_two_sets_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path / "a", n=4, shards=2)
    with pytest.raises(DataError, match=r"000001\.tar is in two sets"):
        open_sets([TrainSet(shards=["a"]), TrainSet(shards=["a/000001.tar"])], tmp_path)


def test_how_often_a_shard_comes_does_not_depend_on_other_shards() -> None:
    """The sum is right for shards of one sample, too."""
    mixture = Mixture.of([(2.3, np.ones(100, np.int64))])
    assert int(mixture.sizes.sum()) == 230
    assert set(mixture.sizes.tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("[{shards: a, weight: 0}]", "data.train.0.weight = 0: should be greater than 0"),
        ("[b, {shard: a}]", r"data.train.1.shard = 'a': unknown key \(did you mean 'shards'\?\)"),
        ("[{weight: 2}]", "data.train.0.shards: is missing"),
        ("[{shards: []}]", "data.train.0.shards: should not be empty"),
        ("[3]", "data.train.0 = 3: should be a valid string"),
    ],
)
def test_mistakes_in_sets_are_named(root: Path, train: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(root / "recipes" / "demo.yaml", [f"data.train={train}"])


def test_a_recipe_with_sets_comes_back_from_its_file(root: Path) -> None:
    path = root / "recipes" / "demo.yaml"
    single = load_recipe(path)
    mixed = load_recipe(path, ["data.train=[{shards: a/*.tar, weight: 2.5}, b/*.tar]", "data.train.0.weight=3"])
    assert mixed.data.train == [TrainSet(shards=["a/*.tar"], weight=3.0), "b/*.tar"]
    assert mixed.result_fields() == single.result_fields()
    values = mixed.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert type(mixed).model_validate(values) == mixed
    with pytest.raises(ConfigError, match="captions_csv: goes with one set; give each set of train its own"):
        load_recipe(path, ["data.train={shards: a, weight: 2}", "data.captions_csv=x.csv"])
