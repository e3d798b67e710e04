"""The report: self-contained, escaped, the same bytes each time, and useful when half of the run is missing."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from modes_cli import files
from modes_cli.artifacts import Evaluation
from modes_cli.errors import BadArtifact, MissingArtifact
from modes_cli.report import charts, write_report
from modes_cli.run_folder import RunFolder
from tests import examples

VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Collects text and attributes; fails on tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(run: Path) -> str:
    return write_report(run).read_text("utf-8")


def parse(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_full_report_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    html = page(examples.fill_run(tmp_path))
    parsed = parse(html)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags)
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "Nothing here yet" not in html
    assert "Renew it" not in html
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing


def test_same_artifacts_give_the_same_bytes(tmp_path: Path) -> None:
    first = page(examples.fill_run(tmp_path / "a"))
    assert page(examples.fill_run(tmp_path / "b")) == first


def test_numbers_come_from_the_artifacts(tmp_path: Path) -> None:
    html = page(examples.fill_run(tmp_path))
    for text in ("94.8%", "93.7%", "98.8%", "75.1%", "1.51x", "tempered", "qwen3_vl_moe", "Read the top row.", "36.0 passes"):
        assert text in html


def test_what_data_says_is_never_markup(tmp_path: Path) -> None:
    html = page(examples.fill_run(tmp_path))
    assert "fnf &lt;b&gt;" in html
    assert "<b>" not in html


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("profile", "modes profile MODEL"),
        ("calibration", "modes calibrate MODEL"),
        ("thresholds", "modes search"),
        ("evaluation", "modes evaluate"),
        ("bench", "modes bench"),
    ],
)
def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path: Path, missing: str, command: str) -> None:
    html = page(examples.fill_run(tmp_path, tuple(name for name in examples.IN_RUN if name != missing)))
    parse(html)
    assert f"Make it with <code>{command} --run {tmp_path}</code>" in html


@pytest.mark.parametrize("only", examples.IN_RUN)
def test_one_artifact_is_enough(tmp_path: Path, only: str) -> None:
    parse(page(examples.fill_run(tmp_path, (only,))))


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_broken_artifact_is_an_error(tmp_path: Path) -> None:
    run = examples.fill_run(tmp_path)
    (run / "bench.json").write_text("{")
    with pytest.raises(BadArtifact):
        write_report(run)


def test_artifacts_of_different_runs_are_pointed_out(tmp_path: Path) -> None:
    run = examples.fill_run(tmp_path)
    other = examples.artifact("calibration")
    RunFolder(run).write(other.model_copy(update={"answer_tokens": other.answer_tokens + 1}))
    assert "made from another calibration.json" in page(run)


def test_no_answers_changed_and_no_time(tmp_path: Path) -> None:
    run = examples.fill_run(tmp_path)
    found: Evaluation = examples.artifact("evaluation")
    RunFolder(run).write(found.model_copy(update={"changed": [], "per_task": {}, "policies": {}, "skipped_seconds": 0.0}))
    html = page(run)
    parse(html)
    assert "0 of 330 answers" in html
    assert "speedup of the evaluation" not in html


def test_charts_take_their_edges() -> None:
    pictures = [
        charts.bars("empty", [("a", [charts.Bar(0.0, "c-all", "0", "zero")])], 0.0),
        charts.columns("none", [], "c-all"),
        charts.columns("zeros", [("0", 0.0, "zero")], "c-all"),
        charts.columns("many layers", [(str(i), i / 94, "x") for i in range(94)], "c-all"),
        charts.heat("wide", ["50%"], [str(i) for i in range(94)], [[i / 94 for i in range(94)]]),
        charts.heat("holes", ["a"], ["x", "y"], [[None, 1.0]]),
        charts.scatter("none", [], "x", "y"),
        charts.scatter("one at zero", [charts.Dot(0.0, 0.0, "c-all", "origin")], "x", "y"),
        charts.scatter("one at one", [charts.Dot(1.0, 1.0, "c-all", "corner", chosen=True, label="<&>")], "x", "y"),
        charts.scatter("equal", [charts.Dot(0.5, 0.1, "c-all", "p")] * 3, "x", "y"),
    ]
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
        assert "e-" not in re.sub(r'"[^"]*-[^"]*"', "", picture)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = examples.fill_run(tmp_path)
    first = page(run)

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_report(run)
    assert (run / "report.html").read_text("utf-8") == first
    assert not list(run.glob(".*.part"))
