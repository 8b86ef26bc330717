"""`compt data …`: build, check and index data sets."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field, TypeAdapter, ValidationError

from compt.cli.options import CLASS_ORDER_HELP, RECIPE, AsJson, MaxBadShare, option, print_json, progress_bar
from compt.errors import ConfigError
from compt.recipe.read import load_recipe
from compt.recipe.schema import MAX_BAD_SHARE, MIN_MATCHED, SHARD_CACHE
from compt.recipe.types import Count
from compt.text import TextTable, count, show

if TYPE_CHECKING:
    from compt.data.index import Index
    from compt.data.remote import Cache
    from compt.data.sources import PackOptions
    from compt.recipe.schema import Data

CONTEXT = 77
"""Tokens of a caption that OpenAI's CLIP takes."""

Shards = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS", help="tars, globs, or data-{000000..000331}.tar", show_default=False),
]
CaptionsCsv = Annotated[Path | None, option("table of captions: CSV, TSV, JSONL, JSON or Parquet", metavar="FILE")]
CaptionColumns = Annotated[
    list[str] | None, option("column with captions; repeatable", metavar="NAME", default="the known names")
]
MIN_MATCHED_HELP = "share of samples that need a row of the table"
MinMatched = Annotated[float, option(MIN_MATCHED_HELP, metavar="SHARE", min=0, max=1)]
IndexFolder = Annotated[
    Path | None, option("folder of the index", "--index-dir", "--out", metavar="FOLDER", default=".compt-index")
]
CacheFolder = Annotated[
    Path | None,
    option("folder for shards from object storage", metavar="FOLDER", default="$COMPT_CACHE, or ~/.cache/compt/shards"),
]


def _bytes(text: str) -> int:
    """The value of `--cache-size`, as a recipe writes it."""
    try:
        return TypeAdapter(Annotated[Count, Field(gt=0)]).validate_python(text)
    except ValidationError as error:
        raise typer.BadParameter(error.errors()[0]["msg"]) from None


CacheSize = Annotated[
    int | None, option("bytes of shards in that folder, such as 500G", parser=_bytes, metavar="BYTES", default="100G")
]


def _cache(folder: Path | None, size: int | None, data: Data | None = None) -> Cache:
    """The cache that the options name, else that of the recipe."""
    from compt.data.remote import Cache

    if data is None:
        return Cache.at(folder, size or SHARD_CACHE)
    named = {"cache_dir": folder and str(folder), "cache_size": size}
    return Cache.of(data.model_copy(update={name: value for name, value in named.items() if value}), Path())


def emoji(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")] = Path("data/emoji"),
) -> None:
    """Build the emoji data set as WebDataset shards.

    Its images have 32 pixels a side. The set is built from a sample that comes with compt.
    """
    from compt.drawings.emoji import build

    _show_drawings("Emoji", build(out), out)


def icons(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")] = Path("data/icons"),
    size: Annotated[int, option("pixels a side", metavar="PIXELS", min=8, max=1024)] = 32,
    everything: Annotated[bool, option("all drawings, and rarer concepts", "--all")] = False,
) -> None:
    """Build the icon data set as WebDataset shards.

    Downloads about 110 MB from npm, and renders icons of open sets. Needs Node.js and `pip install 'compt[data]'`.
    """
    from compt.drawings.icons import build

    _show_drawings("Icons", build(out, size, everything=everything), out)


def clipart(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")] = Path("data/clipart"),
    size: Annotated[int, option("pixels a side", metavar="PIXELS", min=8, max=256)] = 32,
    deb: Annotated[Path | None, option("file of the package", metavar="FILE", default="downloaded with apt")] = None,
) -> None:
    """Build the clip art data set as WebDataset shards.

    Downloads 25 MB from Debian, the package openclipart-svg, and renders its drawings, split by author. Needs apt, or
    the file of the package, and `pip install 'compt[data]'`.
    """
    from compt.drawings.clipart import build

    made = build(out, size, deb)
    train, val, test = (made["authors"][part] for part in ("train", "val", "test"))
    note = f"Authors: {train} in train, {val} in val, {test} in test; no author is in two. {_licences(out)}"
    version = made["package"]["version"] + ("" if made["package"]["pinned"] else ", not the pinned version")
    causes = sorted(made["dropped"].items(), key=lambda item: (-item[1], item[0]))
    show(
        _drawings(f"Clip art {version}", made, out, "authors", note),
        TextTable("Left out", ("cause", "drawings"), [(cause, f"{number:,}") for cause, number in causes]),
    )


def _show_drawings(title: str, made: dict[str, Any], out: Path) -> None:
    note = (
        f"{made['held_out_concepts']} concepts are held out of training in every style. Drawings left out: "
        f"{sum(made['dropped'].values())}. {_licences(out)}"
    )
    show(_drawings(title, made, out, "styles", note))


def _licences(out: Path) -> str:
    return f"Licences and hashes: {out / 'manifest.json'}."


def _drawings(title: str, made: dict[str, Any], out: Path, word: str, note: str) -> TextTable:
    rows = [
        (
            name,
            _styles(split["styles"], word),
            f"{split['samples']:,}",
            f"{split['concepts']:,}",
            str(len(split["shards"])),
        )
        for name, split in made["splits"].items()
    ]
    header = ("folder", word, "images", "concepts", "shards")
    return TextTable(f"{title}, {made['size']} px, from {made['source']}: {out}", header, rows, [note])


def _styles(names: Collection[str], word: str) -> str:
    return ", ".join(names) if len(names) < 10 else f"{len(names)} {word}"


def check(
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SHARDS", help="tars, globs, or data-{000000..000331}.tar", show_default="those of --recipe"
        ),
    ] = None,
    recipe: Annotated[Path | None, option("compare with the numbers of this recipe", **RECIPE)] = None,
    captions_csv: CaptionsCsv = None,
    caption_columns: CaptionColumns = None,
    min_matched: Annotated[
        float | None,
        option(MIN_MATCHED_HELP, metavar="SHARE", min=0, max=1, default=f"{MIN_MATCHED:g}"),
    ] = None,
    max_bad_share: Annotated[
        float | None,
        option("share of unusable samples that is accepted", metavar="SHARE", min=0, max=1, default="0.01"),
    ] = None,
    index_dir: IndexFolder = None,
    cache_dir: CacheFolder = None,
    cache_size: CacheSize = None,
    context_length: Annotated[
        int | None,
        option("tokens that the text tower takes", metavar="N", min=1, default=f"the recipe's, or {CONTEXT}"),
    ] = None,
    workers: Annotated[int | None, option("processes", metavar="N", default="one per core")] = None,
    hashes: Annotated[bool, option("hash every byte and compare with the first such check", "--hashes")] = False,
    as_json: Annotated[bool, option("print the report as JSON", "--json")] = False,
) -> None:
    """Read every sample of a WebDataset and report problems.

    Decodes images, counts tokens, and accounts for everything in the shards. Exits with code 3 if training or
    evaluation would refuse the set: too many samples are unusable or, in a set without captions, too many class
    numbers. With --recipe, the table, index, cache, context and accepted shares come from the recipe, unless an option
    sets them.
    """
    from compt.data.check import check as run_check
    from compt.data.lengths import longest_context
    from compt.data.mixture import open_training, sets_table

    loaded = load_recipe(recipe) if recipe else None
    if loaded:
        data = loaded.data
        captions_csv = captions_csv or (Path(data.captions_csv) if data.captions_csv else None)
        caption_columns = caption_columns or data.caption_columns
        index_dir = index_dir or (Path(data.index_dir) if data.index_dir else None)
        min_matched = data.min_matched if min_matched is None else min_matched
        max_bad_share = data.max_bad_share if max_bad_share is None else max_bad_share
        context_length = context_length or longest_context(loaded)
    min_matched = MIN_MATCHED if min_matched is None else min_matched
    max_bad_share = MAX_BAD_SHARE if max_bad_share is None else max_bad_share
    cache = _cache(cache_dir, cache_size, loaded.data if loaded else None)
    if loaded and not shards:
        changed: dict[str, Any] = {
            "captions_csv": captions_csv and str(captions_csv),
            "caption_columns": caption_columns,
            "min_matched": min_matched,
        }
        source: Index | list[str] = open_training(loaded.data.model_copy(update=changed), Path(), index_dir, cache)
    elif shards:
        source = shards
    else:
        raise ConfigError("name shards, or a recipe with --recipe")
    # The shards are hashed after the check, and only on request: it reads every byte once more.
    with progress_bar("checking samples") as progress:
        found = run_check(
            source,
            Path.cwd(),
            index_dir=index_dir,
            captions_csv=captions_csv,
            columns=caption_columns or (),
            min_matched=min_matched,
            context_length=context_length or CONTEXT,
            workers=workers,
            progress=progress,
            cache=cache,
        )
    if hashes:
        _refuse_changed(found.index.shards, index_dir)
    compared, sets = found.compare(loaded, found.index.images) if loaded else [], found.index.sets
    if as_json:
        values = {**found.to_json(max_bad_share), "hashes_compared": hashes}
        values |= {"recipe": {name: {"recipe": one, "found": other} for name, one, other in compared}} if loaded else {}
        values |= {"sets": sets} if sets else {}
        typer.echo(json.dumps(values, indent=1))
    else:
        rows = [*found.rows(), *([("hashes", "those of the first time")] if hashes else [])]
        tables = [TextTable(found.title(max_bad_share), ("", "found"), rows), *found.account.tables()]
        if sets:
            tables.append(sets_table(sets))
        if loaded:
            shown = [[name, _number(one), _number(other), _change(one, other)] for name, one, other in compared]
            tables.append(TextTable(f"Recipe {loaded.name}", ("", "recipe", "found", "change"), shown))
        show(*tables)
    if not found.usable(max_bad_share):
        raise typer.Exit(3)


def _number(value: float | None) -> str:
    if value is None:
        return "the whole context"
    return count(value) if value >= 1e9 else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"


def _change(before: float | None, after: float) -> str:
    return "" if before is None or before == after else f"{100 * (after / before - 1):+.3g} %"


PackSource = Annotated[
    str, typer.Argument(metavar="SOURCE", help="folder of images, table, or shards", show_default=False)
]
PackOut = Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)]
ShardSize = Annotated[int, option("samples per shard", metavar="N", min=1)]
Resize = Annotated[
    int | None, option("largest shorter side, in pixels", metavar="N", min=1, default="images stay as they are")
]
Seed = Annotated[int | None, option("shuffle the samples", metavar="N", min=0, default="order of the source")]


def pack(
    source: PackSource,
    out: PackOut,
    images: Annotated[Path | None, option("folder of a table's images", metavar="FOLDER", default="its own")] = None,
    captions_csv: CaptionsCsv = None,
    caption_columns: CaptionColumns = None,
    min_matched: MinMatched = MIN_MATCHED,
    shard_size: ShardSize = 10_000,
    seed: Seed = None,
    resize: Resize = None,
    workers: Annotated[
        int | None, option("threads of --resize", metavar="N", min=1, default="one per core, 8 at most")
    ] = None,
    class_order: Annotated[Literal["name", "number"] | None, option(CLASS_ORDER_HELP)] = None,
    max_bad_share: MaxBadShare = MAX_BAD_SHARE,
    cache_dir: CacheFolder = None,
    cache_size: CacheSize = None,
    as_json: AsJson = False,
) -> None:
    """Pack images and captions into the shards of a WebDataset.

    SOURCE is a folder of images with .txt, .json or .cls files of the same names, a folder with one folder of images
    per class, a table with paths of images and captions, or shards in quotation marks. Images are copied as they are,
    unless --resize makes larger ones smaller (JPEG, quality 95). The same command finishes a packing that was
    interrupted. Exits with code 3 if too many samples are unusable.
    """
    from compt.data.sources import PackOptions

    columns = caption_columns or ()
    options = PackOptions(captions_csv, columns, min_matched, images, shard_size, seed, class_order, resize=resize)
    _pack(source, out, options, _cache(cache_dir, cache_size), max_bad_share, as_json, workers)


def dreamlip(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="shards, in quotation marks", show_default=False)],
    out: PackOut,
    captions_csv: Annotated[
        Path | None, option("DreamLIP's table", metavar="FILE", default="the columns are in each .json")
    ] = None,
    min_matched: MinMatched = MIN_MATCHED,
    shard_size: ShardSize = 10_000,
    seed: Seed = None,
    max_bad_share: MaxBadShare = MAX_BAD_SHARE,
    cache_dir: CacheFolder = None,
    cache_size: CacheSize = None,
    as_json: AsJson = False,
) -> None:
    """Merge shards with the long captions of DreamLIP.

    Rows are joined with samples by key, file name or URL. The generated captions are cut into sentences as in the
    authors' code. The same command finishes a merge that was interrupted.
    """
    from compt.data.sources import PackOptions

    options = PackOptions(captions_csv, (), min_matched, None, shard_size, seed, None, "sentences")
    _pack(shards, out, options, _cache(cache_dir, cache_size), max_bad_share, as_json)


def _pack(
    source: str,
    out: Path,
    options: PackOptions,
    cache: Cache,
    max_bad_share: float,
    as_json: bool,
    workers: int | None = None,
) -> None:
    from compt.data.pack import pack as run_pack

    with progress_bar("packing samples") as progress:
        packed = run_pack(source, out, Path.cwd(), options, workers=workers, progress=progress, cache=cache)
    account = packed.account
    if as_json:
        print_json({"shards": packed.shards, "samples": packed.samples, "account": account.to_json()})
    else:
        rows = [("shards", f"{packed.shards:,}"), ("samples", f"{packed.samples:,}")]
        show(TextTable(f"Packed: {out}", ("", "written"), rows), *account.tables())
    if account.lost_share("sample") > max_bad_share:
        raise typer.Exit(3)


def _refuse_changed(shards: Sequence[Any], index_dir: Path | None) -> None:
    """Raise DataError where shards are not what they were when they were hashed first."""
    from compt.data.content import HASHES, changed_shards
    from compt.data.index import index_folder
    from compt.errors import DataError

    folder = index_folder(shards[0].parent, index_dir)
    with progress_bar("hashing shards") as progress:
        changed = list(changed_shards(shards, folder, lambda done: progress(done, len(shards))))
    if changed:
        text = f"{len(changed)} of {len(shards)} shards have changed since they were hashed first, such as {changed[0]}"
        raise DataError(f"{text}; put them back, or remove {folder / HASHES} to accept them")


def index(
    shards: Shards,
    out: IndexFolder = None,
    cache_dir: CacheFolder = None,
    cache_size: CacheSize = None,
    captions_csv: CaptionsCsv = None,
    caption_columns: CaptionColumns = None,
    min_matched: MinMatched = MIN_MATCHED,
) -> None:
    """Index the shards of a WebDataset.

    Scans the tars once, so that training can start at any position of any epoch.
    """
    from compt.data.index import open_index

    with progress_bar("indexing shards") as progress:
        made = open_index(
            *(shards, Path.cwd(), out, captions_csv, progress),
            columns=caption_columns or (),
            min_matched=min_matched,
            cache=_cache(cache_dir, cache_size),
        )
    rows = [("shards", f"{len(made.shards):,}"), ("samples", f"{len(made):,}"), ("fingerprint", made.fingerprint[:16])]
    show(TextTable("Indexed", ("", "found"), rows), *made.account.tables())
