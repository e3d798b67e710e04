"""Charts of distributions: one over all layers with its threshold, and one row of shades per layer with its cut-off."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modes_cli.report.svg import WIDTH, line, number, percent, rect, svg, text

Floats = NDArray[np.float64]
Axis = Callable[[float], float]  # from a value to its place
_JOINED = 8  # units that a row is high at least for cut-offs to be joined to one line
LEVELS = 7  # shades of a row; a cell in the lowest is left out


@dataclass(frozen=True)
class Histogram:
    """Bars over a logarithmic x axis: `edges` (n + 1,) log10, `shares` (n,) of all pairs. `at`: the threshold, log10.

    `zeros`: the share of pairs whose value is 0 and has no place on such an axis.
    """

    edges: Floats
    shares: Floats
    at: float | None
    zeros: float = 0.0


def histogram(label: str, found: Histogram, css: str, x_name: str) -> str:
    """What lies left of the threshold is pale: it is skipped."""
    left, right, top, bottom, height = 34, WIDTH - 6, 16, 132, 164
    low, high = float(found.edges[0]), float(found.edges[-1])
    largest = float(found.shares.max(initial=0.0))

    def at_x(value: float) -> float:
        return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

    body = [
        line(left, bottom, right, bottom, "axis"),
        line(left, top, right, top, "grid"),
        text(left - 4, top + 4, "end small", percent(largest)),
        text(left - 4, bottom, "end small", "0"),
    ]
    for index, value in enumerate(found.shares):
        if value <= 0 or largest <= 0:
            continue
        begin, end = at_x(float(found.edges[index])), at_x(float(found.edges[index + 1]))
        tall = (bottom - top) * float(value) / largest
        skipped = found.at is not None and found.edges[index + 1] <= found.at + 1e-9
        where = f"{_power(float(found.edges[index]))} to {_power(float(found.edges[index + 1]))}"
        title = f"{where}: {percent(float(value))} of the pairs{', skipped' if skipped else ''}"
        body.append(rect(begin, bottom - tall, max(0.5, end - begin - 0.4), tall, f"{css} pale" if skipped else css, title))
    if found.at is not None:
        x = at_x(found.at)
        body.append(line(x, 4, x, bottom, "cut"))
        body += _sides(x, left, right)
    body += _axis(low, high, at_x, bottom)
    body.append(text((left + right) / 2, height - 4, "middle small", x_name))
    return svg(height, label, body)


@dataclass(frozen=True)
class Layers:
    """One row per layer. `cells` (layers, n) counts between `edges` (n + 1,) log10; `cuts`: (layers,) each, log10."""

    names: Sequence[str]
    edges: Floats
    cells: Floats
    cuts: Sequence[Floats]
    beside: Sequence[str]  # what stands right of a row


def layers(label: str, found: Layers, css: str, x_name: str) -> str:
    """A shade is the share of the row's fullest cell; the line is where a layer begins to keep."""
    left, right, top = 26, WIDTH - 40, 16
    tall = max(4.0, min(18.0, 240 / max(1, len(found.names))))
    bottom = top + tall * len(found.names)
    low, high = float(found.edges[0]), float(found.edges[-1])

    def at_x(value: float) -> float:
        return left + (right - left) * (min(max(value, low), high) - low) / (high - low)

    body = [rect(left, top, right - left, bottom - top, "empty")]
    body += _shades(found, css, at_x, top, tall)
    every = max(1, math.ceil(11 / tall))
    for row, name in enumerate(found.names):
        if row % every == 0:
            y = top + tall * (row + 0.5) + 3.5
            body.append(text(left - 4, y, "end small", name))
            body.append(text(right + 4, y, "small", found.beside[row]))
    for cut in found.cuts:
        path = _stairs([at_x(float(value)) for value in cut], top, tall)
        body += [f'<path d="{path}" class="halo"/>'] if tall >= _JOINED else []
        body.append(f'<path d="{path}" class="{"cut" if tall >= _JOINED else "cut low"}"/>')
    if found.cuts:
        body.append(text(left, top - 5, "small", "← skipped"))
        body.append(text(right, top - 5, "end small", "kept →"))
        body.append(text(right + 4, top - 5, "small", "skips"))
    body += _axis(low, high, at_x, bottom)
    body.append(text((left + right) / 2, bottom + 28, "middle small", x_name))
    return svg(bottom + 33, label, body)


def _shades(found: Layers, css: str, at_x: Axis, top: float, tall: float) -> list[str]:
    """One path per shade instead of one element per cell: a model of 94 layers stays a small page."""
    most = found.cells.max(axis=1, keepdims=True)
    levels = np.rint(np.divide(found.cells, most, out=np.zeros_like(found.cells), where=most > 0) * LEVELS).astype(int)
    gap = 0.5 if tall > 6 else 0.0
    body = []
    for level in range(1, LEVELS + 1):
        pieces = []
        for row, column in zip(*np.nonzero(levels == level), strict=True):
            begin, end = at_x(float(found.edges[column])), at_x(float(found.edges[column + 1]))
            place = f"M{number(begin)} {number(top + tall * row)}"
            pieces.append(f"{place}h{number(end - begin)}v{number(tall - gap)}h{number(begin - end)}z")
        if pieces:
            body.append(f'<path d="{"".join(pieces)}" class="{css}" fill-opacity="{number(level / LEVELS)}"/>')
    return body


def _stairs(places: Sequence[float], top: float, tall: float) -> str:
    """A line from row to row; where rows are too low for that, a stroke in each."""
    steps = [f"V{number(top + tall * (row + 1))}" for row in range(len(places))]
    if tall < _JOINED:
        return "".join(
            f"M{number(x)} {number(top + tall * row)}{step}" for row, (x, step) in enumerate(zip(places, steps, strict=True))
        )
    moves = [f"M{number(places[0])} {number(top)}", *(f"H{number(x)}" for x in places[1:])] if places else []
    return "".join(move + step for move, step in zip(moves, steps, strict=True))


def _sides(x: float, left: float, right: float) -> list[str]:
    found = []
    if x - left > 44:
        found.append(text(x - 5, 11, "end small", "← skipped"))
    if right - x > 34:
        found.append(text(x + 5, 11, "small", "kept →"))
    return found


def _axis(low: float, high: float, at_x: Axis, bottom: float) -> list[str]:
    """Ticks at powers of ten, or at 1, 2 and 5 of each where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    many = high - low > 3.2
    values = [power + math.log10(step) for power in powers for step in ((1,) if many else (1, 2, 5))]
    every = max(1, math.ceil((high - low) / 6)) if many else 1
    found = []
    for value in values:
        if low - 1e-9 <= value <= high + 1e-9 and (not many or round(value) % every == 0):
            found.append(line(at_x(value), bottom, at_x(value), bottom + 3, "axis"))
            found.append(text(at_x(value), bottom + 14, "middle small", _power(value)))
    return found


def _power(value: float) -> str:
    return f"{10.0**value:.2g}"
