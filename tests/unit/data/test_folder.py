"""Class folders as ImageNet, ImageNetV2 and torchvision lay them out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from compt.data.folder import ClassFolders, class_folders_of, imagenet_names, read_class_folders
from compt.errors import DataError
from compt.evaluate.sets import open_set
from compt.evaluate.task import EvalSettings
from compt.evaluate.zeroshot import ZeroShot
from compt.models.preprocess import AS_OPENAI
from compt.recipe.schema import EvalSet
from tests.helpers.shards import make_shards, picture

IMAGE = picture(0, 8, 8)


def folders(root: Path, names: list[str], file: str = "0.JPEG") -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / file).write_bytes(IMAGE)
    return root


def opened(root: Path, **fields: str) -> ZeroShot:
    settings = EvalSettings(AS_OPENAI, root)
    task = open_set(EvalSet.model_validate({"name": "set", "data": [str(root)], **fields}), settings)
    assert isinstance(task, ZeroShot)
    return task


def named(task: ZeroShot) -> dict[str, str]:
    """The class name that each folder's images get."""
    assert isinstance(task.data.samples, ClassFolders)
    data = task.data.samples
    return {path.parent.name: task.names[label] for path, label in zip(data.files, data.labels, strict=True)}


NUMBERS = [str(number) for number in range(12)]


@pytest.mark.parametrize("pattern", ["{}", "class_{}", "{}_thing"])
def test_numbered_folders_need_an_order(tmp_path: Path, pattern: str) -> None:
    root = folders(tmp_path, [pattern.format(number) for number in NUMBERS])
    (root / "classnames.txt").write_text("".join(f"name {number}\n" for number in NUMBERS))
    with pytest.raises(DataError) as error:
        opened(root)
    shown = {pattern.format(number) for number in NUMBERS if f"'{pattern.format(number)}'" in str(error.value)}
    assert len(shown) == 2
    assert shown & {pattern.format(10), pattern.format(11)}
    assert "count by name" in str(error.value)
    assert "count by number" in str(error.value)
    assert "class_order" in str(error.value)
    by_number = opened(root, class_order="number")
    assert named(by_number) == {pattern.format(number): f"name {number}" for number in NUMBERS}
    by_name = opened(root, class_order="name")
    theirs = ImageFolder(str(root))
    assert named(by_name) == {name: by_name.names[label] for name, label in theirs.class_to_idx.items()}
    assert by_name.pins()["data"] != by_number.pins()["data"]


@pytest.mark.parametrize("names", [[f"{number:03d}" for number in range(12)], ["cat", "dog"], NUMBERS[:10]])
def test_where_both_orders_agree_none_is_needed(tmp_path: Path, names: list[str]) -> None:
    root = folders(tmp_path, names)
    (root / "classnames.txt").write_text("".join(f"name of {name}\n" for name in names))
    assert named(opened(root)) == {name: f"name of {name}" for name in names}


def test_numbered_folders_without_names_are_read_with_a_warning(tmp_path: Path, caplog) -> None:
    assert named(opened(folders(tmp_path, NUMBERS))) == {number: number for number in NUMBERS}
    assert "the class names are numbers" in caplog.text


def test_numbers_in_front_of_the_names_of_folders_are_named(tmp_path: Path, caplog) -> None:
    opened(folders(tmp_path, ["001.Black_footed_Albatross", "002.Laysan_Albatross"]))
    assert "folders with numbers, such as '001.Black_footed_Albatross'" in caplog.text


def test_tars_beside_folders_of_images_are_refused(tmp_path: Path) -> None:
    folders(tmp_path, ["a", "b"])
    make_shards(tmp_path, n=4, shards=1)
    with pytest.raises(DataError, match=r"has tars, such as .*\.tar, and folders of images, such as a: .*\*\.tar"):
        class_folders_of([str(tmp_path)], Path())
    assert class_folders_of([str(tmp_path / "*.tar")], Path()) is None


def test_an_order_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cat: has no number"):
        opened(folders(tmp_path / "words", ["cat", "dog"]), class_order="number")
    make_shards(tmp_path / "shards", n=2, shards=1, classes=2)
    with pytest.raises(DataError, match="class_order is for class folders"):
        opened(tmp_path / "shards", class_order="name")


def test_class_names_in_another_order_than_the_folders_are_refused(tmp_path: Path) -> None:
    root = folders(tmp_path, ["ant", "blue_dog"])
    (root / "classnames.txt").write_text("Blue Dog\nant\n")
    with pytest.raises(DataError, match=r"line 1 is 'Blue Dog', but the class with that number is folder 'ant'"):
        opened(root)


def test_wordnet_folders_get_the_names_of_imagenet(tmp_path: Path, caplog) -> None:
    root = folders(tmp_path, ["n01440764", "n02084071", "n15075141"])
    with caplog.at_level(logging.WARNING):
        assert named(opened(root)) == {"n01440764": "tench", "n02084071": "dog", "n15075141": "toilet paper"}
    assert "WordNet identifiers" in caplog.text
    (root / "n99999999").mkdir()
    (root / "n99999999" / "0.png").write_bytes(IMAGE)
    with pytest.raises(DataError, match="n99999999: ImageNet has no such class"):
        opened(root)


def test_the_names_of_imagenet_agree_with_wordnet() -> None:
    """open_clip's names carry no identifiers: most must share a word with what WordNet lists for theirs."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = imagenet_names(info.label_names())
    assert len(set(names)) > 990
    words = [info.label_name_to_description(wnid).lower() for wnid in info.label_names()]

    def agree(name: str, listed: str) -> bool:
        return name.lower() in listed or any(word in name.lower() for word in listed.split(", "))

    assert sum(map(agree, names, words)) > 900
    assert sum(map(agree, names[1:] + names[:1], words)) < 100  # by chance


def test_other_files_are_counted_by_cause(tmp_path: Path, caplog) -> None:
    root = folders(tmp_path, ["ant", "bee"])
    (root / "ant" / "._0.JPEG").write_bytes(b"x")
    (root / "ant" / "notes.txt").write_text("x")
    (root / "ant" / "Thumbs.db").write_text("x")
    (root / "bee" / "0.AVIF").write_text("x")
    (root / "ant" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "ant" / "pipe.png")
    (root / "ant" / "above").symlink_to(root / "ant", target_is_directory=True)
    (root / "bee" / "@eaDir").mkdir()
    (root / "bee" / "@eaDir" / "0.jpg").write_bytes(IMAGE)
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints" / "0.jpg").write_bytes(IMAGE)
    (root / "loose.png").write_bytes(IMAGE)
    (root / "README").write_text("x")
    (root / "ant" / "loop").symlink_to("loop")
    task = opened(root)
    data = task.data.samples
    assert isinstance(data, ClassFolders)
    account = task.data.account
    assert account.unused == {
        "hidden_file": 4,
        "foreign_file": 1,
        "not_image": 1,
        "not_file": 3,
        "circle": 1,
        "outside": 1,
        "beside": 1,
    }
    assert [path.name for path in data.files] == ["0.JPEG", "0.JPEG"]
    # os.walk counts the image behind the link again for the folder above it: that link is one entry here
    assert account.used["file"] == len(data)
    assert account.read("file") == sum(len(names) for _, _, names in os.walk(root)) + 1
    assert account.first["not_file"].endswith("ant/gone.png")
    assert "image outside the class folders: 1" in account.line()


def test_linked_class_folders_are_read_as_torchvision_does(tmp_path: Path) -> None:
    folders(tmp_path / "store", ["ant", "bee"])
    (tmp_path / "set").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name, target_is_directory=True)
    (tmp_path / "store" / "ant" / "more").symlink_to(tmp_path / "store" / "bee", target_is_directory=True)
    ours = read_class_folders(tmp_path / "set")
    theirs = ImageFolder(str(tmp_path / "set")).samples
    assert [(str(path), label) for path, label in zip(ours.files, ours.labels, strict=True)] == theirs


def test_folders_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "imagenet", ["train/n01440764", "val/n01440764"])
    with pytest.raises(DataError, match=r"has the splits train, val, not classes: name one of them: .*/imagenet/train"):
        opened(root)
    wrapped = folders(tmp_path / "wrapped", ["imagenetv2/0", "imagenetv2/1"])
    with pytest.raises(DataError, match=r"has only one folder.*name .*/wrapped/imagenetv2"):
        opened(wrapped)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "ILSVRC2012_val_00000001.JPEG").write_bytes(IMAGE)
    with pytest.raises(DataError, match=r"has 1 images and no class folders.*valprep\.sh"):
        class_folders_of([str(tmp_path / "flat")], tmp_path)


def test_a_broken_link_that_may_be_a_class_is_refused(tmp_path: Path) -> None:
    """Left out, it would shift the numbers of the classes after it."""
    root = folders(tmp_path, ["ant", "bee"])
    (root / "ape").symlink_to("nowhere")
    with pytest.raises(DataError, match="ape is a broken link, perhaps to a class: fix it, or remove it"):
        opened(root)
