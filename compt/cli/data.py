"""`compt data …`: build, check and index data sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from compt.cli.options import MaxBadShare, option, progress_bar
from compt.recipe.schema import MAX_BAD_SHARE, MIN_MATCHED
from compt.text import TextTable, show

Shards = Annotated[
    list[str],
    typer.Argument(metavar="SHARDS", help="tars, globs, or data-{000000..000331}.tar", show_default=False),
]
CaptionsCsv = Annotated[Path | None, option("table of captions: CSV, TSV, JSONL, JSON or Parquet", metavar="FILE")]
CaptionColumns = Annotated[
    list[str] | None, option("column with captions; may be repeated", metavar="NAME", default="the known names")
]
MinMatched = Annotated[float, option("share of samples that need a row of the table", metavar="SHARE", min=0, max=1)]
IndexFolder = Annotated[
    Path | None, option("folder of the index", "--index-dir", "--out", metavar="FOLDER", default=".compt-index")
]
CacheFolder = Annotated[
    Path | None,
    option("folder for shards from object storage", metavar="FOLDER", default="$COMPT_CACHE, or ~/.cache/compt"),
]


def emoji(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")] = Path("data/emoji"),
) -> None:
    """Build the emoji data set as WebDataset shards.

    Needs a checkout of the project: the set is built from its sample/emoji, whose images have 32 pixels a side.
    """
    from compt.emoji.build import build

    made = build(out)
    note = (
        f"{made['held_out_concepts']} concepts are held out of training in every style. Drawings left out: "
        f"{sum(made['dropped'].values())}. Licences and hashes: {out / 'manifest.json'}."
    )
    rows = [
        (name, ", ".join(split["styles"]), f"{split['samples']:,}", f"{split['concepts']:,}", str(len(split["shards"])))
        for name, split in made["splits"].items()
    ]
    header = ("folder", "styles", "images", "concepts", "shards")
    show(TextTable(f"Emoji, {made['size']} px, from {made['source']}: {out}", header, rows, [note]))


def check(
    shards: Shards,
    captions_csv: CaptionsCsv = None,
    caption_columns: CaptionColumns = None,
    min_matched: MinMatched = MIN_MATCHED,
    max_bad_share: MaxBadShare = MAX_BAD_SHARE,
    index_dir: IndexFolder = None,
    cache_dir: CacheFolder = None,
    context_length: Annotated[int, option("tokens that the text tower takes", metavar="N")] = 77,
    workers: Annotated[int | None, option("processes", metavar="N", default="one a core")] = None,
    hashes: Annotated[bool, option("compare every byte with the first --hashes", "--hashes")] = False,
    as_json: Annotated[bool, option("print the report as JSON", "--json")] = False,
) -> None:
    """Read every sample of a WebDataset and report problems.

    Decodes images, counts tokens, and accounts for everything in the shards. Exits with code 3 if training or
    evaluation would refuse the set: too many unusable samples or, without captions, class numbers.
    """
    from compt.data.check import check as run_check
    from compt.data.remote import Cache

    # The shards are hashed after the check, and on request alone: it reads every byte once more.
    with progress_bar("checking samples") as progress:
        found = run_check(
            shards,
            Path.cwd(),
            index_dir=index_dir,
            captions_csv=captions_csv,
            columns=caption_columns or (),
            min_matched=min_matched,
            context_length=context_length,
            workers=workers,
            progress=progress,
            cache=Cache.at(cache_dir),
        )
    if hashes:
        _refuse_changed(found.index.shards, index_dir)
    if as_json:
        typer.echo(json.dumps({**found.to_json(max_bad_share), "hashes_compared": hashes}, indent=1))
    else:
        rows = [*found.rows(), *([("hashes", "those of the first time")] if hashes else [])]
        show(TextTable(found.title(max_bad_share), ("", "found"), rows), *found.account.tables())
    if not found.usable(max_bad_share):
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
    captions_csv: CaptionsCsv = None,
    caption_columns: CaptionColumns = None,
    min_matched: MinMatched = MIN_MATCHED,
) -> None:
    """Index the shards of a WebDataset.

    Scans the tars once, so that training can start at any position of any epoch.
    """
    from compt.data.index import open_index
    from compt.data.remote import Cache

    with progress_bar("indexing shards") as progress:
        made = open_index(
            *(shards, Path.cwd(), out, captions_csv, progress),
            columns=caption_columns or (),
            min_matched=min_matched,
            cache=Cache.at(cache_dir),
        )
    rows = [("shards", f"{len(made.shards):,}"), ("samples", f"{len(made):,}"), ("fingerprint", made.fingerprint[:16])]
    show(TextTable("Indexed", ("", "found"), rows), *made.account.tables())
