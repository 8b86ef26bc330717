"""Names, captions, keys and values that strangers chose are shown as text by every command, and do nothing."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
import warnings
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import save_file

from compt.cli.main import _print_traceback, main
from compt.evaluate.encoder import save_result
from compt.models.clip import build
from compt.models.presets import resolve
from compt.text import VisibleConsole
from compt.train.metrics import MetricsWriter
from compt.weights.artefact import write_artefact
from tests.helpers.curves import lengths
from tests.helpers.run import make_run
from tests.helpers.run import recipe as run_recipe
from tests.helpers.shards import picture, write_tar
from tests.helpers.states import export_state

EVIL = "\x1b]52;c;eA==\x07\x1b[2J\x9b31m\u202e\u2066\r\x08[red]a[bold]<img src=x onerror=q>`|`![i](x) \u2028_b_"
"""Escapes of a terminal, C1 controls, text that runs backwards, and the markup of rich, HTML and Markdown."""
SEEN = ("[bold]", "=q>`|`![i](x)")
"""Parts of EVIL that a command shows, at least one of them: narrow columns cut it, and table headers end at a comma."""
RECIPE = "family: {members: [vit_pico]}\nchain: {links: [{model: vit_pico, train: {epochs: 1}}]}\n"
PLAIN = set(
    "a article b body br code dd defs details div dl dt em figcaption figure footer g h1 h2 h3 head header hr html img "  # noqa: SIM905
    "li link main meta p path pre rect section small span strong style summary svg table tbody td text th thead title "
    "tr ul use clippath tspan".split()
)
"""The tags of a report."""
TINY = {"width": 16, "text_width": 16, "head_width": 8, "text_head_width": 8, "context_length": 16, "embed_dim": 24}


def hidden(text: str) -> list[str]:
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything that has a name is called EVIL."""
    base = tmp_path_factory.mktemp("world")
    (base / f"{EVIL}.yaml").write_text(f"{RECIPE}# {EVIL}\n")
    (base / "keys.yaml").write_text(json.dumps({EVIL: 1, "data": {EVIL: EVIL}, "name": EVIL, "family": EVIL}))
    (base / "value.yaml").write_text(json.dumps({"optimizer": {"precision": EVIL}}))
    members = [
        (f"{EVIL}.png", picture(0, 20, 20)),
        (f"{EVIL}.txt", EVIL.encode()),
        (f"{EVIL}.json", json.dumps({EVIL: EVIL, "caption": EVIL}).encode()),
        (f"b{EVIL}.png", b"no image"),
        (f"b{EVIL}.txt", b"b"),
        (f"c.{EVIL}.{EVIL}", b"b"),
        (f"{EVIL}/d.jpg", b"b"),
    ]
    write_tar(base / "set" / f"{EVIL}.tar", members)
    (base / "set.csv").write_text(f'key,"{EVIL}"\n"{EVIL}",caption\n', newline="")
    for name in (EVIL, f"b{EVIL}"):
        (base / "classes" / name).mkdir(parents=True)
        (base / "classes" / name / f"{EVIL}.png").write_bytes(picture(1, 20, 20))
    (base / "classes" / "templates.txt").write_text(f"{EVIL} {{c}}\n")
    save_file({EVIL: np.zeros(3, np.float32)}, base / f"{EVIL}.safetensors", {EVIL: EVIL})
    spec = resolve("vit_pico", TINY)
    write_artefact(base / EVIL, export_state(build(spec, seed=1)), spec, {"left_out": [EVIL]})
    manifest = json.loads((base / EVIL / "manifest.json").read_text())
    manifest["spec"]["name"] = EVIL
    manifest["versions"] = {EVIL: EVIL}
    (base / EVIL / "manifest.json").write_text(json.dumps(manifest))
    (base / "other").mkdir()
    (base / "other" / "manifest.json").write_text(json.dumps({**manifest, "preprocess": {EVIL: EVIL}}))
    _write_run(base / f"run{EVIL}")
    for folder in lengths(base / f"curves{EVIL}", {5: 20.0, 10: 24.0}):
        for path in folder.glob("jobs/*/manifest.json"):
            path.write_text(path.read_text().replace('"vit_micro"', json.dumps(EVIL)))
    (base / "speeds.json").write_text(json.dumps({EVIL: EVIL}))
    return base


def _write_run(run: Path) -> None:
    """A finished run whose names, versions, class names and logged keys are EVIL."""
    family = {"members": ["vit_nano", "vit_micro"]}
    links = [{"model": name, "train": {"epochs": 2}, "warmup": {"steps": 1}} for name in family["members"]]
    made = make_run(run, use=run_recipe(family=family, chain={"links": links}, baselines=None), baselines=False, n=40)
    state = json.loads((run / "run.json").read_text())
    state |= {"name": EVIL, "command": EVIL, "data_fingerprint": EVIL}
    for job in state["jobs"]:
        job["spec"]["name"] = EVIL
    (run / "run.json").write_text(json.dumps(state))
    for job in made.jobs:
        path = run / "jobs" / job.name / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["machine"] = {EVIL: EVIL, "device": EVIL}
        manifest["spec"]["name"] = EVIL
        path.write_text(json.dumps(manifest))
        lines = path.with_name("metrics.jsonl")
        lines.write_text(lines.read_text() + json.dumps({"kind": "eval", "step": 9, "samples": 9, f"{EVIL}/top1": 1.0}))
        names = np.array([EVIL] * 200)
        images = np.zeros((2, 3, 8, 8), np.uint8)
        arrays = {"images": images, "ids": np.arange(2), "labels": np.arange(2), "classnames": names}
        save_result(path.with_name("scores"), "contact", {"set": EVIL, "pictures": 2}, arrays)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + f"# ````\n# {EVIL}\n")


# (words, exit code, whether EVIL is among what the command prints)
EXITS: list[tuple[list[str], int, bool]] = [
    (["plan", "{0}/{E}.yaml"], 2, True),
    (["plan", "{0}/keys.yaml"], 2, True),
    (["plan", "{0}/value.yaml"], 2, True),
    (["plan", "{0}/nowhere{E}"], 2, True),
    (["plan", "cc3m_vit", "--set", "{E}=1"], 2, True),
    (["plan", "cc3m_vit", "--set", "data={E}"], 2, True),
    (["plan", "cc3m_vit", "--memory", "{E}"], 2, False),
    (["plan", "cc3m_vit", "--throughput", "{0}/speeds.json"], 2, False),
    (["plan", "cc3m_vit", "--throughput", "{0}/{E}"], 2, True),
    (["plan", "cc3m_vit", "{E}"], 2, True),
    (["plan", "cc3m_vit", "--{E}"], 2, False),
    (["plan", "{0}/{E}.yaml", "--auto"], 2, True),
    (["{E}"], 2, True),
    (["recipes", "show", "{0}/{E}.yaml"], 0, True),
    (["recipes", "copy", "{0}/{E}.yaml", "{0}/nowhere/{E}"], 0, True),
    (["macs", "{E}"], 2, True),
    (["bench", "gpu-hours", "cc3m_vit", "--throughput", "{0}/{E}"], 2, True),
    (["bench", "throughput", "{E}"], 2, True),
    (["bench", "profile", "cc3m_vit", "--out", "{0}/missing/{E}"], 2, True),
    (["slurm", "names", "{0}/{E}.yaml"], 2, True),
    (["data", "check", "{0}/set/*.tar"], 3, True),
    (["data", "check", "{0}/set/*.tar", "--json"], 3, False),
    (["data", "check", "{0}/set/*.tar", "--captions-csv", "{0}/set.csv"], 3, False),
    (["data", "index", "{0}/set/*.tar"], 0, True),
    (["data", "index", "{0}/set/{E}"], 3, True),
    (["eval", "{0}/{E}.safetensors", "--data", "{0}/set/*.tar", "--model", "vit_pico"], 4, True),
    (["eval", "{0}/{E}", "--data", "{0}/classes", "--per-class"], 0, True),
    (["eval", "{0}/{E}", "--data", "{0}/classes", "--json"], 0, False),
    (["eval", "{0}/other", "--data", "{0}/classes"], 4, True),
    (["eval", "{0}/{E}", "--data", "{0}/set/*.tar", "--label", "{E}"], 3, False),
    (["expand", "{0}/{E}", "{E}", "{0}/out"], 0, True),
    (["expand", "{0}/{E}", "--set", "width=32", "--set", "head_width=8", "--dry-run", "--", "vit_pico"], 0, True),
    (["expand", "{0}/{E}.safetensors", "vit_pico", "{0}/out", "--teacher-model", "{E}"], 2, True),
    (["export", "{0}/{E}", "{0}/{E}"], 4, True),
    (["report", "{0}/{E}"], 5, True),
    (["curves", "{0}/curves{E}"], 5, True),
    (["compare", "{0}/run{E}"], 0, False),
    (["doctor", "{0}/{E}.yaml/{E}"], 5, True),
]


def run(world: Path, words: list[str]) -> int:
    """The exit code of a command in which {0} is the folder and {E} is EVIL."""
    with pytest.raises(SystemExit) as end:
        main(lambda: [word.replace("{0}", str(world)).replace("{E}", EVIL) for word in words])
    return int(end.value.code or 0)


@pytest.mark.parametrize(("words", "code", "shown"), EXITS, ids=[" ".join(words) for words, *_ in EXITS])
def test_commands_show_it_as_text(
    words: list[str], code: int, shown: bool, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(world, words)
    printed = "".join(capfd.readouterr())
    assert not hidden(printed)
    assert "Traceback" not in printed
    assert any(part in "".join(printed.split()) for part in SEEN) >= shown
    assert found == code, printed


def tags(html: str) -> list[tuple[str, dict[str, str | None]]]:
    """Every tag that a browser sees, with its attributes."""
    found: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(html)
    return found


def test_reports_show_it_as_text(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_folder = world / f"run{EVIL}"
    assert run(world, ["report", "{0}/run{E}"]) == 0
    printed = "".join(capfd.readouterr())
    page, text = ((run_folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    rendered = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    for shown in (printed, page, text, rendered):
        assert not hidden(shown)
        assert "[bold]" in shown.replace("\\[", "[")
    for html in (page, rendered):
        assert {tag for tag, _ in tags(html)} <= PLAIN
        for tag, attributes in tags(html):
            assert not any(name.startswith("on") for name in attributes)
            assert tag != "img" or str(attributes["src"]).startswith(("data:image/", "report/"))
    drawings = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert any("[bold]" in each for each in drawings)
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("xlink:", ""))


def test_curves_show_it_as_text(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["curves", "{0}/curves{E}/e5", "{0}/curves{E}/e10", "--out", "{0}/drawn"]
    assert run(world, words) == 0
    printed = "".join(capfd.readouterr())
    drawn = (world / "drawn" / "curves.svg").read_text()
    ElementTree.fromstring(drawn)
    for shown in (printed, drawn, (world / "drawn" / "curves.json").read_text()):
        assert not hidden(shown)
        assert "=q>`|`" in shown.replace("&gt;", ">")


def test_progress_shows_it_as_text(tmp_path: Path) -> None:
    shown = io.StringIO()
    for terminal in (True, False):
        console = VisibleConsole(file=shown, force_terminal=terminal, width=200, color_system=None)
        writer = MetricsWriter(tmp_path / str(terminal), total_steps=9, batch=1, title=EVIL, console=console)
        with writer:
            writer.log(1, {"loss": 1.0})
            writer.log_evaluation(9, {f"{EVIL}/top1": 1.0})
            writer.advance(9)
    assert not hidden(re.sub(r"\x1b\[\??[0-9]*[A-Zhl]|\r", "", shown.getvalue()))
    assert shown.getvalue().count("=q>`|`![i](x)") >= 3


def test_slurm_shows_it_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compt.chain.slurm.clash", lambda *_: EVIL)
    assert run(tmp_path, ["slurm", "submit", "demo", "--run-folder", "{0}/{E}", "--sbatch", "--comment={E}"]) == 0
    out, err = capfd.readouterr()
    assert not hidden(out + err)
    assert all("=q>`|`![i](x)" in shown for shown in (out, err))


def test_warnings_and_tracebacks_show_it_as_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.captureWarnings(False)
    with warnings.catch_warnings():
        run(tmp_path, ["plan", "{0}/nowhere"])
        warnings.showwarning(UserWarning(EVIL), UserWarning, "file.py", 1)
    _print_traceback(ValueError, ValueError(EVIL), None)
    error = capfd.readouterr().err
    assert not hidden(error)
    assert error.count("=q>`|`![i](x)") == 2
