"""The frontier as a small picture of characters, for the end of `modes search`."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

Points = Sequence[tuple[float, float]]

ROWS = 14  # about: as many as the powers of ten divide
MOST_COLUMNS = 96
DECADES = 6  # of the KL axis; what is smaller lies on its floor
# A sign and a color per policy: where there are no colors, and for eyes that do not see them, the sign tells.
SIGNS = "●■▲◆○□△◇+x*#@%&"
PLAIN_SIGNS = "o#^*+x@%&=~$!?z"
COLORS = ("deep_sky_blue1", "dark_orange", "spring_green3", "plum3", "gold3", "turquoise2", "pale_violet_red1", "grey62")
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


def frontier_plot(points: list[tuple[str, list[tuple[float, float]]]]) -> Any:
    """A rich renderable of KL (logarithmic) against skip ratio.

    Args:
        points: per policy its name and its (skip ratio 0..1, KL in nats), in any order. The first policy is drawn on top.
    """
    return FrontierPlot([(name, sorted(places)) for name, places in points if places])


@dataclass(frozen=True)
class FrontierPlot:
    """Lines of braille dots between the points; only the points where the output is not Unicode."""

    series: Sequence[tuple[str, Points]]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterable[Text]":
        from rich.text import Text

        if not self.series:
            return
        axes = _Axes.around(self.series, min(options.max_width, MOST_COLUMNS))
        cells = self._cells(axes, plain=options.ascii_only)
        bar, corner, along, tick = ("|", "+", "-", "+") if options.ascii_only else ("│", "└", "─", "┤")
        yield Text("KL, nats", style="dim")
        for row in range(axes.rows + 1):
            name = axes.row_names.get(row, "")
            line = Text(f"{name:>{axes.margin - 1}}", style="dim")
            line.append(tick if name else bar, style="dim")
            for column in range(axes.columns):
                sign, color = cells.get((row, column), (" ", ""))
                line.append(sign, style=color)
            line.rstrip()
            yield line
        yield Text(" " * (axes.margin - 1) + corner + along * axes.columns, style="dim")
        yield Text(axes.below(), style="dim")
        yield from self._legend(axes.margin + axes.columns, plain=options.ascii_only)

    def _cells(self, axes: "_Axes", *, plain: bool) -> dict[tuple[int, int], tuple[str, str]]:
        """(row, column) -> (character, color). Points lie over lines, earlier policies over later ones."""
        cells: dict[tuple[int, int], tuple[str, str]] = {}
        signs = PLAIN_SIGNS if plain else SIGNS
        for place, (_, points) in enumerate(self.series):
            for ratio, kl in points:
                x, y = axes.dot(ratio, kl)
                cells.setdefault((y // 4, x // 2), (signs[place % len(signs)], COLORS[place % len(COLORS)]))
        if plain:
            return cells
        lines: dict[tuple[int, int], tuple[int, str]] = {}
        for place, (_, points) in enumerate(self.series):
            color = COLORS[place % len(COLORS)]
            dots = [axes.dot(ratio, kl) for ratio, kl in points]
            for x, y in _between(dots):
                cell = y // 4, x // 2
                bits, owner = lines.get(cell, (0, color))
                if owner == color:  # two policies in one character: the first one's
                    lines[cell] = (bits | _DOTS[y % 4][x % 2], owner)
        for cell, (bits, color) in lines.items():
            cells.setdefault(cell, (chr(0x2800 + bits), color))
        return cells

    def _legend(self, width: int, *, plain: bool) -> "Iterable[Text]":
        from rich.text import Text

        signs = PLAIN_SIGNS if plain else SIGNS
        line = Text()
        for place, (name, _) in enumerate(self.series):
            entry = Text.assemble((signs[place % len(signs)], COLORS[place % len(COLORS)]), f" {name}")
            if line and len(line) + 3 + len(entry) > width:
                yield line
                line = Text()
            line = line.append("   ").append_text(entry) if line else entry
        yield line


@dataclass(frozen=True)
class _Axes:
    """Where values lie: `columns` characters right of a margin, `rows` above the lowest, each two dots wide and four high."""

    margin: int
    columns: int
    rows: int
    left: float
    right: float
    low: float
    high: float
    row_names: dict[int, str]

    @classmethod
    def around(cls, series: Sequence[tuple[str, Points]], width: int) -> "_Axes":
        ratios = [ratio for _, points in series for ratio, _ in points]
        positive = [kl for _, points in series for _, kl in points if kl > 0] or [1e-3, 1.0]
        high = math.ceil(math.log10(max(positive)) - 1e-9)
        low = max(min(math.floor(math.log10(min(positive)) + 1e-9), high - 1), high - DECADES)
        names = {power: f"{10.0**power:g}" for power in range(low, high + 1)}
        each = max(2, round(ROWS / (high - low)))
        rows = {(high - power) * each: name for power, name in names.items()}
        margin = max(map(len, names.values())) + 2
        left, right = math.floor(min(ratios) * 10 + 1e-9) / 10, math.ceil(max(ratios) * 10 - 1e-9) / 10
        return cls(margin, max(10, width - margin - 1), each * (high - low), left, max(right, left + 0.1), low, high, rows)

    def dot(self, ratio: float, kl: float) -> tuple[int, int]:
        """The dot (x from the left, y from the top) of a point."""
        across = (ratio - self.left) / (self.right - self.left)
        up = 0.0 if kl <= 0 else max(0.0, (math.log10(kl) - self.low) / (self.high - self.low))
        return round(across * (2 * self.columns - 1)), round((1 - up) * 4 * self.rows) + 1

    def below(self) -> str:
        """The names of the x axis, one per tenth where there is room, and what it is."""
        line = [" "] * (self.margin + self.columns + 1)
        free = 0
        count = round((self.right - self.left) * 10)
        every = max(1, math.ceil(count * 6 / self.columns))
        for tenth in range(0, count + 1, every):
            name = f"{100 * (self.left + tenth / 10):.0f}%"
            place = self.margin + round(tenth / count * (self.columns - 1)) - len(name) // 2
            place = min(max(place, free), len(line) - len(name))
            if place >= free:
                line[place : place + len(name)] = name
                free = place + len(name) + 1
        title = "skip ratio"
        return "".join(line).rstrip() + "\n" + " " * max(0, self.margin + (self.columns - len(title)) // 2) + title


def _between(dots: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The dots of straight lines from each to the next."""
    for (x1, y1), (x2, y2) in itertools.pairwise(dots):
        steps = max(abs(x2 - x1), abs(y2 - y1), 1)
        for step in range(steps + 1):
            yield round(x1 + (x2 - x1) * step / steps), round(y1 + (y2 - y1) * step / steps)
