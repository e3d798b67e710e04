"""Charts of points over two axes: lines of several series, and what was chosen among them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modes_cli.report.svg import WIDTH, line, marker, number, padded, svg, text, ticks

DECADES = 6  # of a logarithmic axis; what is smaller lies on its floor
WIDE = 720


@dataclass(frozen=True)
class Dot:
    """One point."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape, joined by a line where `joined`."""

    css: str
    shape: str
    dots: Sequence[Dot]
    joined: bool = True
    radius: float = 3.0


@dataclass(frozen=True)
class Ring:
    """A point that was chosen: ringed and labelled."""

    x: float
    y: float
    label: str
    title: str


@dataclass(frozen=True)
class Plane:
    """What to draw. `log`: the y axis is logarithmic, zeros on its floor. `reference`: a line across, at that y.

    `floor`: where a linear y axis begins; lines that go below it leave the chart there.
    """

    label: str
    x_name: str
    y_name: str
    series: Sequence[Series] = field(default_factory=list)
    rings: Sequence[Ring] = field(default_factory=list)
    log: bool = True
    reference: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class _Frame:
    """The place of the axes, and values to places. `low` is the least y that is drawn."""

    width: float
    height: float
    at_x: Callable[[float], float]
    at_y: Callable[[float], float]
    low: float

    @property
    def bottom(self) -> float:
        return self.height - _BELOW


_LEFT, _RIGHT, _TOP, _BELOW = 46, 12, 12, 36  # room around the axes


def draw(plane: Plane, width: float = WIDTH) -> str:
    """The chart as SVG, `width` units wide."""
    height = 300.0 if width <= WIDTH else 400.0
    left, right, bottom = _LEFT, width - _RIGHT, height - _BELOW
    xs = [dot.x for one in plane.series for dot in one.dots] + [ring.x for ring in plane.rings]
    x_low, x_high = padded(xs, most=1.0)

    def at_x(value: float) -> float:
        return left + (right - left) * (value - x_low) / (x_high - x_low)

    low, high, y_ticks = _y_axis(plane)

    def at_y(value: float) -> float:
        if plane.log:
            value = math.log10(value) if value > 0 else low
        return bottom - (bottom - _TOP) * max(0.0, (value - low) / (high - low))

    frame = _Frame(width, height, at_x, at_y, 0.0 if plane.log else low)
    body = []
    for value, name in y_ticks:
        body.append(line(left, at_y(value), right, at_y(value), "grid"))
        body.append(text(left - 5, at_y(value) + 4, "end small", name))
    for value in ticks(x_low, x_high, 6 if width <= WIDTH else 11):
        body.append(line(at_x(value), bottom, at_x(value), bottom + 3, "axis"))
        body.append(text(at_x(value), bottom + 15, "middle small", f"{100 * value:g}%"))
    body.append(line(left, bottom, right, bottom, "axis"))
    body.append(text((left + right) / 2, height - 6, "middle small", plane.x_name))
    turn = f'transform="translate(10 {number((_TOP + bottom) / 2)}) rotate(-90)"'
    body.append(text(0, 0, "middle small", plane.y_name).replace('x="0" y="0"', turn))
    if plane.reference is not None:
        body.append(line(left, at_y(plane.reference), right, at_y(plane.reference), "mark"))
    for one in plane.series:
        body += _lines(one, frame)
    for ring in plane.rings:
        body.append(marker("circle", at_x(ring.x), at_y(ring.y), 7, "ring", ring.title))
    for one in plane.series:
        inside = [dot for dot in one.dots if dot.y >= frame.low]
        body += [marker(one.shape, at_x(dot.x), at_y(dot.y), one.radius, one.css, dot.title) for dot in inside]
    body += _labels(plane.rings, frame)
    return svg(height, plane.label, body, width)


def _y_axis(plane: Plane) -> tuple[float, float, list[tuple[float, str]]]:
    """The range of the y axis (log10 where it is logarithmic), and values with their names to mark on it."""
    values = [dot.y for one in plane.series for dot in one.dots]
    values += [ring.y for ring in plane.rings] + ([] if plane.reference is None else [plane.reference])
    if plane.log:
        positive = [value for value in values if value > 0]
        low, high = (math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))) if positive else (-3, 0)
        high = max(high, low + 1)
        low = max(low, high - DECADES)
        return low, high, [(10.0**power, f"{10.0**power:g}") for power in range(low, high + 1)]
    least, most = padded([value for value in values if plane.floor is None or value >= plane.floor])
    return least, most, [(value, f"{100 * value:g}%") for value in ticks(least, most)]


def _lines(one: Series, frame: _Frame) -> list[str]:
    places: list[tuple[float, float]] = []
    for index, dot in enumerate(one.dots):
        if dot.y < frame.low:  # leaves the chart: up to where it does
            if index:
                before = one.dots[index - 1]
                part = (before.y - frame.low) / (before.y - dot.y)
                places.append((frame.at_x(before.x + part * (dot.x - before.x)), frame.bottom))
            break
        places.append((frame.at_x(dot.x), frame.at_y(dot.y)))
    if not one.joined or len(places) < 2:
        return []
    joined = " ".join(f"{number(x)},{number(y)}" for x, y in places)
    return [f'<polyline points="{joined}" class="line {one.css}"/>']


def _labels(rings: Sequence[Ring], frame: _Frame) -> list[str]:
    """Names of what was chosen, beside their rings where there is room; the rest have titles, and the table."""
    found: list[str] = []
    centers = [(frame.at_x(ring.x), frame.at_y(ring.y)) for ring in rings]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in centers]
    for ring, (x, y) in zip(rings, centers, strict=True):
        width = 6.4 * len(ring.label)
        right, left = x + 10, x - 10 - width
        for a, b in ((right, y + 14), (x + 2, y + 20), (left, y - 7), (right, y + 30), (left, y + 4), (left, y - 22)):
            box = (a, b - 10, a + width, b + 1)
            if a >= _LEFT and a + width <= frame.width and _TOP <= b <= frame.bottom and not any(_meet(box, o) for o in taken):
                taken.append(box)
                found.append(text(a, b, "strong halo", ring.label))
                break
    return found


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
