"""The frontier in the terminal: fits its width, tells policies apart without color, and falls back to plain characters."""

import io

import pytest
from rich.console import Console

from modes_cli.report.terminal import SIGNS, frontier_plot

TARGETS = (0.1, 0.3, 0.5, 0.67, 0.75, 0.83, 0.88, 0.92, 0.95)
POINTS = [
    (name, [(t, price * 0.001 * 20**t) for t in TARGETS]) for name, price in (("grouped", 1), ("modes", 5), ("random", 300))
]


def shown(points: list[tuple[str, list[tuple[float, float]]]], width: int = 80, **options: object) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **options).print(frontier_plot(points))  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_fits_the_width(width: int) -> None:
    lines = shown(POINTS, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 24
    assert "\x1b" not in "".join(lines)


def test_points_lie_where_the_axes_say() -> None:
    text = shown([("modes", [(0.0, 0.01), (1.0, 1.0)])])
    lines = text.splitlines()
    top = next(line for line in lines if line.strip().startswith("1┤"))
    bottom = next(line for line in lines if line.strip().startswith("0.01┤"))
    assert top.endswith(SIGNS[0])
    assert bottom[bottom.index("┤") + 1] == SIGNS[0]
    names = lines[-3].split()
    assert (names[0], names[-1]) == ("0%", "100%")


def test_every_policy_has_a_sign_of_its_own() -> None:
    text = shown(POINTS)
    legend = text.splitlines()[-1]
    assert legend.split("   ") == [f"{SIGNS[i]} {name}" for i, (name, _) in enumerate(POINTS)]
    for sign in SIGNS[:3]:
        assert text.count(sign) == len(TARGETS) + 1


def test_the_first_policy_is_on_top() -> None:
    same = [(0.5, 0.1), (0.9, 0.5)]
    text = shown([("first", same), ("second", same)])
    assert text.count(SIGNS[0]) == 3
    assert text.count(SIGNS[1]) == 1


def test_colors_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[38" in shown(POINTS, force_terminal=True, color_system="256")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38" not in shown(POINTS, force_terminal=True, color_system="256")


def test_plain_characters_where_there_is_no_unicode() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        Console(file=file, width=80).print(frontier_plot(POINTS))
        file.flush()
        text = raw.getvalue().decode("ascii")
    assert "o grouped   # modes   ^ random" in text
    assert text.count("#") == len(TARGETS) + 1


@pytest.mark.parametrize("points", [[(0.5, 0.0)], [(0.0, 0.0), (1.0, 1e-12)], [(0.5, 1e9), (0.5, 1e-9)], [(1.0, 1.0)]])
def test_edges(points: list[tuple[float, float]]) -> None:
    assert SIGNS[0] in shown([("one", points), ("none", [])])


def test_nothing_to_plot() -> None:
    assert shown([]).strip() == ""
    assert shown([("none", [])]).strip() == ""
