"""RUN/report.html and RUN/report.md: what a run has shown, for people; also of a run that is not finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from compt.chain.record import now
from compt.design.runs import score_file
from compt.errors import RunError
from compt.evaluate.contact import CAPTIONS_FILE, CLASSES_FILE
from compt.files import new_folder, write_text
from compt.report import figures
from compt.report.content import (
    JobView,
    class_tables,
    data_tables,
    environment,
    jobs_table,
    macs_alone,
    planned_costs,
    read_job,
    roles_of,
    score_tables,
    sentence,
    tiles,
    unfinished,
    with_measured_costs,
)
from compt.report.summary import Row, Summary, read_record, read_state, stored_arrays, summarise, whole_files
from compt.report.tables import SAME, summary_tables
from compt.text import TextTable, code_block, escape_markdown, visible
from compt.weights.artefact import versions

TEMPLATES = Path(__file__).parent / "templates"
PICTURES = "report"
"""Folder beside report.md with its figures."""


def _points(rows: list[Row]) -> list[figures.Dot]:
    """Scored models at the MACs spent up to each, unscored ones and failed tries included in the cost."""
    points, total = [], 0.0
    for row in rows:
        total += row.macs
        if row.kind != "try" and row.top1 is not None and row.low is not None and row.high is not None:
            points.append(figures.Dot(row.model, total, row.top1, row.low, row.high))
    return points


def _accuracy(summary: Summary) -> figures.Figure | None:
    if summary.primary is None:
        return None
    order = [row.model for row in summary.links]
    # A sum over other members than the chain's would stand at the wrong place.
    whole = [rows for rows in summary.individual.values() if [row.model for row in rows] == order[: len(rows)]]
    alone = [points for rows in whole if len(points := _points(rows)) and any(r.kind == "baseline" for r in rows)]
    controls = [
        figures.Dot(SAME.get(row.job, row.job), row.macs, row.top1, row.low, row.high)
        for row in summary.controls
        if row.top1 is not None and row.low is not None and row.high is not None
    ]
    return figures.accuracy_figure(summary.primary, _points(summary.paid), alone, controls)


def _pairs(rows: list[dict[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """(samples, value) of the first of `keys` that a line has."""
    found = ((row["samples"], next((row[key] for key in keys if key in row), math.nan)) for row in rows)
    return [(float(x), float(y)) for x, y in found if not math.isnan(y)]


_STEPS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "samples_per_s": "Images per second",
    "data_wait": "Time spent waiting for data, %",
}
"""Columns of metrics.jsonl that are about the steps, not about what the model learned."""


def _curves(jobs: list[JobView]) -> tuple[figures.Figure | None, figures.Figure | None]:
    """Two figures: what the models learned, and how the steps went."""
    models = list(dict.fromkeys(job.model for job in jobs))
    sets = sorted({key for job in jobs for row in job.evals for key in row if key.endswith("/top1")})
    panels = {"task": "Task loss", "r": "r, distillation over task loss"}
    panels |= {"validation_loss": "Validation loss"} | {key: f"Top-1 on {key[:-5]}, %" for key in sets}
    curves = []
    for job in jobs:
        values = {"task": _pairs(job.train, "task", "loss"), "r": _pairs(job.train, "r")}
        values |= {key: _pairs(job.evals, key) for key in ("validation_loss", *sets)}
        values |= {key: _pairs(job.train, key) for key in _STEPS}
        values["data_wait"] = [(x, 100 * share) for x, share in values["data_wait"]]
        if any(values.values()):
            curves.append(figures.Curve(job.name, str(job.plan["kind"]), models.index(job.model), values))
    return figures.curves_figure("curves", curves, panels), figures.curves_figure("steps", curves, _STEPS)


def _costs(state: dict[str, Any]) -> figures.Figure | None:
    links = [job for job in state["jobs"] if job["kind"] == "link"]
    tries = [job for job in state["jobs"] if job["kind"] == "try"]
    alone = macs_alone(state)
    bars: list[figures.Bar] = []
    chain, rest = [0.0, 0.0, 0.0], 0.0
    for job in (*tries, *links):
        cost, name = job["cost"], job["spec"]["name"]
        parts = [cost["student_training_macs"] * cost["samples"], cost["teacher_forward_macs"] * cost["samples"]]
        parts.append(max(0.0, cost["total_macs"] - sum(parts)))
        chain = [total + part for total, part in zip(chain, parts, strict=True)]
        bars.append((job["name"] if job in tries else name, [*parts, 0.0]))
        if name in alone and job not in tries:
            rest += alone[name]
            bars.append(("", [0.0, 0.0, 0.0, alone[name]]))
    if len(links) > 1:
        bars.append(("all", [*chain, 0.0]))
        if rest and all(job["spec"]["name"] in alone for job in links):
            bars.append(("", [0.0, 0.0, 0.0, rest]))
    return figures.cost_figure(bars)


@dataclass(frozen=True)
class Sheet:
    """Held-out images with the answers of the model of `job`."""

    job: str
    model: str
    name: str
    images: list[figures.SheetImage]

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(each.right is True for each in self.images)


def contact_sheet(run: Path, state: dict[str, Any], summary: Summary) -> Sheet | None:
    """Of the last link that has one, else of the last model that has one."""
    name = state.get("contact_sheet")
    for row in [*reversed(summary.links), *reversed(summary.baselines + summary.controls)]:
        stored = stored_arrays(score_file(run, row.job, CLASSES_FILE))
        if not stored:
            continue
        images, ids, labels, names = (stored[key] for key in ("images", "ids", "labels", "classnames"))
        scored = stored_arrays(score_file(run, row.job, str(name)))
        answers = dict(zip(scored["ids"].tolist(), scored["predictions"].tolist(), strict=True)) if scored else {}
        shown = []
        for image, sample, label in zip(images, ids.tolist(), labels.tolist(), strict=True):
            answer = answers.get(sample)
            text = "" if answer is None else _class_name(names, answer) if answer >= 0 else "no finite score"
            right = None if answer is None else answer == label
            shown.append(figures.SheetImage(image, _class_name(names, label), text, right))
        return Sheet(row.job, row.model, str(name), shown)
    return None


def _class_name(names: NDArray[Any], number: int) -> str:
    # Sheets of older versions have no names where the set has none.
    return str(names[number] if len(names) else number)


def caption_sheet(run: Path, summary: Summary) -> Sheet | None:
    """Images with their first caption and the one that the last link finds; None where none were kept."""
    for row in [*reversed(summary.links), *reversed(summary.baselines + summary.controls)]:
        path = score_file(run, row.job, CAPTIONS_FILE)
        if stored := stored_arrays(path):
            texts = (stored[key].tolist() for key in ("captions", "answers", "right"))
            shown = [figures.SheetImage(*each) for each in zip(stored["images"], *texts, strict=True)]
            return Sheet(row.job, row.model, str(read_record(path).get("set", "")), shown)
    return None


def _gather(run: Path) -> dict[str, Any]:
    """Everything that the two files show."""
    summary = summarise(run)
    state = read_state(run / "run.json")
    jobs = [read_job(run, plan) for plan in state["jobs"]]
    state = with_measured_costs(state, jobs)
    path = run / "recipe.yaml"
    recipe = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    learned, steps = _curves(jobs)
    return {
        "title": str(state.get("name") or summary.run),
        "run": summary.run,
        "sentence": sentence(summary, state, jobs),
        "tiles": tiles(summary, state),
        "unfinished": unfinished(jobs),
        "results": list(summary_tables(summary)),
        "accuracy": _accuracy(summary),
        "curves": learned,
        "steps": steps,
        "costs": _costs(state),
        "captions": {**CAPTIONS, "costs": f"{CAPTIONS['costs']}{planned_costs(jobs)}."},
        "sheet": contact_sheet(run, state, summary),
        "found": caption_sheet(run, summary),
        "scores": score_tables(summary, roles_of(recipe)),
        "classes": class_tables(summary),
        "jobs": jobs_table(jobs),
        "data": data_tables(state),
        "environment": environment(state, jobs),
        "recipe": recipe,
        "primary": summary.primary,
        "written": now(),
        "version": versions()["compt"],
    }


def page(template: str, content: dict[str, Any]) -> str:
    """A page that needs no other file."""
    loader = FileSystemLoader(TEMPLATES)
    pages = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return pages.get_template(template).render(content, colours=figures.COLOURS)


def write_tables(path: Path, title: str, sentence: str, tables: Sequence[TextTable]) -> None:
    """Write PATH.md and PATH.html: one sentence and tables. Raises RunError."""
    head = f"# {escape_markdown(sentence)}\n\n"
    write_text(path.with_name(f"{path.name}.md"), head + "\n".join(table.markdown() for table in tables))
    content = {"title": title, "sentence": sentence, "tables": tables, "written": now(), "version": versions()["compt"]}
    write_text(path.with_name(f"{path.name}.html"), page("tables_page.html.j2", content))


FIGURES = ("accuracy", "curves", "steps", "costs")
_THINNED = f"Where a log has more than {figures.POINTS} lines, a point is the mean of several."
CAPTIONS = {
    "accuracy": "Bars: 95 % intervals. A point stands at the MACs spent on its model and on those before it in the "
    "line; a control, the last model from scratch, at its own MACs only.",
    "curves": "Solid: chain; dashed: baselines; dotted: controls; dash-dotted: failed tries; the later of "
    f"a kind are paler. r is the weighted feature loss over the task loss. {_THINNED}",
    "steps": "Learning rate and gradient norm are those of the logged step. Images per second (of all processes) "
    f"and the time spent waiting for data are means since the line before, without evaluations. {_THINNED}",
    "costs": "Multiply-accumulates of training, with the teacher's forward passes in the chain's share",
}


def _markdown(content: dict[str, Any]) -> str:
    lines = [f"# {escape_markdown(content['title'])}", "", escape_markdown(content["sentence"]), ""]
    if content["unfinished"]:
        lines += ["**Not finished.**", "", *(f"- {escape_markdown(line)}" for line in content["unfinished"]), ""]

    def figure(key: str, title: str, nothing: str = "") -> None:
        drawn = content[key]
        if drawn is not None:
            path = f"{PICTURES}/{drawn.name}.png"
            lines.extend(
                [f"### {title}", "", f"![{escape_markdown(drawn.text)}]({path})", "", content["captions"][key], ""]
            )
        elif nothing:
            lines.extend([f"### {title}", "", nothing, ""])

    lines += [table.markdown() for table in content["results"]]
    figure("accuracy", "Accuracy against cost", _nothing_scored(content))
    sheet: Sheet | None = content["sheet"]
    if sheet is not None:
        text = f"Answers of {sheet.model} on {sheet.name}: {sheet.right} of {len(sheet.images)} right"
        lines += ["### Images", "", f"![{escape_markdown(text)}]({PICTURES}/contact.png)", ""]
        lines += [f"{escape_markdown(text)} (✓); the true name is bold.", ""]
    found: Sheet | None = content["found"]
    if found is not None:
        text = f"Captions that {found.model} finds on {found.name}: {found.right} of {len(found.images)} right"
        lines += ["### Captions", "", f"![{escape_markdown(text)}]({PICTURES}/captions.png)", ""]
        lines += [f"{escape_markdown(text)} (✓); the first caption of the image is bold.", ""]
    figure("curves", "Training")
    figure("steps", "Steps")
    figure("costs", "Cost")
    lines += [table.markdown() for table in (*content["scores"], *content["classes"])]
    lines.append(content["jobs"].markdown())
    lines += [table.markdown() for table in content["data"]]
    lines.append(TextTable("Environment", ["", "value"], content["environment"]).markdown())
    if content["recipe"]:
        lines += ["### Recipe", "", *code_block(content["recipe"], "yaml"), ""]
    lines.append(f"Written {content['written']} by compt {content['version']}.")
    return "\n".join(lines) + "\n"


def _nothing_scored(content: dict[str, Any]) -> str:
    if content["primary"] is None:
        return "The recipe names no primary evaluation set (evaluation.primary)."
    return f"No model has been scored on {escape_markdown(content['primary'])} yet."


def write_report(run: Path) -> Path:
    """Write RUN/report.html, which needs no other file, and RUN/report.md with RUN/report/*.png; returns the former.

    Raises RunError when RUN is not a run folder or cannot be written, and for a report of jobs that are not there any
    more: it would be replaced by one that shows nothing.
    """
    if (run / "report.md").exists() and not (run / "jobs").exists():
        raise RunError(f"{run} has a report and no jobs, as saved results do: nothing was written")
    with whole_files(run):
        content = _gather(run)
    drawn = {content[key].name: content[key].png for key in FIGURES if content[key] is not None}
    if content["sheet"] is not None:
        drawn["contact"] = figures.contact_png(content["sheet"].images)
    if content["found"] is not None:
        drawn["captions"] = figures.contact_png(content["found"].images, 6)
    with new_folder(run / PICTURES) as folder:
        for name, png in drawn.items():
            (folder / f"{name}.png").write_bytes(png)
    write_text(run / "report.md", _markdown(content))
    path = run / "report.html"
    content |= {"nothing_scored": _nothing_scored(content)}
    write_text(path, page("report.html.j2", content))
    return path
