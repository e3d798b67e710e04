"""The report's charts as SVG text: no scripts, no fonts, no numbers that depend on anything but the data.

Colours are classes that the page styles, so the same picture works on a light and a dark page. A chart is 360 units
wide: on a phone that is its size in pixels, and a label of 11 units stays readable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
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
class Dot:
    """One measured point of a scatter chart. A `chosen` one is ringed and labelled."""

    x: float
    y: float
    css: str
    title: str
    chosen: bool = False
    label: str = ""


def number(value: float) -> str:
    """A coordinate: two digits at most, no exponent, so that equal data gives equal bytes."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _svg(height: float, label: str, body: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {number(height)}" role="img" aria-label="{escape(label, quote=True)}">'
    return "\n".join([head, *body, "</svg>"])


def _text(x: float, y: float, css: str, text: str) -> str:
    return f'<text x="{number(x)}" y="{number(y)}" class="{css}">{escape(text)}</text>'


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def bars(label: str, rows: Sequence[tuple[str, Sequence[Bar]]], largest: float) -> str:
    """Horizontal bars, one row per label with its bars below each other. `largest` is the value of a full bar."""
    thick, gap, y = 12, 10, 4.0
    body = []
    for name, group in rows:
        height = thick * len(group)
        body.append(_text(LABEL - 6, y + height / 2 + 4, "end", _shorten(name, 14)))
        for index, bar in enumerate(group):
            top = y + index * thick
            length = 0.0 if largest <= 0 else (WIDTH - LABEL - ROOM) * min(1.0, bar.value / largest)
            box = f'x="{LABEL}" y="{number(top + 1)}" width="{number(max(length, 0.5))}" height="{thick - 2}"'
            rect = f'<rect {box} rx="1.5" class="{bar.css}">'
            body.append(f"{rect}<title>{escape(bar.title)}</title></rect>")
            body.append(_text(LABEL + length + 4, top + thick - 2.5, "small", bar.text))
        y += height + gap
    return _svg(y - gap + 4, label, body)


def columns(label: str, values: Sequence[tuple[str, float, str]], css: str, *, height: float = 96) -> str:
    """Vertical bars on a common scale: (name under it, value, title). Made for many layers: names thin out."""
    left, bottom = 34, height - 18
    largest = max((value for _, value, _ in values), default=0.0)
    step = (WIDTH - left) / max(1, len(values))
    every = max(1, math.ceil(20 / step))
    body = [
        f'<line x1="{left}" y1="{number(bottom)}" x2="{WIDTH}" y2="{number(bottom)}" class="axis"/>',
        _text(left - 4, 13, "end small", percent(largest)),
        _text(left - 4, bottom, "end small", "0"),
    ]
    for index, (name, value, title) in enumerate(values):
        tall = 0.0 if largest <= 0 else (bottom - 6) * value / largest
        x = left + index * step
        box = f'x="{number(x + step * 0.1)}" y="{number(bottom - tall)}" width="{number(step * 0.8)}" height="{number(tall)}"'
        rect = f'<rect {box} class="{css}">'
        body.append(f"{rect}<title>{escape(title)}</title></rect>")
        if index % every == 0:
            body.append(_text(x + step / 2, height - 5, "middle small", name))
    return _svg(height, label, body)


def heat(label: str, rows: Sequence[str], names: Sequence[str], values: Sequence[Sequence[float | None]]) -> str:
    """A heat map of shares 0..1, rows below each other; cells carry their number where it fits. None: an empty cell."""
    left, tall = 58, 26
    step = (WIDTH - left) / max(1, len(names))
    every = max(1, math.ceil(20 / step))
    body = []
    for row, name in enumerate(rows):
        y = row * tall
        body.append(_text(left - 6, y + tall / 2 + 4, "end", _shorten(name, 9)))
        for column, value in enumerate(values[row]):
            x = left + column * step
            box = f'x="{number(x + 0.5)}" y="{number(y + 0.5)}" width="{number(max(step - 1, 0.5))}" height="{tall - 1}"'
            body.append(f'<rect {box} class="empty"/>')
            if value is None:
                continue
            title = escape(f"{name}, {names[column]}: {value:.4f}")
            body.append(f'<rect {box} class="hot" fill-opacity="{number(value)}"><title>{title}</title></rect>')
            if step >= 26:
                body.append(
                    _text(
                        x + step / 2,
                        y + tall / 2 + 4,
                        "middle cell on" if value > 0.72 else "middle cell",
                        f"{100 * value:.0f}",
                    )
                )
    for column, name in enumerate(names):
        if column % every == 0:
            body.append(
                _text(
                    left + (column + 0.5) * step,
                    len(rows) * tall + 13,
                    "middle small",
                    _shorten(name, max(2, int(step * every / 5.5))),
                )
            )
    return _svg(len(rows) * tall + 18, label, body)


def scatter(label: str, dots: Sequence[Dot], x_name: str, y_name: str) -> str:
    """Points over a linear x axis and a logarithmic y axis; zeros lie on the floor of the chart."""
    left, right, top, bottom, height = 46, WIDTH - 12, 12, 214, 250
    x_low, x_high = _padded([dot.x for dot in dots])
    positive = [dot.y for dot in dots if dot.y > 0]
    low, high = (math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))) if positive else (-3, 0)
    high = max(high, low + 1)

    def at_x(value: float) -> float:
        return left + (right - left) * (value - x_low) / (x_high - x_low)

    def at_y(value: float) -> float:
        return bottom - (bottom - top) * ((math.log10(value) - low) / (high - low) if value > 0 else 0.0)

    body = []
    for power in range(low, high + 1):
        y = at_y(10.0**power)
        body.append(f'<line x1="{left}" y1="{number(y)}" x2="{right}" y2="{number(y)}" class="grid"/>')
        body.append(_text(left - 5, y + 4, "end small", f"{10.0**power:g}"))
    for tick in range(5):
        value = x_low + (x_high - x_low) * tick / 4
        body.append(_text(at_x(value), bottom + 15, "middle small", percent(value)))
    body.append(_text((left + right) / 2, height - 5, "middle small", x_name))
    body.append(
        f'<text transform="translate(10 {number((top + bottom) / 2)}) rotate(-90)" class="middle small">{escape(y_name)}</text>'
    )
    for dot in sorted(dots, key=lambda dot: dot.chosen):  # chosen ones on top
        x, y = at_x(dot.x), at_y(dot.y)
        title = f"<title>{escape(dot.title)}</title>"
        if dot.chosen:
            body.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="6.5" class="ring"/>')
            anchor = "end" if x > (left + right) / 2 else "start"
            body.append(_text(x - 10 if anchor == "end" else x + 10, y + 4, f"{anchor} strong", dot.label))
        body.append(f'<circle cx="{number(x)}" cy="{number(y)}" r="3" class="{dot.css}">{title}</circle>')
    return _svg(height, label, body)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max((high - low) * 0.05, 0.005)
    return max(0.0, low - room), min(1.0, high + room) if high < 1.0 else 1.0 + room


def percent(share: float) -> str:
    """A share as a label: no more digits than it needs."""
    return f"{100 * share:.0f}%" if share == 0 or share >= 0.095 else f"{100 * share:.1f}%"
