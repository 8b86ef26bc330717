"""The model card that travels with every export: README.md with the Hub's metadata as YAML.

Names from a model's files are data of others. Each passes `visible` or `escape_markdown`, so none becomes markup, a
second line of metadata, or an escape sequence of a terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from compt import __version__
from compt.evaluate.sets import task_class
from compt.export.formats import ExportFormat
from compt.models.states import shape_of
from compt.report.summary import Row, accumulated, chain_to, read_state, whole_files
from compt.text import TextTable, code_block, count, escape_markdown, hours, visible
from compt.weights.artefact import Artefact

_TAGS = ("clip", "compt", "chain-of-models")
_ORIGINS = {
    "job": "Job",
    "seed": "Seed",
    "parent": "Teacher",
    "recipe_hash": "Hash of the job",
    "hash": "Hash of the weights",
}


def model_card(
    source: Artefact, kind: ExportFormat, notes: Sequence[str], licence: str | None, trained: int | None = None
) -> str:
    """The card of a model in one format. `notes`: sentences in Markdown about loading it.

    `trained`: the image size of the weights that `source` was made from, which `source.hash` and scores are of.

    A model that lies in its run's folder gets the chain that led to it, costs, scores and the data's fingerprint.
    Raises RunError where that run is damaged.
    """
    name = visible(source.spec.name, "")
    data = ModelCardData(
        library_name=kind.library,
        pipeline_tag=kind.task,
        tags=[*_TAGS, source.spec.arch],
        license=visible(licence, "") if licence else None,
        model_name=name,
    )
    body = [f"# {escape_markdown(name)}", "", f"A CLIP model as {kind.about}. Written by compt {__version__}.", ""]
    body += ["## Load it", "", *code_block("\n".join(kind.load), "python"), ""]
    body += [*(f"- {note}" for note in notes), ""]
    body += [table.markdown() for table in _tables(source, trained or source.spec.image_size)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body)))


def _tables(source: Artefact, trained: int) -> Iterator[TextTable]:
    yield _model_table(source)
    run, job = _origin(source)
    values = {
        title: str(source.manifest[key]) for key, title in _ORIGINS.items() if source.manifest.get(key) is not None
    }
    values = {_ORIGINS["hash"]: source.hash} | values
    at = ""
    if trained != source.spec.image_size:
        at = f" at {trained} pixels"
        values = {
            f"{key} that it was made from" if key == _ORIGINS["hash"] else key: each for key, each in values.items()
        }
    if run is None:
        yield TextTable("Where it comes from", ("", ""), list(values.items()))
        return
    chain = chain_to(run, job)
    with whole_files(run):
        values["Fingerprint of the training data"] = str(read_state(run / "run.json").get("data_fingerprint", "-"))
        yield _chain_table(chain)
        yield _score_table(f"Scores{at}", chain[-1].scores)
        yield TextTable("Where it comes from", ("", ""), list(values.items()))


def _model_table(source: Artefact) -> TextTable:
    spec, images = source.spec, source.preprocess
    parameters = sum(math.prod(shape_of(source.state, name)) for name in source.state)
    sizes = (
        f"width {spec.width}, depth {'-'.join(map(str, spec.depths or (spec.depth,)))}, patches of {spec.patch_size}"
    )
    rows = [
        ("Image tower", f"{'ViT' if spec.arch == 'vit' else 'Swin'}, {sizes}"),
        ("Text tower", f"transformer, width {spec.text_width}, depth {spec.text_depth}, {spec.context_length} tokens"),
        ("Joint embedding", f"{spec.embed_dim} channels"),
        ("Activation", "QuickGELU" if spec.quick_gelu else "GELU"),
        ("Parameters", f"{parameters:,}"),
        ("Images", f"{spec.image_size} pixels, {images.interpolation}, {images.resize_mode}"),
        ("Mean of colours", ", ".join(map(str, images.mean))),
        ("Standard deviation", ", ".join(map(str, images.std))),
        *((one.name, f"{float(source.state[one.name]):.4f}") for one in spec.scalars),
    ]
    return TextTable("Model", ("", ""), rows)


def _origin(source: Artefact) -> tuple[Path | None, str]:
    """The run in whose folder the model lies, and its job; None for a model that lies elsewhere, or is another."""
    job = source.path.resolve().parent
    run = job.parent.parent
    if source.path.name != "model" or not all(path.is_file() for path in (job / "manifest.json", run / "run.json")):
        return None, ""
    same = read_state(job / "manifest.json").get("model_hash") == source.hash
    return (run, job.name) if same else (None, "")


def _chain_table(chain: Sequence[Row]) -> TextTable:
    rows = [(row.job, row.model, f"{row.epochs:.3g}", count(row.macs), hours(row.device_hours)) for row in chain]
    total = accumulated([row.device_hours for row in chain])[-1]
    rows.append(("Together", "", "", count(sum(row.macs for row in chain)), hours(total)))
    note = (
        "Each model's teacher is the one above it. MACs and device time of training, with the teacher's forward passes."
    )
    return TextTable("Training", ("Job", "Model", "Epochs", "MACs", "Time"), rows, [note], left=2)


def _score_table(title: str, scores: Mapping[str, Mapping[str, Any]]) -> TextTable:
    rows = []
    for name, record in scores.items():
        for line in task_class(record["task"]).rows(record):
            for key, value in line.scores.items():
                low, high = record.get(f"{key}_interval") or (None, None)
                interval = f"{low:.2f} to {high:.2f}" if low is not None and high is not None else "-"
                if value is not None:
                    rows.append((name, key, f"{value:.{line.digits + 1}f}", interval, f"{record['n']:,}"))
    precisions = {record.get("scored_by", {}).get("precision", "").removeprefix("torch.") for record in scores.values()}
    notes = [f"Computed in {name}." for name in sorted(filter(None, precisions))]
    return TextTable(title, ("Set", "Score", "Value", "95 % interval", "Images"), rows, notes, left=2)
