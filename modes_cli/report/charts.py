"""Charts of one value per row, column or cell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modes_cli.report.svg import WIDTH, floor_of, line, marker, padded, percent, rect, shorten, svg, text, ticks

LABEL = 92  # units for the row labels of a horizontal chart
ROOM = 40  # units right of a bar, for its value


@dataclass(frozen=True)
class Bar:
    """One bar; `css` is the class of its colour, `text` what stands beside it."""

    value: float
    css: str
    text: str
    title: str


@dataclass(frozen=True)
class Span:
    """A value with its interval, as one row of a chart. `strong` stands out."""

    name: str
    value: float
    low: float
    high: float
    css: str
    shape: str
    title: str
    strong: bool = False


def bars(label: str, rows: Sequence[tuple[str, Sequence[Bar]]], largest: float) -> str:
    """Horizontal bars, one row per label with its bars below each other. `largest` is the value of a full bar."""
    thick, gap, y = 12, 10, 4.0
    body = []
    for name, group in rows:
        height = thick * len(group)
        body.append(text(LABEL - 6, y + height / 2 + 4, "end", shorten(name, 14)))
        for index, bar in enumerate(group):
            top = y + index * thick
            length = 0.0 if largest <= 0 else (WIDTH - LABEL - ROOM) * min(1.0, bar.value / largest)
            body.append(rect(LABEL, top + 1, max(length, 0.5), thick - 2, bar.css, bar.title, ' rx="1.5"'))
            body.append(text(LABEL + length + 4, top + thick - 2.5, "small", bar.text))
        y += height + gap
    return svg(max(1.0, y - gap + 4), label, body)


def meters(label: str, rows: Sequence[tuple[str, Bar]], largest: float, limit: float | None = None) -> str:
    """Horizontal bars with their names above them, where names are long; a mark at `limit`."""
    tall, y = 30, 0.0
    width = WIDTH - ROOM
    top = max(largest, limit or 0.0)
    body = []
    for name, bar in rows:
        length = 0.0 if top <= 0 else width * min(1.0, bar.value / top)
        body.append(text(0, y + 11, "", shorten(name, 58)))
        body.append(rect(0, y + 15, width, 10, "empty", "", ' rx="1.5"'))
        body.append(rect(0, y + 15, max(length, 0.5), 10, bar.css, bar.title, ' rx="1.5"'))
        body.append(text(width + 4, y + 24, "small", bar.text))
        if limit is not None and top > 0:
            body.append(line(width * limit / top, y + 13, width * limit / top, y + 27, "mark"))
        y += tall
    return svg(max(1.0, y), label, body)


def columns(
    label: str, values: Sequence[tuple[str, float, str]], css: str, *, largest: float | None = None, height: float = 104
) -> str:
    """Vertical bars: (name under it, value, title). Made for many layers: names thin out. `largest`: a full bar."""
    left, bottom = 34, height - 18
    full = max((value for _, value, _ in values), default=0.0) if largest is None else largest
    step = (WIDTH - left) / max(1, len(values))
    every = max(1, math.ceil(20 / step))
    body = [
        line(left, bottom, WIDTH, bottom, "axis"),
        line(left, 6, WIDTH, 6, "grid"),
        text(left - 4, 10, "end small", percent(full)),
        text(left - 4, bottom, "end small", "0"),
    ]
    for index, (name, value, title) in enumerate(values):
        tall = 0.0 if full <= 0 else (bottom - 6) * min(1.0, value / full)
        x = left + index * step
        body.append(rect(x + step * 0.1, bottom - tall, step * 0.8, tall, css, title))
        if index % every == 0:
            body.append(text(x + step / 2, height - 5, "middle small", name))
    return svg(height, label, body)


def heat(label: str, rows: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A heat map of shares 0..1, rows below each other; cells carry their number where it fits. None: an empty cell."""
    left, tall = 12 + 6.4 * min(18, max((len(name) for name in rows), default=0)), 26
    step = (WIDTH - left) / max(1, len(names))
    every = max(1, math.ceil(20 / step))
    body = []
    for row, name in enumerate(rows):
        y = row * tall
        body.append(text(left - 6, y + tall / 2 + 4, "end", shorten(name, 18)))
        for column, value in enumerate(values[row]):
            x = left + column * step
            gap = min(1.0, step / 6)
            box = (x + gap / 2, y + 0.5, max(step - gap, 0.5), tall - 1)
            body.append(rect(*box, "empty"))
            if value is None:
                continue
            title = f"{name}, {names[column]}: {value:.4f}"
            body.append(rect(*box, "hot", title, f' fill-opacity="{value:.2f}"'))
            if step >= 22:
                # On the middle tones, a light page needs dark digits and a dark page too: see the page's colours.
                css = "middle cell on" if value > 0.72 else "middle cell mid" if value > 0.55 else "middle cell"
                body.append(text(x + step / 2, y + tall / 2 + 4, css, f"{100 * value:.0f}"))
    for column, name in enumerate(names):
        if column % every == 0:
            words = shorten(name, max(2, int(step * every / 5.5)))
            body.append(text(left + (column + 0.5) * step, len(rows) * tall + 13, "middle small", words))
    return svg(len(rows) * tall + 18, label, body)


def intervals(label: str, spans: Sequence[Span], reference: float, x_name: str) -> str:
    """Values with their intervals, a row each, and a line at `reference`. What lies far below all others is cut off."""
    left, right, tall, top = LABEL, WIDTH - ROOM, 18, 4
    floor = floor_of([span.value for span in spans], reference)
    inside = [span for span in spans if floor is None or span.value >= floor]
    low, high = padded([reference, *(v for span in inside for v in (span.low, span.high, span.value))])
    bottom = top + tall * len(spans)

    def at(value: float) -> float:
        return left + (right - left) * max(0.0, (value - low) / (high - low))

    body = []
    for tick in ticks(low, high, 5):
        body.append(line(at(tick), top, at(tick), bottom, "grid"))
        body.append(text(at(tick), bottom + 13, "middle small", f"{100 * tick:g}%"))
    body.append(line(at(reference), top, at(reference), bottom, "mark"))
    body.append(text((left + right) / 2, bottom + 28, "middle small", x_name))
    for row, span in enumerate(spans):
        y = top + tall * (row + 0.5)
        body.append(text(left - 6, y + 4, "end strong" if span.strong else "end", shorten(span.name, 14)))
        body.append(text(right + 6, y + 4, "small", f"{100 * span.value:.1f}%"))
        if span not in inside:
            body.append(text(left + 2, y + 4, "small", "← off the chart"))
            continue
        body.append(line(at(span.low), y, at(span.high), y, f"whisker {span.css}"))
        if span.strong:
            body.append(marker("circle", at(span.value), y, 6.5, "ring"))
        body.append(marker(span.shape, at(span.value), y, 3.2, span.css, span.title))
    return svg(bottom + 34, label, body)
