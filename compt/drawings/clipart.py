"""The clip art set: colour drawings by some 400 people, with the texts that they wrote, split by author.

Drawings and texts come from the Open Clip Art Library, as Debian packages it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from compt.drawings.build import Concept, Sample, difference, write_set
from compt.drawings.captions import Wording, choose_captions, clean, distinct, wording_table
from compt.drawings.debian import check_package, fetch_debian, package_files
from compt.drawings.packages import Package, require
from compt.drawings.svg import Drawing, read_all
from compt.text import terminal

SIZE = 32
"""Pixels a side: as the emoji and the icons, so that one model can train on all of them."""

FOLDER = "usr/share/openclipart/svg/"

LARGE = 0.03
"""An author with more than this share of the drawings is in the training set: one author is no test of many."""

TEST, VALIDATION = 0.15, 0.10
"""Shares of the drawings."""

ALIKE = 4
"""Drawings of one author with one name, at most: 1,375 stars differ in their points."""

SAME = 0.15
"""A drawing is a copy if it differs from another by less than this share of its own difference from white."""

CLASS_TRAINING, CLASS_DRAWINGS, CLASS_MOST = 10, 3, 25
"""Drawings of a class in the training set and in an evaluation set, at least; in the latter, at most: of flags, there
are more than of all other classes together."""


table = functools.partial(wording_table, "clipart")
"""Package, licences, authors, words, classes and sentences: `data/clipart.yaml`."""


def build(out: Path, size: int = SIZE, deb: Path | None = None) -> dict[str, Any]:
    """Render the drawings at `size` pixels and write the set to `out`; returns its manifest.

    Downloads the package with apt, if `deb` is not its file. Needs the packages of compt[data]. Raises DataError.
    """
    require("resvg_py")
    package = Package(**table()["package"])
    with tempfile.TemporaryDirectory(prefix="compt-clipart-") as folder:
        path = deb or fetch_debian(package, Path(folder))
        source = check_package(path, package)
        clips, dropped = read_clips(path, size)
    parts = split_authors(Counter(clip.author for clip in clips))
    clips = _drop_copies(clips, parts, dropped)
    folders = _folders(clips, parts, dropped)
    authors = {
        part: len({clip.author for clip in clips if parts[clip.author] == part}) for part in ("train", "val", "test")
    }
    facts = {
        "size": size,
        "source": "the file" if deb else "apt",
        "package": {**source, "pinned": source["version"] == package.version},
        "licence": "public domain (Creative Commons' dedication), as each drawing says",
        "renderer": importlib.metadata.version("resvg_py"),
        "authors": authors,
        "dropped": dict(sorted(dropped.items())),
    }
    return write_set(out, "clipart", folders, facts, table()["templates"])


@dataclass(frozen=True)
class Clip:
    """A drawing of a known author, and its cleaned texts: what it shows, a description or "", and keywords."""

    path: str
    author: str
    drawing: Drawing
    name: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The innermost folder in words: 'birds'."""
        return words_of(self.path.split("/")[-2]) if "/" in self.path else "drawing"

    @property
    def file(self) -> str:
        """The name of the file in words, without the author."""
        stem = self.path.rpartition("/")[2].removesuffix(".svg").lower()
        # Names are cut after 24 letters, with the author's at their end: 'duck_yellow_ii_kurt_cagl_01'.
        stem = re.sub(r"_(\d*[a-z]?)$", "", stem)
        slug = re.sub(r"[^a-z0-9.-]+", "_", clean(self.drawing.author).lower())
        for start in (match.start() for match in re.finditer("_", stem)):
            if len(stem) - start > 3 and slug.startswith(stem[start + 1 :]):
                stem = stem[:start]
                break
        return words_of(" ".join(word for word in re.split(r"[_ -]", stem) if word not in table()["file_words"]))


def author_of(text: str) -> str:
    """One name for all spellings of an author: words in alphabetical order. Of several authors, the first; or ""."""
    text = re.split(r"\band\b|&|\bet al\b", re.sub(r"\(.*?\)|\[.*?\]", "", clean(text).lower()))[0]
    name = " ".join(sorted(re.findall(r"[a-z]{1,30}", text.replace(".", ""))))
    name = table()["authors"].get(name, name)
    return name if len(name) > 1 and name not in table()["no_authors"] else ""


def words_of(text: str) -> str:
    """A title or the name of a file as words in small letters, without numbers at the ends: 'black and white cat'."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", clean(text)).lower()
    text = re.sub(r"\(?\bb(?:lack)? and w(?:hite)?\b\)?|\bbw\b", "black and white", text)
    words = [word.strip("'") for word in re.findall(r"[a-z0-9']+", text)]
    words = [re.sub(r"(?<=[a-z])\d+$", "", word) for word in words]
    while words and re.search(r"\d", words[-1]):
        words.pop()
    while words and re.search(r"\d", words[0]):
        words.pop(0)
    return " ".join(word for word in words if word)[:80].strip()


def read_clips(path: Path, size: int) -> tuple[list[Clip], Counter[str]]:
    """The drawings with a name, and the number of drawings left out by cause. Raises DataError."""
    clips: list[Clip] = []
    dropped: Counter[str] = Counter()
    seen = set()
    drawings = read_all(package_files(path, below=FOLDER), size)
    # The number of drawings in the pinned version.
    for name, drawing in track(drawings, "rendering clip art", 7458, console=terminal(stderr=True)):
        if isinstance(drawing, str):
            dropped[drawing] += 1
        elif not (author := author_of(drawing.author)):
            dropped["no author"] += 1
        elif drawing.licence not in table()["licences"]:
            dropped["not in the public domain"] += 1
        elif (pixels := drawing.pixels.tobytes()) in seen:
            dropped["same pixels as another drawing"] += 1
        else:
            seen.add(pixels)
            clips.append(Clip(name, author, drawing))
    return _name(clips, dropped), dropped


def _name(clips: list[Clip], dropped: Counter[str]) -> list[Clip]:
    """The clips with their texts; those without a name, and those of too many alike, are dropped.

    Several authors gave one title or description to all drawings of a batch: it says nothing about one of them.
    """
    titles = Counter(
        (clip.author, clip.drawing.title) for clip in clips if not clip.file.startswith(words_of(clip.drawing.title))
    )
    descriptions = Counter((clip.author, clip.drawing.description) for clip in clips)
    keywords = {clip.path: keywords_of(clip) for clip in clips}
    frequency = Counter(word for words in keywords.values() for word in words)
    alike: Counter[tuple[str, str]] = Counter()
    named = []
    for clip in clips:
        own = tuple(sorted(keywords[clip.path], key=lambda word: (frequency[word], word)))
        title = words_of(without_author(re.sub(r"(?i)^clip ?art by .*", "", clip.drawing.title), clip))
        name = title if titles[clip.author, clip.drawing.title] < 2 and title else clip.file
        description = without_author(clip.drawing.description, clip)[:200]
        if clip.author in table()["not_english"]:
            name = description = ""
        if descriptions[clip.author, clip.drawing.description] > 2 or description.count(" ") < 2:
            description = ""
        name = name if re.search("[a-z]{2}", name) else next(iter(own), "")
        if not name:
            dropped["no caption"] += 1
        elif alike[clip.author, name] == ALIKE:
            dropped[f"more than {ALIKE} drawings with one name by one author"] += 1
        else:
            alike[clip.author, name] += 1
            named.append(replace(clip, name=name, description=description, keywords=own))
    return named


def without_author(text: str, clip: Clip) -> str:
    """A text without 'by AUTHOR'."""
    author = r"\W+".join(map(re.escape, clean(clip.drawing.author).split()))
    return re.sub(rf"(?i)\W*\b(drawn |made |created )?by\W+{author}\b", "", clean(text))


def keywords_of(clip: Clip) -> list[str]:
    """The keywords that say something about the drawing."""
    parts = (part for text in clip.drawing.keywords for part in re.split("[,;/]", clean(text)))
    words = distinct(filter(None, map(words_of, parts)))
    usable = [word for word in words if max(map(len, word.split())) <= 20 and word not in table()["no_keywords"]]
    return [word for word in usable if author_of(word) != clip.author]


def split_authors(drawings: Mapping[str, int]) -> dict[str, str]:
    """'train', 'val' or 'test' by author. Only hashes of the names order the authors; large ones are in 'train'."""
    total = sum(drawings.values())
    parts = dict.fromkeys(drawings, "train")
    small = [author for author, count in drawings.items() if count <= LARGE * total]
    waiting = sorted(small, key=lambda author: hashlib.sha256(f"author: {author}".encode()).digest())
    for part, share in (("test", TEST), ("val", VALIDATION)):
        found = 0
        while waiting and found < share * total:
            author = waiting.pop()
            parts[author] = part
            found += drawings[author]
    return parts


def _drop_copies(clips: list[Clip], parts: Mapping[str, str], dropped: Counter[str]) -> list[Clip]:
    """The clips without those of held-out authors that nearly equal one of a training author."""
    ink = [255 - _thumbnail(clip.drawing) for clip in clips]
    training = np.stack([one for one, clip in zip(ink, clips, strict=True) if parts[clip.author] == "train"])
    kept = []
    for one, clip in zip(ink, clips, strict=True):
        if parts[clip.author] == "train" or difference(training, one) >= SAME * one.mean():
            kept.append(clip)
        else:
            dropped["same drawing as in the training set"] += 1
    return kept


def _thumbnail(drawing: Drawing) -> NDArray[np.int16]:
    return np.asarray(Image.fromarray(drawing.pixels).resize((16, 16), Image.Resampling.BOX)).astype(np.int16)


def class_of(clip: Clip) -> str:
    """The one class that keywords, or the folder, name; "" for none and for several."""
    words = {*clip.keywords, clip.folder}
    found = [name for name, own in table()["classes"].items() if words & set(own)]
    return found[0] if len(found) == 1 else ""


def _folders(clips: list[Clip], parts: Mapping[str, str], dropped: Counter[str]) -> dict[str, list[Sample]]:
    """The samples of every folder. Hashes of their keys order them, and choose where there are too many.

    Counts in `dropped` the held-out drawings that are in none.
    """
    frequency = Counter(word for clip in clips for word in clip.keywords)
    made = sorted(
        ((_sample(clip, frequency), clip) for clip in clips),
        key=lambda item: hashlib.sha256(item[0].key.encode()).digest(),
    )
    folders = {"train": [sample for sample, clip in made if parts[clip.author] == "train"]}
    trained = Counter(class_of(clip) for clip in clips if parts[clip.author] == "train")
    for part in ("val", "test"):
        own = [item for item in made if parts[item[1].author] == part]
        # Retrieval needs captions that belong to one image.
        folders[f"{part}_pairs"] = [
            _exact(*item) for item in {clip.name: (sample, clip) for sample, clip in own}.values()
        ]
        folders[f"{part}_classes"] = []
        for name in table()["classes"]:
            members = [sample for sample, clip in own if class_of(clip) == name][:CLASS_MOST]
            if trained[name] >= CLASS_TRAINING and len(members) >= CLASS_DRAWINGS:
                folders[f"{part}_classes"] += [replace(one, concept=replace(one.concept, name=name)) for one in members]
        used = {sample.key for kind in ("pairs", "classes") for sample in folders[f"{part}_{kind}"]}
        if left := len(own) - len(used):
            dropped["name of another held-out drawing, and in no class"] += left
    return folders


def _sample(clip: Clip, frequency: Mapping[str, int]) -> Sample:
    phrases = distinct([clip.name, *filter(None, [clip.description])])
    captions = choose_captions(
        Wording(clip.name, phrases, list(clip.keywords)), frequency, table()["sentences"], clip.folder
    )
    number = hashlib.sha256(clip.path.encode()).hexdigest()[:8]
    identity = f"{clip.name[:40].replace(' ', '-')}-{number}"
    return Sample(
        clip.author.replace(" ", "-")[:40], Concept(identity, clip.name, "", "", captions), clip.drawing.pixels
    )


def _exact(sample: Sample, clip: Clip) -> Sample:
    """The sample with its most exact captions alone: name, description, and keywords in a sentence."""
    exact = [clip.name, clip.description, ", ".join([clip.name, *clip.keywords[:3]])]
    return replace(sample, concept=replace(sample.concept, captions=tuple(distinct(exact)) or (clip.name,)))
