"""The files of a folder of images, and folders with one sub-folder per class, as torchvision's ImageFolder reads."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from compt.data.account import Account
from compt.data.decode import MAX_BYTES, Unusable
from compt.data.labels import WNID, read_classnames
from compt.data.names import FOREIGN, IMAGE_EXTENSIONS, image_stem, is_hidden
from compt.data.samples import EvalSample
from compt.errors import DataError

ClassOrder = Literal["name", "number"]

_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})
_SYSTEM = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
"""Folders that operating systems and network drives add. No class is called so."""


@dataclass(frozen=True)
class ClassFolders:
    """Images with their class numbers.

    fingerprint: hash of the images' names and sizes in bytes, in the order of the classes. account: all files there.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    fingerprint: str
    account: Account = field(default_factory=Account)

    def __len__(self) -> int:
        return len(self.files)

    def describe(self, sample: int) -> str:
        """The path."""
        return str(self.files[sample])

    def image(self, sample: int) -> bytes:
        """The file. Raises Unusable."""
        return read_image(self.files[sample])

    def read(self, sample: int) -> EvalSample:
        """The file and its class."""
        return EvalSample(self.key(sample), self.image(sample), self.labels[sample])

    def key(self, sample: int) -> str:
        """The path below the folder."""
        return self.files[sample].relative_to(self.folder).as_posix()


def read_image(path: Path) -> bytes:
    """An image's file. Raises Unusable."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Unusable("image", error.strerror or str(error)) from None
    if len(data) > MAX_BYTES:
        raise Unusable("image", f"more than {MAX_BYTES:,} bytes")
    return data


def class_folders_of(data: Sequence[str], base: Path) -> Path | None:
    """The folder of class folders that the `data` of an evaluation set names; None where `data` names shards.

    Raises DataError for a folder of images without class folders, and for one of class folders and shards.
    """
    path = base / Path(data[0]).expanduser()
    if len(data) > 1 or not path.is_dir():
        return None
    entries = _entries(path)
    classes = [Path(item.path) for item in entries if _is_class(item)]
    tar = next((item.name for item in entries if item.name.lower().endswith(".tar")), None)
    if tar is not None:
        both = next((place.name for place in classes if any(image_stem(item.name) for item in _entries(place))), None)
        if both is not None:
            raise DataError(
                f"{path} has tars, such as {tar}, and folders of images, such as {both}: move the tars, or name them "
                f"as {path / '*.tar'}"
            )
        return None
    if classes:
        return path
    images = sum(bool(image_stem(item.name)) for item in entries if not item.name.startswith("."))
    if images:
        raise DataError(
            f"{path} has {images:,} images and no class folders: move each image to the folder of its class "
            "(for the 50,000 validation images of ImageNet, torch's script valprep.sh does that)"
        )
    return None


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them: 2 before 10."""
    return [(int(part), "") if at % 2 else (0, part) for at, part in enumerate(re.split(r"([0-9]+)", name))]


def _is_class(item: os.DirEntry[str]) -> bool:
    return Path(item.path).is_dir() and not item.name.startswith(".") and item.name not in _SYSTEM


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda item: item.name)
    except OSError as error:
        raise DataError(f"folder {path}: cannot be read: {error.strerror}") from error


def _lose_all(account: Account, place: Path) -> None:
    """Count every file below a hidden or system folder."""
    for folder, _, names in os.walk(place):
        for name in names:
            account.lose("hidden_file", str(Path(folder, name)))


def files_below(
    place: Path, account: Account, leave_out: Path | None = None, above: tuple[str, ...] = ()
) -> Iterator[Path]:
    """The plain files that are not hidden, by name. Others are counted.

    Links to folders are followed, as torchvision does, but not in circles. leave_out: a folder that is passed over.
    Raises DataError.
    """
    real = os.path.realpath(place)
    if real in above:
        account.lose("circle", str(place))
        return
    for item in _entries(place):
        path = Path(item.path)
        # Unlike the entry's own methods, those of Path take a link to itself for a broken one.
        if path.is_dir():
            if not _is_class(item):
                _lose_all(account, path)
            elif leave_out is None or path.resolve() != leave_out:
                yield from files_below(path, account, leave_out, (*above, real))
        elif is_hidden(item.name):
            account.lose("hidden_file", item.path)
        elif not path.is_file():
            account.lose("not_file", item.path)
        else:
            yield path


def _images(place: Path, account: Account) -> Iterator[Path]:
    """The images below a class folder."""
    for path in files_below(place, account):
        if image_stem(path.name):
            account.used["file"] += 1
            yield path
        else:
            foreign = path.suffix[1:].lower() in FOREIGN
            account.lose("foreign_file" if foreign else "not_image", str(path))


def read_class_folders(folder: Path, order: ClassOrder | None = None) -> ClassFolders:
    """All images below the sub-folders. Classes are numbered in the order of the sub-folders' names, or by the numbers
    in these names.

    Raises DataError for a class folder without an image, and for a folder that holds splits or one folder alone.
    """
    account = Account()
    places: list[Path] = []
    for item in _entries(folder):
        path = Path(item.path)
        if _is_class(item):
            places.append(path)
        elif path.is_dir():
            _lose_all(account, path)
        elif item.is_symlink() and not path.exists():
            raise DataError(f"{path} is a broken link, perhaps to a class: fix it, or remove it")
        elif is_hidden(item.name):
            account.lose("hidden_file", item.path)
        elif not image_stem(item.name):
            account.lose("beside", item.path)
        else:
            account.lose("outside" if path.is_file() else "not_file", item.path)
    _check_layout(folder, [place.name for place in places])
    if order == "number":
        for place in places:
            if not re.search("[0-9]", place.name):
                raise DataError(f"class folder {place}: has no number; leave out class_order: number")
        places.sort(key=lambda place: natural(place.name))
    files: list[Path] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for label, place in enumerate(places):
        found = sorted(_images(place, account))
        if not found:
            raise DataError(f"class folder {place} has no image ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        files += found
        labels += [label] * len(found)
        # Names and sizes only: to read 50,000 images takes minutes on a network drive.
        for path in found:
            name = os.fsencode(path.relative_to(folder).as_posix())
            digest.update(name + f"\0{path.stat().st_size}\0".encode())
    names = tuple(place.name for place in places)
    return ClassFolders(folder, names, tuple(files), tuple(labels), digest.hexdigest(), account)


def _check_layout(folder: Path, names: list[str]) -> None:
    """Raise DataError where the sub-folders are no classes."""
    if len(names) > 1 and _SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"{folder} has the splits {', '.join(names)}, not classes: name one of them: {folder / names[0]}"
        )
    if len(names) == 1:
        raise DataError(
            f"{folder} has only one folder, so there is only one class; if the class folders are below it, "
            f"name {folder / names[0]}"
        )


def check_order(names: Sequence[str], folder: Path, order: ClassOrder | None, source: str) -> None:
    """Raise DataError where it is unclear which line of the class names in `source` belongs to which folder."""
    by_name, by_number = sorted(names), sorted(names, key=natural)
    if order is None and by_name != by_number:
        at = next(at for at, (one, other) in enumerate(zip(by_name, by_number, strict=True)) if one != other)
        raise DataError(
            f"class folders {folder}: line {at + 1} of {source} belongs to folder '{by_name[at]}' if folders count by "
            f"name (as in torchvision's ImageFolder), and to '{by_number[at]}' if they count by number (as in "
            "ImageNetV2): set class_order to name or number for this set (--class-order of compt eval)"
        )


def check_names(classes: Sequence[str], lines: Sequence[str], source: str) -> None:
    """Raise DataError where the class names are those of the folders in another order."""
    own = [_plain(name) for name in classes]
    given = [_plain(line) for line in lines]
    if own != given and sorted(own) == sorted(given) and len(set(own)) == len(own):
        at = next(at for at, (one, other) in enumerate(zip(own, given, strict=True)) if one != other)
        raise DataError(
            f"class names {source}: line {at + 1} is '{lines[at]}', but the class with that number is folder "
            f"'{classes[at]}': put the lines into the order of the folders, or remove the file"
        )


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name)).casefold()


def read_names(path: Path, classes: Sequence[str], folder: Path, order: ClassOrder | None) -> list[str]:
    """The class names in a file, for the class folders below `folder`. Raises DataError where they do not fit."""
    names = read_classnames(path)
    if len(names) != len(classes):
        raise DataError(f"class names {path}: {len(names)} for the {len(classes)} folders in {folder}")
    check_order(classes, folder, order, str(path))
    check_names(classes, names, str(path))
    return names


def folder_names(classes: Sequence[str]) -> list[str]:
    """Class names made of the names of class folders. WordNet identifiers become ImageNet's class names."""
    return imagenet_names(classes) if are_wnids(classes) else [name.replace("_", " ") for name in classes]


def are_wnids(names: Iterable[str]) -> bool:
    """Whether all names are identifiers of WordNet's nouns, as ImageNet's folders are: n01440764."""
    return all(map(WNID.fullmatch, names))


def imagenet_names(wnids: Sequence[str]) -> list[str]:
    """The class name of each WordNet identifier.

    The 1,000 classes of ILSVRC have open_clip's names (OpenAI's). Other nouns have the first word that WordNet lists.
    Raises DataError for an identifier that ImageNet does not have.
    """
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    # Both lists are in the order of the sorted identifiers.
    known = dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))
    rest = [wnid for wnid in wnids if wnid not in known]
    if rest:
        words = ImageNetInfo("imagenet-22k")
        try:
            known |= {wnid: words.label_name_to_description(wnid, detailed=False).split(",")[0] for wnid in rest}
        except KeyError as error:
            raise DataError(f"class folder {error.args[0]}: ImageNet has no such class; add classnames.txt") from None
    return [known[wnid] for wnid in wnids]
