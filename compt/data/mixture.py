"""Several sets of shards in one training set, each with a weight: how often an epoch has its samples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compt.data.account import Account
from compt.data.index import Index, build_index, open_index
from compt.data.order import Mixture
from compt.data.remote import Cache
from compt.errors import DataError
from compt.recipe.schema import Data, TrainSet
from compt.text import TextTable


def open_training(
    data: Data, base: Path, index_dir: Path | None = None, cache: Cache | None = None, *, scan: bool = True
) -> Index:
    """The index of a recipe's training shards. Raises DataError as `open_index` does, and for a shard in two sets."""
    columns = data.caption_columns or ()
    if not any(isinstance(one, TrainSet) for one in data.train):
        table = base / data.captions_csv if data.captions_csv else None
        patterns = [str(one) for one in data.train]
        return open_index(patterns, base, index_dir, table, None, columns, data.min_matched, cache, scan=scan)
    sets = [one if isinstance(one, TrainSet) else TrainSet(shards=[one]) for one in data.train]
    opened = [
        (
            " ".join(one.shards),
            one.weight,
            open_index(
                *(one.shards, base, index_dir, base / one.captions_csv if one.captions_csv else None, None),
                *(columns, data.min_matched, cache),
                scan=scan,
            ),
        )
        for one in sets
    ]
    shards = [shard for _, _, index in opened for shard in index.shards]
    if len(set(shards)) < len(shards):
        twice = next(shard for shard, count in Counter(shards).items() if count > 1)
        raise DataError(f"{twice} is in two sets; give its set a larger weight instead")
    tables = [table for _, _, index in opened for table in index.tables]
    joined = build_index(shards, index_dir, columns=columns, scan=scan, tables=tables)
    joined.account = Account()
    for title, weight, index in opened:
        joined.account.add(index.account, f"{title}: ")
        counts = {"samples": len(index), "images": round(weight * len(index)), "account": index.account.to_json()}
        joined.sets.append({"shards": title, "weight": weight, **counts})
    joined.mixture = Mixture.of([(weight, index.sizes) for _, weight, index in opened])
    if any(weight != 1 for _, weight, _ in opened):
        identity = [joined.fingerprint, [[len(index.shards), weight] for _, weight, index in opened]]
        joined.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return joined


def sets_table(sets: Sequence[dict[str, Any]]) -> TextTable:
    """A line for each of `Index.sets`."""
    rows = [
        [
            *(one["shards"], f"{one['weight']:g}", f"{one['samples']:,}", f"{one['images']:,}"),
            Account.from_json(one["account"]).line() or "–",
        ]
        for one in sets
    ]
    return TextTable("Training sets", ["shards", "weight", "samples", "images of an epoch", "not used"], rows)
