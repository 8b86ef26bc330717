"""The report of runs in every state: one page that needs no other file, and Markdown with figures."""

from __future__ import annotations

import io
import json
import pickle
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compt.design.curves import Point
from compt.design.runs import score_file
from compt.errors import RunError
from compt.evaluate.encoder import save_result
from compt.files import read_json, write_json
from compt.report import figures
from compt.report.content import acceleration, class_tables, read_job, sentence, tiles, unfinished
from compt.report.figures import COLOURS
from compt.report.summary import stored_arrays, summarise
from compt.report.write import contact_sheet, write_report
from compt.train.metrics import read_metrics
from tests.helpers.run import RECIPE, make_run, recipe

REST = ("baseline-vit_micro-s0", "baseline-vit_mini-s0", "control-equal_epochs", "control-equal_macs")
VOID = {"meta", "img", "link", "br", "hr", "input", "path", "use"}


class Page(HTMLParser):
    """Tags that are open, attributes that name other files, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True, scope="module")
def drawn() -> Iterator[dict[bytes, Any]]:
    """Figures by what they show. Each is drawn once, which takes up to a second: most tests are about the text."""
    made: dict[bytes, Any] = {}

    def once(draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            # The curves of the steps take most of the time, and no test is about their look.
            shown = ("steps", bool(arguments[1])) if arguments[0] == "steps" else arguments
            key = pickle.dumps((draw.__name__, shown))
            if key not in made:
                made[key] = draw(*arguments)
            return made[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("accuracy_figure", "curves_figure", "cost_figure", "contact_png"):
            patch.setattr(figures, name, once(getattr(figures, name)))
        yield made


def report(run: Path) -> tuple[Page, str]:
    """The page and the Markdown, with what has to hold for each."""
    path = write_report(run)
    assert path == run / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert "script" not in page.tags
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references), "needs another file"
    assert "http" not in source.replace(f"{COLOURS}", "")
    assert not re.search(r"\bnan\b|\bNone\b|Undefined", page.text)
    markdown = (run / "report.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]*)\)", markdown):
        picture = Image.open(run / target)
        assert min(picture.size) > 100
    return page, markdown


def open_run(folder: Path, **options: Any) -> None:
    states = {"2-vit_micro": "training", "3-vit_mini": "planned", **dict.fromkeys(REST, "planned")}
    make_run(folder, **({"states": states, "at": 0.4} | options))


def headline(run: Path) -> str:
    state = read_json(run / "run.json")
    return sentence(summarise(run), state, [read_job(run, plan) for plan in state["jobs"]])


def test_a_finished_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    page, markdown = report(tmp_path)
    for text in (
        "7 of 7 models trained; vit_mini reaches 26.0 % top-1 on test_style (chance 0.5 %)",
        "Accuracy against cost",
        "3-vit_mini",
        "control-equal_epochs",
        "val_style (select)",
        "Recall at 1 / 5 / 10",
        "Example CPU @ 2.10GHz",
        "compt chain recipes/shapes.yaml --baselines",
        "9f8e7d6c5b4a",
        "same as 1-vit_nano",
        "2 image",
        "name: shapes",
    ):
        assert text in page.text, text
    assert "a control, the last model from scratch, at its own MACs only" in page.text
    assert page.text.count("Where a log has more than 240 lines, a point is the mean of several.") == 2
    assert "control-equal_macs (from scratch, the link's MACs)" in page.text
    assert "Not finished" not in page.text
    assert page.tags.count("svg") == 8
    assert page.tags.count("img") == 40 + 12
    assert "12 images of captions, evenly spread" in page.text
    assert "that 3-vit_mini finds for them: 6 right" in page.text
    assert "✓ a tiny red circle on white" in page.text
    pictures = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert pictures == ["accuracy.png", "captions.png", "contact.png", "cost.png", "curves.png", "steps.png"]
    assert all(f"](report/{name})" in markdown for name in pictures)
    assert "Not finished" not in markdown
    assert "| 3-vit_mini | 12 | 26.00 | 21.9 to 30.5 |" in markdown


def test_the_sentence_says_what_is_there(tmp_path: Path) -> None:
    make_run(tmp_path / "whole")
    said = headline(tmp_path / "whole")
    assert "+2.0 points against its baseline: lossless [95 %: " in said
    assert "+15.0 points against the same model from scratch for the link's epochs [95 %: +11" in said
    assert "+13.0 points against the same model from scratch for the link's MACs [95 %: +9" in said
    assert "this run has no control with the whole chain's MACs to compare with; the chain costs" in said
    assert said.endswith("the chain costs 3.0x fewer MACs than the baselines.")
    make_run(tmp_path / "chain", baselines=False)
    assert headline(tmp_path / "chain") == (
        "3 of 3 models trained; vit_mini reaches 26.0 % top-1 on test_style (chance 0.5 %)."
    )
    open_run(tmp_path / "open")
    assert "the chain will cost 3.0x fewer" in headline(tmp_path / "open")
    make_run(tmp_path / "none", use=recipe(evaluation=None), baselines=False)
    assert headline(tmp_path / "none") == "3 of 3 models trained."


def test_a_control_is_drawn_at_its_own_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, float] = {}

    def note(primary: str, chain: object, alone: object, controls: list[Point]) -> None:
        drawn.update({point.label: point.macs for point in controls})

    made = make_run(tmp_path)
    monkeypatch.setattr("compt.report.write.figures.accuracy_figure", note)
    write_report(tmp_path)
    assert drawn == {
        "same epochs": made.job("control-equal_epochs").cost.total_macs,
        "same MACs": made.job("control-equal_macs").cost.total_macs,
    }


def test_tiles_and_acceleration(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    state = read_json(tmp_path / "run.json")
    assert acceleration(state) == pytest.approx(made.acceleration())
    shown = tiles(summarise(tmp_path), state)
    expected = ["26.0", "+2.0", "+15.0", "+13.0", "not run", f"{made.acceleration():.2f}"]
    assert [value for value, _, _ in shown][:6] == expected
    assert shown[4][2] == "against the model from scratch for the whole chain's MACs"
    state["jobs"] = [job for job in state["jobs"] if job["name"] != "baseline-vit_mini-s0"]
    assert acceleration(state) is None


def test_a_chain_that_costs_more_says_so_in_its_tile(tmp_path: Path) -> None:
    made = make_run(tmp_path)
    state, found = read_json(tmp_path / "run.json"), summarise(tmp_path)
    for job in state["jobs"]:
        job["cost"]["total_macs"] *= 8 if job["kind"] == "link" else 1
    ratio = f"{8 / (made.acceleration() or 0):.2f}"
    assert (ratio, "x", "the MACs of all baselines") in tiles(found, state)
    tried = replace(found, tries=[replace(found.links[1], kind="try")])
    assert (ratio, "x", "the MACs of all baselines, failed tries included") in tiles(tried, state)


def test_a_run_with_a_job_in_training(tmp_path: Path) -> None:
    open_run(tmp_path)
    page, markdown = report(tmp_path)
    assert "2-vit_micro: training, step 200 of 580; last log line 20" in page.text
    assert "Not begun: 3-vit_mini, baseline-vit_micro-s0" in page.text
    assert "**Not finished.**" in markdown
    assert "r, distillation over task loss" in page.text, "curves of the job in training are there"


def test_states_in_words(tmp_path: Path) -> None:
    states = {"2-vit_micro": "training", "3-vit_mini": "expanded", "control-equal_macs": "evaluated"}
    make_run(tmp_path, states=states)
    jobs = [read_job(tmp_path, plan) for plan in read_json(tmp_path / "run.json")["jobs"]]
    said = {job.name: job.progress() for job in jobs}
    assert said["2-vit_micro"] == "trained, not scored yet"
    assert said["3-vit_mini"] == "weights made"
    assert said["control-equal_macs"] == "done"
    assert unfinished(jobs)[1] == "3-vit_mini: weights made."
    report(tmp_path)


def test_a_job_that_logged_nothing_yet_or_was_killed_in_a_line(tmp_path: Path) -> None:
    open_run(tmp_path)
    log = tmp_path / "jobs" / "2-vit_micro" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"kind": "train", "step": 240, "task": null, "samples": 1}\n{"kind": "tr')
    assert "step 240 of 580" in report(tmp_path)[0].text
    log.unlink()
    assert "2-vit_micro: training, step 0 of 580." in report(tmp_path)[0].text


def test_a_run_without_any_job(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    everything = {job.name: "planned" for job in made.jobs}
    make_run(tmp_path / "empty", states=everything)
    page, markdown = report(tmp_path / "empty")
    assert "0 of 7 models trained; the chain will cost" in page.text
    assert "No model has been scored on test_style yet." in page.text
    assert "No model has been scored on test_style yet." in markdown
    assert "Held-out images" not in page.text


def test_a_run_without_baselines(tmp_path: Path) -> None:
    make_run(tmp_path, baselines=False)
    page, _ = report(tmp_path)
    assert "Differences" not in page.text
    assert "3-vit_mini" in page.text


def test_a_run_without_evaluation(tmp_path: Path) -> None:
    make_run(tmp_path, use=recipe(evaluation=None))
    page, _ = report(tmp_path)
    assert "names no primary evaluation set" in page.text
    assert "All evaluation sets" not in page.text


def test_a_run_of_one_link(tmp_path: Path) -> None:
    one = {"links": RECIPE["chain"]["links"][:1]}
    make_run(tmp_path, use=recipe(chain=one), baselines=True, controls=())
    assert "1 of 1 models trained" in report(tmp_path)[0].text


def test_missing_answers(tmp_path: Path) -> None:
    make_run(tmp_path / "none", npz=False)
    page, _ = report(tmp_path / "none")
    assert "3-vit_mini" in page.text
    assert "Held-out images" not in page.text
    assert "Captions found" not in page.text
    make_run(tmp_path / "some")
    score_file(tmp_path / "some", "3-vit_mini", "test_style").unlink()
    for path in (tmp_path / "some").glob("jobs/*/scores/contact_captions.npz"):
        path.unlink()
    page, _ = report(tmp_path / "some")
    assert "Held-out images" in page.text
    assert "✗" not in page.text, "without answers nothing is marked"
    assert "Captions found" not in page.text
    contact = score_file(tmp_path / "some", "3-vit_mini", "contact")
    contact.write_bytes(contact.read_bytes()[:200])
    page, _ = report(tmp_path / "some")
    assert "what 2-vit_micro takes them for" in page.text


def test_without_the_recipe_file_or_a_metrics_folder(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    for path in tmp_path.rglob("metrics.jsonl"):
        path.unlink()
    page, markdown = report(tmp_path)
    assert page.tags.count("svg") == 4
    assert "### Recipe" not in markdown
    (tmp_path / "recipe.yaml").write_text("- [no recipe")
    report(tmp_path)


def test_the_contact_sheet(tmp_path: Path) -> None:
    make_run(tmp_path)
    sheet = contact_sheet(tmp_path, read_json(tmp_path / "run.json"), summarise(tmp_path))
    assert sheet is not None
    assert (sheet.job, sheet.name, len(sheet.images)) == ("3-vit_mini", "test_style", 40)
    assert 0 < sheet.right < 40
    for picture in sheet.images:
        assert picture.right == (picture.name == picture.answer)
        assert picture.mark == ("✓" if picture.right else "✗")
        kind, _, content = picture.uri.partition(",")
        assert (kind, Image.open(io.BytesIO(b64decode(content))).size) == ("data:image/png;base64", (32, 32))
    source = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'class="right"' in source
    assert "&lt;wide&gt; &amp; low" in source
    assert "<wide>" not in source


def test_a_contact_sheet_without_class_names_shows_numbers(tmp_path: Path) -> None:
    """As of nearest neighbours or a linear probe, in the files of an older version."""
    make_run(tmp_path)
    path = score_file(tmp_path, "3-vit_mini", "contact")
    stored = {**stored_arrays(path), "classnames": np.array([])}
    save_result(path.parent, "contact", {}, stored)
    sheet = contact_sheet(tmp_path, read_json(tmp_path / "run.json"), summarise(tmp_path))
    assert sheet is not None
    assert [picture.name for picture in sheet.images] == [str(label) for label in stored["labels"]]
    assert all(picture.right == (picture.name == picture.answer) for picture in sheet.images)


def test_classes_with_enough_images_have_a_table(tmp_path: Path) -> None:
    make_run(tmp_path, n=2000)
    page, markdown = report(tmp_path)
    table = next(table for table in class_tables(summarise(tmp_path)) if table.title == "Classes of test_style")
    controls = ["vit_mini, same epochs", "vit_mini, same MACs"]
    assert table.header == ["Class", "Images", "3-vit_mini", "vit_mini baseline", *controls]
    stored = stored_arrays(score_file(tmp_path, "3-vit_mini", "test_style"))
    names = read_json(score_file(tmp_path, "3-vit_mini", "test_style").with_suffix(".json"))["classnames"]
    for row in table.rows:
        own = stored["labels"] == names.index(row[0])
        assert row[1:3] == [str(own.sum()), f"{100 * stored['correct'][own].mean():.1f}"]
    shares = [float(row[2]) for row in table.rows]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 40
    assert "160 classes between the best and the worst 20 are left out." in table.notes
    assert page.tags.count("details") == 3
    assert "### Classes of test_style" in markdown
    path = score_file(tmp_path, "baseline-vit_mini-s0", "test_style").with_suffix(".json")
    write_json(path, {**read_json(path), "pins": {"data": "other"}})
    table = next(table for table in class_tables(summarise(tmp_path)) if table.title == "Classes of test_style")
    assert table.header == ["Class", "Images", "3-vit_mini", *controls]


def test_classes_with_few_images_have_no_row(tmp_path: Path) -> None:
    make_run(tmp_path, n=900)
    table = next(table for table in class_tables(summarise(tmp_path)) if table.title == "Classes of test_style")
    assert {row[1] for row in table.rows} == {"5"}
    assert "Left out, with fewer than 5 images: 100 of 200 classes." in table.notes


def test_few_images_a_class_or_missing_files_give_no_table_of_classes(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert class_tables(summarise(tmp_path)) == [], "two images a class"
    make_run(tmp_path / "none", n=2000, npz=False)
    assert class_tables(summarise(tmp_path / "none")) == []


def test_names_are_no_markup(tmp_path: Path) -> None:
    sets = [{"name": "SET", "data": "a.tar", "role": "select"}]
    make_run(tmp_path, use=recipe(name="NAME", evaluation={"primary": "SET", "sets": sets}))
    for path in [*tmp_path.rglob("*.json*"), tmp_path / "recipe.yaml"]:
        odd = path.read_text().replace("NAME", "<script>alert(1)</script>").replace("SET", "<b>x</b>|y$a$")
        path.write_text(odd)
    page, markdown = report(tmp_path)
    assert "<script>alert(1)</script>" in page.text
    assert "<script>" not in markdown.split("### Recipe")[0]
    assert r"&lt;b>x&lt;/b>\|y\$a\$ (select)" in markdown


def test_curves_of_steps_show_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, list[figures.Curve]] = {}

    def note(name: str, curves: list[figures.Curve], panels: dict[str, str]) -> None:
        shown[name] = [replace(each, values={key: each.values[key] for key in panels}) for each in curves]

    make_run(tmp_path)
    monkeypatch.setattr("compt.report.write.figures.curves_figure", note)
    write_report(tmp_path)
    lines = read_metrics(tmp_path / "jobs" / "1-vit_nano" / "metrics.jsonl", "train")
    own = shown["steps"][0]
    assert own.label == "1-vit_nano"
    for key in ("lr", "grad_norm", "samples_per_s"):
        assert own.values[key] == [(line["samples"], line[key]) for line in lines]
    assert own.values["data_wait"] == [(line["samples"], 100 * line["data_wait"]) for line in lines]


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    open_run(tmp_path)
    log = tmp_path / "jobs" / "2-vit_micro" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line.update({key: None for key in ("task", "loss", "r") if key in line})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(tmp_path)


def test_counts_of_what_went_wrong(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / "jobs" / "3-vit_mini" / "manifest.json"
    manifest = read_json(path)
    manifest["trained"] |= {"nonfinite_steps": 1234, "skipped_samples": {"image": 5, "tar": 6}}
    manifest["scores"]["test_style"]["skipped"] = {"image": 3}
    manifest["machine"]["device"] = "Another GPU"
    write_json(path, manifest)
    manifest = tmp_path / "jobs" / "1-vit_nano" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "scores": {}})
    page, _ = report(tmp_path)
    assert "1,234" in page.text
    assert "5 image, 6 tar" in page.text
    assert "Example CPU @ 2.10GHz, Another GPU" in page.text


def test_the_account_of_the_data(tmp_path: Path) -> None:
    make_run(tmp_path)
    _, text = report(tmp_path)
    assert "Training data" not in text
    state = read_json(tmp_path / "run.json")
    account = {
        "used": {"member": 9},
        "unused": {"dots": 4, "future": 1},
        "images": {"dots": 2},
        "first": {"dots": "0.tar: a"},
    }
    write_json(tmp_path / "run.json", {**state, "account": account})
    _, text = report(tmp_path)
    assert "| files in the shards | 13 | 9 | 4 |" in text
    assert "| key with dots (the key ends at the first dot) | 4 (2 images) | 0.tar: a |" in text


def test_a_page_is_written_again_with_the_same_bytes(drawn: dict[bytes, Any], tmp_path: Path) -> None:
    make_run(tmp_path)

    def content() -> list[str]:
        drawn.clear()
        texts = [write_report(tmp_path).read_text(encoding="utf-8"), (tmp_path / "report.md").read_text("utf-8")]
        return [re.sub(r"Written \S+", "", text) for text in texts]

    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "old.png").write_bytes(b"")
    assert content() == content()
    assert not (tmp_path / "report" / "old.png").exists()


def test_drawing_follows_the_pages_colours(tmp_path: Path) -> None:
    make_run(tmp_path)
    source = write_report(tmp_path).read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert used - {"font"} <= COLOURS.keys()
    dark = source[source.index("prefers-color-scheme: dark") :].split("}\n}")[0]
    assert all(f"--{name}:" in dark for name in COLOURS)


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=re.escape(f"{tmp_path / 'no'} is not a run folder")):
        write_report(tmp_path / "no")
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        write_report(tmp_path)
    make_run(tmp_path)
    state = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**state, "account": [1]}))
    with pytest.raises(RunError, match="its run.json, a manifest or scores are damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_saved_report_is_not_replaced(tmp_path: Path) -> None:
    """Saved results have a report and no jobs: a new one would show nothing."""
    (tmp_path / "report.md").write_text("saved")
    write_json(tmp_path / "run.json", {})
    with pytest.raises(
        RunError, match=f"{tmp_path} has a report and no jobs, as saved results do: nothing was written"
    ):
        write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == "saved"
