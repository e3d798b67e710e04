"""What every chart of the report is made of: SVG text with no scripts, no fonts, and no numbers but the data's.

Colours are classes that the page styles, so the same picture works on a light and a dark page. A chart is 360 units wide: on a
phone that is about its size in pixels, and a label of 11 units stays readable.
"""

import math
from collections.abc import Sequence
from html import escape

WIDTH = 360
SHAPES = ("circle", "square", "triangle", "diamond", "cross")


def number(value: float) -> str:
    """A coordinate: two digits at most, no exponent, so that equal data gives equal bytes."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def percent(share: float) -> str:
    """A share as a label: no more digits than it needs."""
    return f"{100 * share:.0f}%" if share == 0 or share >= 0.095 else f"{100 * share:.1f}%"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values within a range, at most `most` of them: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * by for by in (1, 2, 5, 10, 20) if (high - low) / (power * by) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def floor_of(values: Sequence[float], top: float) -> float | None:
    """Where to cut an axis below: None, or the smallest of `values` after leaving out few that lie far below all others."""
    kept = sorted(values)
    for _ in range(len(kept) // 4):
        if len(kept) < 3 or top - kept[0] <= 2.5 * max(top - kept[1], 0.02):
            break
        del kept[0]
    return kept[0] if kept and kept[0] > min(values) else None


def svg(height: float, label: str, body: Sequence[str], width: float = WIDTH) -> str:
    """The picture, with the name that screen readers say."""
    head = f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img" aria-label="{escape(label, quote=True)}">'
    return "\n".join([head, *body, "</svg>"])


def text(x: float, y: float, css: str, words: str) -> str:
    return f'<text x="{number(x)}" y="{number(y)}" class="{css}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "", more: str = "") -> str:
    box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"{more}'
    return f'<rect {box} class="{css}">{_title(title)}</rect>' if title else f'<rect {box} class="{css}"/>'


def marker(shape: str, x: float, y: float, radius: float, css: str, title: str = "") -> str:
    """A point. Shapes differ as well as colours, for those who cannot tell the colours apart."""
    inside = _title(title)
    if shape == "circle":
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" class="{css}">{inside}</circle>'
    r, s = radius, radius * 0.38
    corners = {
        "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
        "triangle": ((0.0, -1.25 * r), (1.2 * r, r), (-1.2 * r, r)),
        "diamond": ((0.0, -1.4 * r), (1.4 * r, 0.0), (0.0, 1.4 * r), (-1.4 * r, 0.0)),
        "cross": (
            *((-s, -r), (s, -r), (s, -s), (r, -s), (r, s), (s, s)),
            *((s, r), (-s, r), (-s, s), (-r, s), (-r, -s), (-s, -s)),
        ),
    }[shape]
    places = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners)
    return f'<polygon points="{places}" class="{css}">{inside}</polygon>'


def shorten(words: str, limit: int) -> str:
    return words if len(words) <= limit else words[: limit - 1] + "…"


def padded(values: Sequence[float], *, least: float = 0.0, most: float = math.inf) -> tuple[float, float]:
    """A range around the values with some room, never empty, within `least` and `most` as far as the values are."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max((high - low) * 0.05, 0.005)
    return max(min(low, least), low - room), min(max(high, most), high + room)


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""
