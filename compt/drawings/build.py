"""A set of drawings in several styles with captions, split by style and by concept, and its WebDataset shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compt.errors import DataError, RunError
from compt.files import new_folder, read_json, sha256_file, write_json

TRAIN_SHARDS = 8

HELD_OUT_SHARE = 0.105
"""Share of concept families that no training shard shows."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Concept:
    """What a drawing shows, in all styles.

    The id of an emoji: its code points in hexadecimal, without U+FE0F, joined by '-'. The id of an icon: the words of
    its name, joined by '-'.
    """

    id: str
    name: str
    group: str
    subgroup: str
    captions: tuple[str, ...]

    @property
    def family(self) -> str:
        """The id without gender and direction: 'man running' and 'woman running facing right' are one family."""
        # Drop ♀, ♂ and → with the joiner before them; man and woman become person, boy and girl become child.
        neutral = re.sub(r"(-200d)?-(2640|2642|27a1)\b", "", self.id)
        return re.sub(r"\b1f46[67]\b", "1f9d2", re.sub(r"\b1f46[89]\b", "1f9d1", neutral))

    @property
    def held_out(self) -> bool:
        """Whether training must not show this concept. Only the family's hash decides."""
        digest = hashlib.sha256(f"held out: {self.family}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


@dataclass
class DrawingSet:
    """Drawings by style and concept id, uint8 [size, size, 3] on white, and the concepts that they show.

    `kind` is "emoji" or "icon". `subgroup_texts`: subgroups in words, where their name does not read well. Training
    sees no drawing of the styles in `validation` and `test`.
    """

    kind: str
    size: int
    concepts: dict[str, Concept]
    drawings: dict[str, dict[str, Pixels]]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    subgroup_texts: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def templates(self) -> tuple[str, ...]:
        """Sentences for zero-shot classification."""
        return ("{c}", "a picture of {c}", f"an {self.kind} of {{c}}", "a drawing of {c}")


def subgroup_text(subgroup: str, texts: Mapping[str, str]) -> str:
    """A group or subgroup in words: 'animal-mammal' is 'animal mammal'. `texts` has those that do not read well."""
    return texts.get(subgroup) or re.sub(r"[-_\s]+", " ", subgroup.replace("&", " and ")).lower()


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


def split(drawn: DrawingSet) -> dict[str, list[Sample]]:
    """The samples of every folder, ordered by the hashes of their keys.

    `train` has no held-out concept and no drawing of the validation and test styles. `*_style` has the concepts that
    training shows in another style, `*_concepts` those that training never shows. `test_pairs` has one drawing of each
    concept in `test_style`, if that has several.
    """
    training = [style for style in drawn.drawings if style not in (*drawn.validation, *drawn.test)]
    known = {i for style in training for i in drawn.drawings[style] if not drawn.concepts[i].held_out}

    def chosen(styles: Iterable[str], inside: bool) -> list[Sample]:
        samples = [
            Sample(style, drawn.concepts[identity], pixels)
            for style in styles
            for identity, pixels in drawn.drawings.get(style, {}).items()
            if (identity in known) is inside
        ]
        return sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode()).digest())

    folders = {
        "train": chosen(training, True),
        "val_style": chosen(drawn.validation, True),
        "test_style": chosen(drawn.test, True),
        "val_concepts": chosen(drawn.validation, False),
        "test_concepts": chosen(drawn.test, False),
    }
    # Retrieval needs captions that belong to one image.
    pairs = list({sample.concept.id: sample for sample in folders["test_style"]}.values())
    return folders if len(pairs) == len(folders["test_style"]) else {**folders, "test_pairs": pairs}


def lay_out(drawn: DrawingSet, out: Path, source: str) -> dict[str, Any]:
    """Write train/, val_style/, test_style/, val_concepts/, test_concepts/ and manifest.json to `out`.

    Returns the manifest. An earlier set of the same kind in `out` is replaced; any other folder with files in it is
    refused. The same set gives the same bytes. Raises DataError.
    """
    facts = {
        "size": drawn.size,
        "source": source,
        "held_out_concepts": sum(concept.held_out for concept in drawn.concepts.values()),
        "splits": {},  # in its old place: the hash of the manifest is published
        "sources": drawn.sources,
        "dropped": dict(sorted(drawn.dropped.items())),
    }
    groups = {
        key: {name: subgroup_text(name, drawn.subgroup_texts) for name in names}
        for key, names in (
            ("group", [concept.group for concept in drawn.concepts.values()]),
            ("subgroup", [concept.subgroup for concept in drawn.concepts.values()]),
        )
    }
    return write_set(out, drawn.kind, split(drawn), facts, drawn.templates, groups)


def write_set(
    out: Path,
    kind: str,
    folders: Mapping[str, list[Sample]],
    facts: Mapping[str, Any],
    templates: Sequence[str],
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Write `folders`, of which `train` is one, and manifest.json with `facts` and "splits", as `lay_out` does.

    `groups`: names of groups and subgroups, and what the class files say for them.
    """
    _check_free(out, f"compt {kind}")
    if not folders["train"]:
        raise DataError(f"no training images in the {kind} set")
    try:
        with new_folder(out) as folder:
            splits = {
                name: _write_split(folder / name, kind, samples, templates, groups or {})
                for name, samples in folders.items()
            }
            manifest = {"kind": f"compt {kind}", **facts, "splits": splits}
            write_json(folder / "manifest.json", manifest)
    except RunError as error:
        raise DataError(str(error)) from error
    return manifest


def _write_split(
    place: Path,
    kind: str,
    samples: list[Sample],
    templates: Sequence[str],
    groups: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Write one folder of the set; returns its entry in the manifest."""
    place.mkdir()
    training = place.name == "train"
    classes = sorted({sample.concept.name for sample in samples}, key=lambda text: (text.casefold(), text))
    numbers = {key: _index(list(names)) for key, names in groups.items()}
    shards = {}
    for number, part in enumerate(_parts(samples, TRAIN_SHARDS if training else 1)):
        path = place / f"{kind}-{place.name.replace('_', '-')}-{number:06d}.tar"
        _write_shard(path, part, {} if training else _index(classes), numbers)
        shards[path.name] = {"samples": len(part), "sha256": sha256_file(path)}
    if not training:
        _lines(place / "classnames.txt", classes)
        for key, names in groups.items():
            _lines(place / f"classnames_{key}.txt", names.values())
        _lines(place / "zeroshot_classification_templates.txt", templates)
    styles = Counter(sample.style for sample in samples)
    counts = {"samples": len(samples), "concepts": len(classes), "styles": dict(sorted(styles.items()))}
    return {**counts, "shards": shards}


def _check_free(out: Path, kind: str) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; name a folder")
    if not any(out.iterdir()):
        return
    try:
        ours = read_json(out / "manifest.json")["kind"] == kind
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


def difference(stack: NDArray[np.int16], pixels: NDArray[Any]) -> float:
    """The least mean difference of `pixels` [height, width, 3] from one of `stack` [n, height, width, 3]."""
    return float(np.abs(stack - pixels).mean(axis=(1, 2, 3)).min())


def _write_shard(
    path: Path, samples: Iterable[Sample], classes: Mapping[str, int], groups: Mapping[str, Mapping[str, int]]
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
                **{key: numbers[getattr(concept, key)] for key, numbers in groups.items()},
            }
            members = {"png": _encode(sample.pixels), "json": json.dumps(text).encode()}
            if classes:
                members["cls"] = str(classes[concept.name]).encode()
            for extension, data in members.items():
                # A new TarInfo has mtime 0, owner 0 and mode 644, so the shard is the same on every machine.
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
