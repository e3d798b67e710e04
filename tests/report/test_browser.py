"""The report in a real browser: no complaints, no requests, nothing cut off on a phone, on a screen or on paper."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modes_cli.report import write_report
from modes_cli.run_folder import RunFolder
from tests.report import browser, crafted

# What sticks out of the page, and of its own box if that does not scroll. A few hundredths of a pixel are rounding.
OUTSIDE = """
(() => {
  const found = [], wide = document.documentElement.clientWidth + 0.5;
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.closest("svg") !== null && element.tagName !== "svg") continue;
    if (box.right > wide && element.closest(".scroll") === null || box.left < -0.5)
      found.push(`${element.tagName}.${element.className.baseVal ?? element.className} ${box.left}..${box.right} of ${wide}`);
  }
  for (const svg of document.querySelectorAll("figure svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    for (const part of svg.querySelectorAll("text, rect, line, circle, polyline, polygon, path")) {
      const box = part.getBoundingClientRect(), room = 2;
      const across = box.left < frame.left - room || box.right > frame.right + room;
      if (across || box.top < frame.top - room || box.bottom > frame.bottom + room)
        found.push(`${svg.getAttribute("aria-label")}: ${part.tagName} ${part.textContent} sticks out`);
    }
  }
  return found;
})()
"""
TALLEST = "Math.max(...[...document.querySelectorAll('figure, .cards li')].map(one => one.getBoundingClientRect().height))"
PAPER = (210 - 28, 297 - 28)  # mm of an A4 page inside the margins that the page asks for
PIXELS = 96 / 25.4  # CSS pixels per mm


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium on this machine; set $CHROMIUM to one")
    if subprocess.run([program, "--version"], capture_output=True).returncode != 0:  # on Ubuntu, a stub that asks for snap
        pytest.skip(f"{program} does not run")
    with browser.running(program) as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    crafted.fill(folder)
    return write_report(folder.path)


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)])
def test_opens_without_complaints_and_nothing_sticks_out(
    chromium: browser.Browser, report: Path, width: int, dark: bool
) -> None:
    chromium.open(report, width=width, dark=dark)
    assert chromium.complaints == []
    assert chromium.value("document.scrollingElement.scrollWidth") <= width
    assert chromium.value(OUTSIDE) == []
    images = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
    assert chromium.value(images) == [True] * 6
    paper = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    shown = "[...document.querySelectorAll('figure')].every(one => one.offsetHeight > 60)"
    assert chromium.value(shown)


def test_tables_that_are_folded_open_inside_the_page(chromium: browser.Browser, report: Path) -> None:
    chromium.open(report, width=360)
    chromium.value("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert chromium.value("document.scrollingElement.scrollWidth") <= 360
    assert chromium.value(OUTSIDE) == []


def test_prints_on_several_pages_and_cuts_no_chart(chromium: browser.Browser, report: Path) -> None:
    chromium.open(report, width=round(PAPER[0] * PIXELS), media="print")
    assert chromium.value("document.scrollingElement.scrollWidth") <= PAPER[0] * PIXELS + 1
    assert chromium.value(OUTSIDE) == []
    tables = "[...document.querySelectorAll('table')].every(one => one.getBoundingClientRect().right <= innerWidth + 0.5)"
    assert chromium.value(tables)  # paper does not scroll
    assert chromium.value(TALLEST) <= PAPER[1] * PIXELS  # so that it can stay on one page
    kept = "[...document.querySelectorAll('figure')].every(one => getComputedStyle(one).breakInside === 'avoid')"
    assert chromium.value(kept)
    chromium.open(report, width=1280)
    pages = re.findall(rb"/Type\s*/Page\b", chromium.pdf())
    assert 4 <= len(pages) <= 20
    assert chromium.complaints == []


def test_the_tests_notice_what_they_are_for(chromium: browser.Browser, tmp_path: Path) -> None:
    """A page with every fault: a script that fails, a missing image, a request, something too wide."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name=viewport content='width=device-width'><img src='missing.png'><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('told'); throw new Error('thrown')</script><div style='width: 500px'>wide</div>"
        "<figure><svg viewBox='0 0 10 10' width='10'><rect x='90' width='5' height='5'/></svg></figure>"
    )
    before = len(chromium.complaints)
    chromium.open(bad, width=360)
    complaints = chromium.complaints[before:]
    del chromium.complaints[before:]
    for kind in ("console error", "exception", "request: http://127.0.0.1:9", "failed"):
        assert any(kind in one for one in complaints), kind
    outside = chromium.value(OUTSIDE)
    assert any("DIV" in one for one in outside)
    assert any("sticks out" in one for one in outside)
