"""Scores of several models on a suite, as tables for terminals, Markdown, HTML, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from compt.chain.record import now
from compt.errors import ConfigError, nearest
from compt.evaluate.sets import task_class
from compt.evaluate.stats import direction, paired_bootstrap
from compt.evaluate.suite import Scores, SetScore
from compt.evaluate.task import LONG
from compt.files import disk_errors, read_json, write_json, write_text
from compt.recipe.suite import Suite, SuiteSet
from compt.report.write import write_tables
from compt.text import TextTable
from compt.weights.artefact import versions


@dataclass(frozen=True)
class Line:
    """One line of the table: a set, or one direction of a retrieval set. `at` counts the lines of the set."""

    item: SuiteSet
    at: int = 0
    label: str = ""

    @property
    def name(self) -> str:
        """The set's name in tables, with the direction."""
        return ", ".join(filter(None, (self.item.label_in_tables, self.label)))


@dataclass(frozen=True)
class SuiteReport:
    """The scores of a suite, and published ones beside them.

    name: of the suite and its task. source: the suite as `compt eval fetch` takes it. root: the folder of the sets.
    published: names of the suite's published models to show. Raises ConfigError for a name that the suite does not
    have.
    """

    name: str
    suite: Suite
    root: Path
    scores: Scores
    published: Sequence[str] = ()
    source: str = ""

    def __post_init__(self) -> None:
        for name in self.published:
            if name not in self.suite.published:
                known = ", ".join(self.suite.published) or "the suite has none"
                raise ConfigError(f"--published {name}: no such model{nearest(name, self.suite.published)}: {known}")

    @property
    def models(self) -> list[str]:
        """Labels of the models."""
        return list(self.scores)

    @property
    def faults(self) -> list[str]:
        """Why sets that are there have no score."""
        return [str(score.fault) for found in self.scores.values() for score in found.values() if score.fault]

    def lines(self) -> Iterator[Line]:
        """The lines of all sets. A set that is missing, or that no model was scored on, has one."""
        for item in self.suite.sets:
            known = next((found for model in self.models if (found := self._score(model, item)) and found.record), None)
            rows = task_class(item.task).rows(known.record) if known else None
            yield from (Line(item, at, row.label) for at, row in enumerate(rows)) if rows else [Line(item)]

    def _score(self, model: str, item: SuiteSet) -> SetScore | None:
        return self.scores[model].get(item.name)

    def value(self, model: str, line: Line) -> float | None:
        """The first score of the line in percent, None without one."""
        score = self._score(model, line.item)
        if score is None or not score.record:
            return None
        return next(iter(task_class(line.item.task).rows(score.record)[line.at].scores.values()))

    def _published(self, name: str, line: Line) -> float | None:
        scores = line.item.published
        return scores[self.suite.published.index(name)] if scores and not line.at else None

    def averaged(self) -> list[Line]:
        """The lines that an average is over: classification sets that every model has a score of."""
        return [
            line
            for line in self.lines()
            if task_class(line.item.task).classifies and all(self.value(m, line) is not None for m in self.models)
        ]

    @property
    def average_label(self) -> str:
        """`Average of 35`, or `Average of 3 of 35` where sets are missing."""
        whole = sum(task_class(item.task).classifies for item in self.suite.sets if item.train != [])
        found = len(self.averaged())
        return f"Average of {found}" if found == whole else f"Average of {found} of {whole}"

    def tables(self) -> list[TextTable]:
        """All tables: scores, further metrics, and differences from the first model."""
        rows = [
            [line.name, *(self._cell(model, line) for model in self.models)]
            + [_number(self._published(name, line)) for name in self.published]
            for line in self.lines()
        ]
        if sum(task_class(item.task).classifies for item in self.suite.sets) > 1 and (over := self.averaged()):
            means = [_mean([self.value(model, line) for line in over]) for model in self.models]
            # Over the same sets: like is compared with like.
            means += [_mean([self._published(name, line) for line in over]) for name in self.published]
            rows.append([self.average_label, *map(_number, means)])
        header = ["Set", *self.models, *self.published]
        tables = [TextTable(f"Scores on {self.name}", header, rows, list(self._notes()))]
        tables += filter(None, [self._metrics(), *map(self._differences, self.models[1:])])
        return tables

    def _cell(self, model: str, line: Line) -> str:
        score = self._score(model, line.item)
        if score is None:
            return "-" if line.item.train == [] else "missing"
        return "fault" if score.fault else _number(self.value(model, line))

    def _notes(self) -> Iterator[str]:
        tasks = {item.task for item in self.suite.sets}
        yield " ".join(note for note in (task_class(task).first_note for task in sorted(tasks)) if note)
        if self.published:
            yield f"As published: {', '.join(self.published)}."
        without = [item for item in self.suite.sets if self._score(self.models[0], item) is None]
        names = [item.label_in_tables for item in without if item.train != []]
        if unsplit := [item.label_in_tables for item in without if item.train == []]:
            yield f"Without a training split: {', '.join(unsplit)}."
        if names:
            whole = len(self.suite.sets) - len(unsplit)
            fetched = any(item.hub for item in self.suite.sets)
            train = " --train" if any(item.train for item in self.suite.sets) else ""
            how = f": compt eval fetch {self.source or self.name} {self.root}{train}" if fetched else ""
            yield f"Missing in {self.root}: {len(names)} of {whole} sets ({', '.join(names)}){how}"
        lines: dict[str, None] = {}
        for item in self.suite.sets:
            for model in self.models:
                score = self._score(model, item)
                if score is not None and score.fault:
                    lines[f"{item.label_in_tables}: {score.fault}"] = None
                elif score is not None and (said := _departures(item, score.record)):
                    lines[f"{item.label_in_tables}: {', '.join(said)}."] = None
        yield from lines

    def _metrics(self) -> TextTable | None:
        rows, notes = [], ["Percent, with 95 % intervals. What others report; the averages above take top-1."]
        for item in self.suite.sets:
            found = [self._score(model, item) for model in self.models]
            scores = [score.record if score is not None else {} for score in found]
            known = {key for record in scores for key, value in record.items() if isinstance(value, float)}
            if item.metric and known and item.metric not in known:
                near = nearest(item.metric, known)
                notes.append(f"{item.label_in_tables} has no '{item.metric}'{near}: {', '.join(sorted(known))}.")
            elif item.metric and known:
                label = f"{item.label_in_tables}, {item.metric.replace('_', ' ')}"
                rows.append([label, *(_with_interval(record, item.metric) for record in scores)])
        return TextTable("Further metrics", ["Set", *self.models], rows, notes) if rows or notes[1:] else None

    def _differences(self, model: str) -> TextTable | None:
        first, rows, halves, gains = self.models[0], [], [], []
        for line in self.lines():
            pair = [self._score(name, line.item) for name in (model, first)]
            scored = [score for score in pair if score and score.ids is not None and len(score.answers) > line.at]
            if len(scored) < 2:
                continue
            # An image that one of the models could not read has no partner.
            first_ids, second_ids = (np.asarray(score.ids) for score in scored)
            _, *places = np.intersect1d(first_ids, second_ids, assume_unique=True, return_indices=True)
            answers = [score.answers[line.at][place] for score, place in zip(scored, places, strict=True)]
            if len(answers[0]) < 2:
                continue
            gain, low, high = paired_bootstrap(*answers)
            rows.append([line.name, f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}", direction(low, high)])
            if task_class(line.item.task).classifies:
                gains.append(gain)
                halves.append((high - low) / 2)
        if not rows:
            return None
        if len(gains) > 1:
            gain, half = sum(gains) / len(gains), math.hypot(*halves) / len(halves)
            interval = f"{gain - half:+.2f} to {gain + half:+.2f}"
            rows.append([f"Average of {len(gains)}", f"{gain:+.2f}", interval, direction(gain - half, gain + half)])
        notes = ["Points, with the 95 % interval of a paired bootstrap over samples. It does not cover training seeds."]
        if len(gains) > 1:
            notes.append("The average's interval takes the sets as independent.")
        return TextTable(f"{model} minus {first}", ["Set", "Points", "95 % interval", "Verdict"], rows, notes)

    def to_dict(self) -> dict[str, Any]:
        """Every score as JSON values."""
        scores = {
            model: {
                name: {"fault": str(score.fault)}
                if score.fault
                else {key: value for key, value in score.record.items() if key not in (*LONG, "skipped_examples")}
                for name, score in found.items()
            }
            for model, found in self.scores.items()
        }
        over = self.averaged()
        return {
            "suite": self.name,
            "sets": [item.name for item in self.suite.sets],
            "data": {item.name: item.data for item in self.suite.sets},
            "averaged": [line.item.name for line in over],
            "average": {model: _mean([self.value(model, line) for line in over]) for model in self.models},
            "scores": scores,
            "written": now(),
            "versions": versions(),
        }

    def csv(self) -> str:
        """One line for each score of each model, each set and each metric."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["set", "title", "task", "model", "metric", "value", "low", "high", "images"])
        for item in self.suite.sets:
            for model in self.models:
                score = self._score(model, item)
                about = [item.name, item.label_in_tables, item.task, model]
                if score is None or score.fault:
                    state = "fault" if score else "no training split" if item.train == [] else "missing"
                    lines.writerow([*about, state, "", "", "", ""])
                    continue
                record = score.record
                keys = [key for row in task_class(item.task).rows(record) for key in row.scores]
                keys += [item.metric] if item.metric and item.metric not in keys else []
                for key in keys:
                    if (value := record.get(key)) is not None:
                        interval = record.get(f"{key}_interval") or ["", ""]
                        lines.writerow([*about, key, value, *interval, record["n"]])
        return text.getvalue()

    def check_folder(self, folder: Path) -> None:
        """Make `folder`. Raises RunError where nothing can be written there, ConfigError where another suite wrote to
        it and a set of the same name has other data there.
        """
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        data = {item.name: item.data for item in self.suite.sets}
        for path in sorted(folder.glob("*.json")):
            try:
                found = read_json(path)
            except (OSError, ValueError):
                continue
            others = found.get("data") if isinstance(found, dict) else None
            for name, other in others.items() if isinstance(others, dict) else ():
                if name in data and other != data[name]:
                    raise ConfigError(
                        f"--out {folder}: {path.name} has scores of another set '{name}', of {', '.join(other)}; name "
                        "another folder"
                    )

    def write(self, folder: Path) -> None:
        """Write FOLDER/NAME.json, .csv, .md and .html, with the name of the suite. Raises RunError."""
        tables, sentence = self.tables(), f"{len(self.models)} models on {self.name}"
        if len(self.models) == 1:
            sentence = f"{self.models[0]} on {self.name}"
        path = folder / quote(self.name, safe=" ()+")
        write_json(path.with_name(f"{path.name}.json"), self.to_dict())
        write_text(path.with_name(f"{path.name}.csv"), self.csv())
        write_tables(path, f"Scores on {self.name}", sentence, tables)


def _departures(item: SuiteSet, record: dict[str, Any] | Any) -> list[str]:
    """In what the set that was scored is not the one that the suite describes."""
    found = []
    for key, what in (("images", "n"), ("classes", "classes")):
        wanted, got = getattr(item, key), record.get(what)
        if wanted is not None and got is not None and got != wanted:
            found.append(f"{got:,} of {wanted:,} {key}" if got < wanted else f"{got:,} {key}, not {wanted:,}")
    pins = record.get("pins", {})
    for key, what in (("classnames", "class names"), ("templates", "templates")):
        wanted, got = getattr(item, f"{key}_sha256"), pins.get(key)
        if wanted and got and not got.startswith(wanted):
            found.append(f"other {what} than clip_benchmark's")
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _with_interval(record: Mapping[str, Any], key: str) -> str:
    interval = record.get(f"{key}_interval")
    return _number(record.get(key)) + (" ({:.2f} to {:.2f})".format(*interval) if interval else "")
