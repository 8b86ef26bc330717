"""The emoji data set: colour emoji of seven open styles, 16 English captions each, split by style and concept.

`build` writes the set as WebDataset shards, from the sample that comes with compt.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from compt.emoji.sample import TEST_STYLE, VALIDATION_STYLE, Concept, EmojiSet, Pixels, read_sample, subgroup_text
from compt.errors import DataError, RunError
from compt.files import new_folder, read_json, sha256_file, write_json

KIND = "compt emoji"
TRAIN_SHARDS = 8
TEMPLATES = ("{c}", "a picture of {c}", "an emoji of {c}", "a drawing of {c}")


@dataclass(frozen=True)
class Sample:
    """One image of one style."""

    style: str
    concept: Concept
    pixels: Pixels

    @property
    def key(self) -> str:
        """The sample's key, unique in the whole set."""
        return f"{self.style}_{self.concept.id}"


def build(out: Path) -> dict[str, Any]:
    """Write the set to `out`: train/, val_style/, test_style/, val_concepts/, test_concepts/ and manifest.json.

    Returns the manifest. An earlier set in `out` is replaced; any other folder with files in it is refused. The bytes
    are the same each time. Raises DataError.
    """
    return lay_out(read_sample(), out, "sample")


def split(emoji: EmojiSet) -> dict[str, list[Sample]]:
    """The samples of every folder, ordered by the hashes of their keys.

    `train` has no held-out concept and no drawing of the validation and test styles. `*_style` has the concepts that
    training shows in another style, `*_concepts` those that training never shows.
    """
    training = [style for style in emoji.drawings if style not in (VALIDATION_STYLE, TEST_STYLE)]
    known = {i for style in training for i in emoji.drawings[style] if not emoji.concepts[i].held_out}

    def chosen(styles: Iterable[str], inside: bool) -> list[Sample]:
        samples = [
            Sample(style, emoji.concepts[identity], pixels)
            for style in styles
            for identity, pixels in emoji.drawings.get(style, {}).items()
            if (identity in known) is inside
        ]
        return sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode()).digest())

    return {
        "train": chosen(training, True),
        "val_style": chosen([VALIDATION_STYLE], True),
        "test_style": chosen([TEST_STYLE], True),
        "val_concepts": chosen([VALIDATION_STYLE], False),
        "test_concepts": chosen([TEST_STYLE], False),
    }


def lay_out(emoji: EmojiSet, out: Path, source: str) -> dict[str, Any]:
    """Write shards, class files and manifest; returns the manifest. Raises DataError if `out` cannot be written."""
    _check_free(out)
    folders = split(emoji)
    if not folders["train"]:
        raise DataError("no training images in the emoji set")
    groups = list(dict.fromkeys(concept.group for concept in emoji.concepts.values()))
    subgroups = list(dict.fromkeys(concept.subgroup for concept in emoji.concepts.values()))
    try:
        with new_folder(out) as folder:
            manifest = {
                "kind": KIND,
                "size": emoji.size,
                "source": source,
                "held_out_concepts": sum(concept.held_out for concept in emoji.concepts.values()),
                "splits": {
                    name: _write_split(folder / name, samples, groups, subgroups) for name, samples in folders.items()
                },
                "sources": emoji.sources,
                "dropped": dict(sorted(emoji.dropped.items())),
            }
            write_json(folder / "manifest.json", manifest)
    except RunError as error:
        raise DataError(str(error)) from error
    return manifest


def _write_split(place: Path, samples: list[Sample], groups: list[str], subgroups: list[str]) -> dict[str, Any]:
    """Write one folder of the set; returns its entry in the manifest."""
    place.mkdir()
    training = place.name == "train"
    classes = sorted({sample.concept.name for sample in samples}, key=lambda text: (text.casefold(), text))
    shards = {}
    for number, part in enumerate(_parts(samples, TRAIN_SHARDS if training else 1)):
        path = place / f"emoji-{place.name.replace('_', '-')}-{number:06d}.tar"
        _write_shard(path, part, {} if training else _index(classes), _index(groups), _index(subgroups))
        shards[path.name] = {"samples": len(part), "sha256": sha256_file(path)}
    if not training:
        _lines(place / "classnames.txt", classes)
        _lines(place / "classnames_group.txt", map(subgroup_text, groups))
        _lines(place / "classnames_subgroup.txt", map(subgroup_text, subgroups))
        _lines(place / "zeroshot_classification_templates.txt", TEMPLATES)
    styles = Counter(sample.style for sample in samples)
    counts = {"samples": len(samples), "concepts": len(classes), "styles": dict(sorted(styles.items()))}
    return {**counts, "shards": shards}


def _check_free(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; name a folder")
    if not any(out.iterdir()):
        return
    try:
        ours = read_json(out / "manifest.json")["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise DataError(f"{out} has other files in it; name a new folder")


def _parts(samples: list[Sample], count: int) -> list[list[Sample]]:
    """`count` parts of nearly equal length; fewer where some would be empty."""
    count = min(count, len(samples))
    edges = [len(samples) * number // count for number in range(count + 1)] if count else [0]
    return [samples[start:end] for start, end in itertools.pairwise(edges)]


def _index(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _encode(pixels: Pixels) -> bytes:
    """PNG without compression: it decodes fastest, and its bytes do not depend on the version of zlib."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _write_shard(
    path: Path, samples: Iterable[Sample], classes: dict[str, int], groups: dict[str, int], subgroups: dict[str, int]
) -> None:
    """Write `<key>.png`, `<key>.json` and, with `classes`, `<key>.cls` of each sample."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            concept = sample.concept
            text: dict[str, Any] = {
                "captions": list(concept.captions),
                "name": concept.name,
                "concept": concept.id,
                "style": sample.style,
                "group": groups[concept.group],
                "subgroup": subgroups[concept.subgroup],
            }
            members = {"png": _encode(sample.pixels), "json": json.dumps(text).encode()}
            if classes:
                members["cls"] = str(classes[concept.name]).encode()
            for extension, data in members.items():
                # A new TarInfo has mtime 0, owner 0 and mode 644, so the shard is the same on every machine.
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
