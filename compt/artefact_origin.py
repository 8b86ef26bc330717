"""What a model's manifest says of the expansion that it began with: enough to make the same bytes again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compt.artefact import MAX_SHARD_BYTES
from compt.errors import ArtefactError, ConfigError
from compt.expand import Plan

PLAN, SHARD_BYTES = "expansion", "expansion_shard_bytes"


@dataclass(frozen=True)
class Origin:
    """The plan, the seed that drew what is new, the teacher (its name and the hash of its weights), and file sizes.

    `parent` is what the writer called the teacher: a job, a folder, or None where it was not said.
    """

    plan: Plan
    seed: int
    parent: str | None
    parent_hash: str
    max_shard_bytes: int = MAX_SHARD_BYTES

    def fields(self) -> dict[str, Any]:
        """As manifest fields, for `write_artefact`."""
        return {
            "parent": self.parent,
            "parent_hash": self.parent_hash,
            "seed": self.seed,
            PLAN: self.plan.to_json(),
            SHARD_BYTES: self.max_shard_bytes,
        }

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Origin:
        """The inverse of `fields`. Raises ArtefactError for a manifest without an expansion, or a damaged one."""
        if PLAN not in manifest:
            raise ArtefactError(f"the manifest has no '{PLAN}': the model did not grow from another one")
        try:
            return cls(
                Plan.from_json(manifest[PLAN]),
                int(manifest["seed"]),
                None if manifest.get("parent") is None else str(manifest["parent"]),
                str(manifest["parent_hash"]),
                int(manifest.get(SHARD_BYTES, MAX_SHARD_BYTES)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            cause = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
            raise ArtefactError(f"the manifest's expansion cannot be read: {cause}") from error


def expansion_fields(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of an expanded model's manifest that also belong into that of the model trained from it."""
    return {key: manifest[key] for key in (PLAN, SHARD_BYTES) if key in manifest}
