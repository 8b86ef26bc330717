"""Pages of reports in a real browser, at the width of a phone and of a desk: nothing is cut off, nothing fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compt.report.compare import compare_runs
from compt.report.write import write_report
from tests.helpers.optional import optional
from tests.helpers.run import make_run

WIDTHS = (390, 1280)
# Elements that reach out of the page at the right or left, but for the content of a box with its own scroll bar.
OUTSIDE = """() => {
  const scrolls = node => node && (getComputedStyle(node).overflowX === "auto" || scrolls(node.parentElement));
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("body *")].filter(node => {
    const box = node.getBoundingClientRect();
    return box.width > 0 && (box.right > width + 0.5 || box.left < -0.5) && !scrolls(node.parentElement);
  }).map(node => `${node.tagName} ${node.className.baseVal ?? node.className}: ${node.textContent.slice(0, 60)}`);
}"""
# Text that its own box cuts off.
CUT = """() => [...document.querySelectorAll("body *")].filter(node => {
  const style = getComputedStyle(node);
  return node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0 && style.overflowX === "hidden";
}).map(node => `${node.tagName} ${node.className}`)"""
# First columns that cover so much of their scrolling table that the others cannot be read.
STUCK = """() => [...document.querySelectorAll(".scroll")].filter(box =>
  [...box.querySelectorAll("tbody th")].some(node => node.offsetWidth > box.clientWidth / 2)
  && box.scrollWidth > box.clientWidth + 1
).map(box => box.textContent.slice(0, 60))"""
# Text of drawings that lies outside of its drawing.
DRAWN = """() => [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(node => {
    const box = node.getBoundingClientRect();
    return box.right > frame.right + 1 || box.left < frame.left - 1 || box.bottom > frame.bottom + 1;
  }).map(node => `${svg.getAttribute("aria-label").slice(0, 40)}: ${node.textContent}`);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium; Playwright's own browsers are never downloaded."""
    playwright = optional("playwright.sync_api", "browser")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("COMPT_TEST_ALL"):
            pytest.fail("COMPT_TEST_ALL is set, but there is no chromium: apt-get install chromium")
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, and the page with tables only that comparisons and `compt eval` write."""
    folder = tmp_path_factory.mktemp("pages")
    make_run(folder / "run")
    compare_runs([folder / "run"]).write(folder)
    return {"report": write_report(folder / "run"), "tables": folder / "compare.html"}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "tables"])
def test_a_page_at_two_widths(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(pages[name].as_uri())
    for part in page.locator("details").all():
        part.evaluate("node => { node.open = true }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(CUT) == []
    assert page.evaluate(STUCK) == []
    assert page.evaluate(DRAWN) == []
    assert "$" not in "".join(page.locator("svg").all_text_contents()), "a formula"
    assert page.locator("h2").count() >= 2
    assert said == []
    if shots := os.environ.get("COMPT_SCREENSHOTS"):
        page.screenshot(path=f"{shots}/{name}-{width}.png", full_page=True)
    page.close()
