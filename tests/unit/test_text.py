"""Text from data reaches users only as visible characters."""

from __future__ import annotations

import io
import logging
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from compt.cli.main import main
from compt.text import TextTable, VisibleConsole, VisibleFormatter, code_block, escape_markdown, say, show, visible
from tests.helpers.shards import write_tar

NASTY = [
    "\x1b]52;c;eA==\x1b\\",
    "\x1b[2J\x1b[31mred",
    "a\x9b31mb",
    "over\rwritten\x08\x07\x7f",
    "\u202ereversed\u2066",
    "zero\u200bwidth\ufeff\u00ad",
    "line\u2028break\u0085\x0b\x0c",
    "bytes\udcff",
    "[bold]rich[/] [link=x]y[/link] :smile:",
    "<script>alert(1)</script>&amp;",
    "`code` ![x](y) [a](javascript:b) |cell| $m$ https://a.b",
    "# head",
    "__background__ snake_case _a_",
    "- item",
    "+ item",
    "---",
    "1. first",
    "2) second",
    "-3.81 +1.2 12.9",
]


def hidden(text: str) -> list[str]:
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("text", NASTY)
def test_hidden_characters_are_shown_as_python_writes_them(text: str) -> None:
    shown = visible(text)
    assert not hidden(shown)
    assert shown.isprintable()
    plain = re.sub(r"\\(x..|u....)", lambda m: chr(int(m[1][1:], 16)), shown)
    assert plain.replace("\\r", "\r") == text


@pytest.mark.parametrize("text", ["", "a b", "naïve 日本 ☃", "👩\u200d🚀", "می\u200cخواهم", "tab\tand\nline", "\\x1b"])
def test_what_is_seen_remains(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("width", [20, 80, 300])
def test_tables_show_all_of_it(text: str, width: int) -> None:
    table = TextTable(text, (text, "number"), [(text, "1"), ("ant", text)], [text])
    for console in (VisibleConsole(width=width, file=io.StringIO()), Console(width=width, file=io.StringIO())):
        console.print(table)
        assert not hidden(console.file.getvalue())
        if width == 300:
            assert console.file.getvalue().count(visible(text, "")) >= 4


@pytest.mark.parametrize("text", NASTY)
def test_lines_and_tables_on_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    show(TextTable("title", ("a",), [(text,)]))
    printed = capsys.readouterr().out
    assert not hidden(printed)
    assert visible(text) in printed.splitlines()[0]


def test_a_console_keeps_its_own_colours() -> None:
    console = VisibleConsole(file=io.StringIO(), force_terminal=True, color_system="standard", highlight=False)
    console.print("\x1b[2Jtext", style="red", markup=False)
    assert console.file.getvalue() == "\x1b[31m\\x1b[2Jtext\x1b[0m\n"


@pytest.mark.parametrize("text", NASTY)
def test_log_lines(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        record = logging.LogRecord("name", 30, "", 0, "said %s", (text,), (ValueError, error, error.__traceback__))
    assert not hidden(VisibleFormatter("%(message)s").format(record))


@pytest.mark.parametrize("text", [*NASTY, "````\n<b>\n````", "``````````"])
def test_a_block_of_code_ends_at_its_own_end(text: str) -> None:
    first, *inside, last = "\n".join(code_block(text, "yaml")).split("\n")
    assert set(last) == {"`"}
    assert first == f"{last}yaml"
    assert not any(line.strip().startswith(last) for line in inside)
    assert not hidden("\n".join(inside))


@pytest.mark.parametrize("text", NASTY)
def test_markdown_shows_text_as_text(text: str) -> None:
    html = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table").render
    shown = html(escape_markdown(text))
    assert not hidden(shown)
    assert re.findall(r"<[^>]+>", shown) == ["<p>", "</p>"]
    import html as entities

    assert entities.unescape(shown[3:-5]) == visible(" ".join(re.split(r"[ \t\r\n]+", text)))


@pytest.mark.parametrize("key", ["\x1b]52;c;eA==\x1b\\", "\x1b[2J", "\u202ekey", "[bold]key[/]"])
def test_keys_of_tars_reach_the_terminal_as_text(key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [(f"{key}.png", b"no image"), (f"{key}.txt", b"caption")])
    with pytest.raises(SystemExit):
        main(lambda: ["data", "check", str(tmp_path / "a.tar")])
    out, err = capfd.readouterr()
    assert not hidden(out + err)
    assert visible(key) in "".join(out.split("\n"))


def test_keys_of_weights_reach_the_terminal_as_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file({"\x1b[2J\u202e[red]key": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        main(lambda: ["eval", str(tmp_path / "model.safetensors"), "--data", "x", "--model", "ViT-B-32"])
    out, err = capfd.readouterr()
    assert err.startswith("compt: ")
    assert not hidden(out + err)
