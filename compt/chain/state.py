"""What a run folder says of its run: run.json, the recipe beside it, and whether its jobs may go on as they are."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compt.chain.locks import writing
from compt.chain.record import now, read_manifest, read_record
from compt.errors import RunError
from compt.files import flatten, write_json, write_text
from compt.plan.jobs import Plan

if TYPE_CHECKING:
    from compt.chain.job import RunContext

STATE, RECIPE = "run.json", "recipe.yaml"


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each field that is not the same: "optimizer.lr: 0.001 -> 0.002"."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def read_state(folder: Path) -> dict[str, Any]:
    """run.json; {} without one. Raises RunError for a damaged one."""
    path = folder / STATE
    if not path.exists():
        return {}
    return read_record(path, ("data_fingerprint", "started", "jobs"), "remove it: it is written again")


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """The settings of a first-pair test, and its finished tries in order; None if none was begun.

    Tries are in the manifests; run.json has a copy of those whose folders were removed. Raises RunError.
    """
    record = read_state(folder).get("calibration")
    tries = {item["number"]: item for item in (record or {"tries": []})["tries"]}
    for path in sorted((folder / "jobs").glob("*")):
        found = read_manifest(path).get("calibration")
        # A try that failed counts once its folder is set aside under its own name.
        if found is not None and path.name == found["job"]:
            tries[found["number"]] = found
    ordered = [tries[number] for number in sorted(tries)]
    if record is None and not ordered:
        return None
    record = record or {"dataset": ordered[0]["dataset"], "target": ordered[0]["target"], "outcome": "open"}
    decided = bool(ordered) and ordered[-1]["lossless"]
    return {**record, "tries": ordered, "outcome": "lossless" if decided else record["outcome"]}


def accepted_scales(folder: Path) -> tuple[float, ...]:
    """The lengths that a first-pair test tried, the accepted one last; () if none was begun.

    Raises RunError for a test that has not finished.
    """
    record = read_calibration(folder)
    if record is None:
        return ()
    if record["outcome"] == "not lossless":
        raise RunError(f"{folder}: its first-pair test found no lossless length; take another run folder")
    if record["outcome"] != "lossless":
        target = "" if record["target"] is None else f" --target {record['target']:g}"
        raise RunError(
            f"{folder}: its first-pair test is not decided yet; go on with --calibrate{target} "
            f"--calibrate-on {record['dataset']}, or take another run folder"
        )
    return tuple(item["factor"] for item in record["tries"])


TABLE = "the captions of table"


def check_unchanged(context: RunContext, plan: Plan) -> None:
    """Raise RunError, with the fields that differ, if a begun job of the run would give another result now.

    The recipe or the data may have changed. Jobs that were not begun may change freely.
    """
    folder, fingerprint = context.folder, context.index.fingerprint
    _check_own_recipe(folder)
    manifests = {job.name: read_manifest(folder / "jobs" / job.name) for job in plan.jobs}
    begun = [job for job in plan.jobs if manifests[job.name]["state"] != "planned"]
    known = read_state(folder).get("contents", {}) if begun else {}
    changed = [what for what, content in context.contents.items() if known.get(what, content) != content]
    if begun and read_state(folder).get("data_fingerprint", fingerprint) != fingerprint:
        shards = "the training shards, or their weights," if context.index.mixture else "the training shards"
        what = next((what for what in changed if what.startswith(TABLE)), shards)
        raise RunError(
            f"{folder}: {what} changed since {begun[0].name} started; take another run folder, or restore the old data"
        )
    if changed:
        raise RunError(
            f"{folder}: {changed[0]} changed since {begun[0].name} started; restore the old data, take "
            "another run folder, or (an evaluation set) give the set another name"
        )
    names = {job.name for job in plan.jobs}
    for old in read_state(folder).get("jobs", []):
        gone = old["kind"] == "link" and old["name"] not in names
        if gone and read_manifest(folder / "jobs" / old["name"])["state"] != "planned":
            raise RunError(
                f"{folder}: the chain no longer has {old['name']}, which was begun; take another run folder, "
                f"undo the change, or remove {folder / 'jobs' / old['name']}"
            )
    for job in begun:
        manifest = manifests[job.name]
        if manifest["hash"] != job.hash:
            lines = "\n  ".join(difference(manifest["result"], job.result))
            raise RunError(
                f"{folder}: the recipe has changed since {job.name} was begun:\n  {lines}\n"
                f"Take another run folder, undo the change, or remove {folder / 'jobs' / job.name} (and what was "
                "built on it) to train it again."
            )


def _check_own_recipe(folder: Path) -> None:
    if (folder / RECIPE).exists() and not (folder / STATE).exists() and not (folder / "jobs").exists():
        raise RunError(
            f"{folder / RECIPE}: is not a run's, and a run in this folder would replace it; name another run folder "
            "(--run-folder), or move the file"
        )


def write_state(context: RunContext, plan: Plan, calibration: dict[str, Any] | None) -> str:
    """Write STATE and RECIPE, and return when the run was started. Raises RunError."""
    with writing(context.folder):
        old = {"started": now(), "jobs": [], **read_state(context.folder)}
        planned = [{**job.to_json(), "result": job.result} for job in plan.jobs]
        names = {job["name"] for job in planned}
        kept = [job for job in old["jobs"] if job["name"] not in names and job["kind"] != "link"]
        recipe = context.recipe
        tested = calibration or read_calibration(context.folder)
        write_json(
            context.folder / STATE,
            {
                "name": recipe.name,
                "started": old["started"],
                "command": shlex.join(sys.argv),
                "primary": recipe.evaluation.primary,
                "contact_sheet": recipe.evaluation.contact_sheet,
                "images": context.index.images,
                "batch": recipe.optimizer.batch,
                "captions": recipe.data.captions,
                "data_fingerprint": context.index.fingerprint,
                "account": context.index.account.to_json(),
                **({"sets": context.index.sets} if context.index.sets else {}),
                "contents": {**old.get("contents", {}), **context.contents},
                "jobs": [*planned, *kept],
                **({"calibration": tested} if tested else {}),
            },
        )
        values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
        write_text(context.folder / RECIPE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return str(old["started"])
