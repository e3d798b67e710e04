"""The report: self-contained, escaped, the same bytes each time, and useful when half of the run is missing."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from modes_cli import files
from modes_cli.artifacts import Evaluation
from modes_cli.errors import BadArtifact, MissingArtifact
from modes_cli.report import charts, plane, write_report
from modes_cli.run_folder import RunFolder
from tests import examples
from tests.report import crafted

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run folder with everything in it."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    crafted.fill(folder)
    return page(folder.path)


def test_full_report_is_well_formed_and_self_contained(whole: str) -> None:
    html = whole
    parsed = parse(html)
    assert len(set(parsed.ids)) == len(parsed.ids)
    anchors = [link for link in parsed.links if not link.startswith("data:image/png;base64,")]
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in anchors)
    assert not {"script", "link", "iframe", "object", "form"} & set(parsed.tags)
    assert not re.search(r"https?:|//[a-z]", html)
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "@import" not in html
    assert "Nothing here yet" not in html
    assert "Renew it" not in html
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert not re.search(r'="[^"]*\b(nan|inf)\b', drawing)


def test_same_artifacts_give_the_same_bytes(whole: str, tmp_path: Path) -> None:
    crafted.fill(RunFolder(tmp_path / "b"))
    assert page(tmp_path / "b") == whole


def test_every_section_has_its_charts(whole: str) -> None:
    wanted = {"accuracy": 1, "policies": 6, "frontier": 1, "skipping": 6, "experts": 1, "scores": 6, "time": 4}
    for name, figures in wanted.items():
        begin = whole.index(f'<section id="{name}"')
        section = whole[begin : whole.index("</section>", begin)]
        assert section.count("<figure") == figures, name
        assert section.count("<svg") >= figures
        assert "<table" in section


def test_policies_are_compared_with_their_intervals(whole: str) -> None:
    found = crafted.evaluation("0" * 64)
    for one in found.comparison:
        assert f"{100 * one.retained:.1f}" in whole
        if one.interval is not None:
            assert f"[{100 * one.interval.low:.1f}, {100 * one.interval.high:.1f}]" in whole
    assert "Target 88%, decode 80%" in whole
    assert "keeps at least one expert of each token" in whole
    assert "Below the chart at some ratios: random." in whole
    assert ">behind<" in whole
    assert ">tie<" in whole


def test_changed_answers_have_their_images(whole: str) -> None:
    found = crafted.evaluation("0" * 64)
    begin = whole.index('<section id="changed"')
    section = whole[begin : whole.index("</section>", begin)]
    assert section.count("data:image/png;base64,") == sum(one.image is not None for one in found.changed)
    assert section.count("no image") == sum(one.image is None for one in found.changed)
    assert section.count(">lost<") >= 5
    assert "&lt;i&gt;four" in section


def test_colors_and_shapes_tell_policies_apart(whole: str) -> None:
    begin = whole.index('<section id="frontier"')
    legend = re.findall(r"<li><svg.*?</li>", whole[begin : whole.index("</ul>", begin)])
    assert len(legend) == len(set(legend)) == len(crafted.POLICIES) + 2


def test_numbers_come_from_the_artifacts(tmp_path: Path) -> None:
    html = page(examples.fill_run(tmp_path))
    thresholds = examples.artifact("thresholds")
    told = [f"{thresholds.model_passes:.1f} passes", *(f"{one.kl:.4g}" for one in thresholds.results)]
    for text in ("94.8%", "93.7%", "98.8%", "75.1%", "1.51x", "tempered", "qwen3_vl_moe", "Read the top row.", *told):
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
    RunFolder(run).write(
        found.model_copy(update={"changed": [], "per_task": {}, "policies": {}, "comparison": [], "skipped_seconds": 0.0})
    )
    html = page(run)
    parse(html)
    assert "0 of 330 answers" in html
    assert "speedup of the evaluation" not in html
    assert f"modes evaluate --policies all --run {run}" in html


def test_many_tasks_become_charts_that_fit_on_paper(tmp_path: Path) -> None:
    run = examples.fill_run(tmp_path)
    found: Evaluation = examples.artifact("evaluation")
    one = next(iter(found.per_task.values()))
    RunFolder(run).write(found.model_copy(update={"per_task": {f"task-{i}": one for i in range(70)}}))
    html = page(run)
    section = html[html.index('<section id="accuracy"') : html.index('<section id="policies"')]
    assert [f"({i} of 3)" in section for i in range(5)] == [False, True, True, True, False]
    heights = [float(height) for height in re.findall(r'<svg viewBox="0 0 360 ([\d.]+)"', section)]
    assert len(heights) == 3
    assert max(heights) < 1000
    assert all(f">task-{i}<" in section for i in range(70))


def drawn(places: list[tuple[float, float]], *rings: plane.Ring) -> plane.Plane:
    dots = [plane.Dot(x, y, "<&>") for x, y in places]
    return plane.Plane("<&>", "x", "y", [plane.Series("p0", "diamond", dots)], rings)


def test_charts_take_their_edges() -> None:
    pictures = [
        charts.bars("empty", [("a", [charts.Bar(0.0, "c-all", "0", "zero")])], 0.0),
        charts.columns("none", [], "c-all"),
        charts.columns("zeros", [("0", 0.0, "zero")], "c-all"),
        charts.columns("many layers", [(str(i), i / 94, "x") for i in range(94)], "c-all"),
        charts.heat("wide", ["50%"], [str(i) for i in range(94)], [[i / 94 for i in range(94)]]),
        charts.heat("holes", ["a"], ["x", "y"], [[None, 1.0]]),
        charts.columns("one scale", [("0", 2.0, "above")], "c-all", largest=1.0),
        charts.meters("none", [], 0.0),
        charts.meters("long", [("x" * 99, charts.Bar(9.0, "c-all", "9", "<&>"))], 1.0, 1.0),
        charts.intervals("none", [], 1.0, "x"),
        charts.intervals("equal", [charts.Span("<&>", 1.0, 1.0, 1.0, "p0", "cross", "t", True)] * 2, 1.0, "x"),
        plane.draw(plane.Plane("none", "x", "y")),
        plane.draw(drawn([(0.0, 0.0)])),
        plane.draw(drawn([(1.0, 1.0)], plane.Ring(1.0, 1.0, "<&>", "<&>")), plane.WIDE),
        plane.draw(drawn([(0.5, 0.1)] * 3)),
        plane.draw(drawn([(0.5, 1e-30), (0.6, 1e30)])),
        plane.draw(replace(drawn([(0.5, 1.0), (0.6, 0.2), (0.7, 0.9)]), log=False, floor=0.8, reference=1.0)),
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
