"""What a page is made of, before it is HTML; and how numbers, groups and policies are written on it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from modes_cli.report.svg import SHAPES, marker

# Colours are the page's: a class per token group, and eight for policies.
GROUP_NAMES = {
    "all": "all tokens",
    "text": "prompt text",
    "prompt": "prompt text",
    "vision": "vision",
    "decode": "decode",
    "audio": "audio",
    "special": "special",
}
_GROUP_CSS = {"text": "c-text", "prompt": "c-text", "vision": "c-vision", "decode": "c-decode", "audio": "c-audio"}
_COLORS = 8
MOST_ROWS = 28  # of bars in one chart

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Rows of text; the page escapes every cell. `text_columns` are left aligned, `strong` (row, column) cells stand out.

    `folded`: what is behind a chart that is shown already; one click away, and not printed.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    text_columns: frozenset[int] = frozenset({0})
    strong: frozenset[tuple[int, int]] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """`wide`: the same picture for pages that have the room; `svg` is for phones then."""

    caption: str
    svg: str
    wide: str = ""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a colour, and the shape of a point or "" for a patch."""

    css: str
    name: str
    shape: str = ""

    @property
    def drawing(self) -> str:
        return marker(self.shape, 6, 6, 4, self.css) if self.shape else ""


@dataclass(frozen=True)
class Card:
    """One changed answer. `image` is a PNG in base64; `verdict` a word for what happened, or ""."""

    id: str
    task: str
    question: str
    lines: list[tuple[str, str]]
    image: str | None
    verdict: str = ""


@dataclass(frozen=True)
class Block:
    """Charts with their legend, then tables, cards and notes, under a heading of their own where `title` is given."""

    title: str = ""
    text: str = ""
    legend: list[Key] = field(default_factory=list)
    ramp: bool = False  # a legend of shades from 0 to 100%
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def beside(self) -> bool:
        """Whether the table has room beside the only chart."""
        return len(self.charts) == 1 and not self.charts[0].wide and any(not table.folded for table in self.tables)


@dataclass(frozen=True)
class Section:
    """One part of the page. `missing` is the command that makes what it lacks, instead of content."""

    id: str
    title: str
    lead: str = ""
    blocks: list[Block] = field(default_factory=list)
    missing: str | None = None


class Styles:
    """The colour and shape of each policy, the same in every chart of a page: by its place in the alphabet."""

    def __init__(self, policies: Iterable[str]) -> None:
        self._place = {name: place for place, name in enumerate(sorted(set(policies)))}

    def css(self, policy: str) -> str:
        return f"p{self._place[policy] % _COLORS}"

    def shape(self, policy: str) -> str:
        return SHAPES[self._place[policy] % len(SHAPES)]

    def legend(self, policies: Iterable[str]) -> list[Key]:
        return [Key(self.css(name), name, self.shape(name)) for name in policies]


def group_css(group: str) -> str:
    return _GROUP_CSS.get(group, "c-all")


def group_name(group: str) -> str:
    return GROUP_NAMES.get(group, group)


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def exact(value: float) -> str:
    return f"{value:.4g}"


def target_name(target: float, decode_target: float | None) -> str:
    """How a target is called: `88%`, or with a least ratio of decode."""
    name = f"{100 * target:.4g}%"
    return name if decode_target is None else f"{name}, decode {100 * decode_target:.4g}%"


def pieces(name: str, rows: Sequence[T]) -> list[tuple[str, Sequence[T]]]:
    """Rows of a chart as charts that fit on a printed page, with their captions."""
    if len(rows) <= MOST_ROWS:
        return [(name, rows)] if rows else []
    parts = [rows[begin : begin + MOST_ROWS] for begin in range(0, len(rows), MOST_ROWS)]
    return [(f"{name} ({place} of {len(parts)})", part) for place, part in enumerate(parts, 1)]


def with_parameters(policy: str, parameters: dict[str, float]) -> str:
    """A policy as `tempered (power 0.25)`; parameters that are 0 are left out."""
    named = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in parameters.items() if value)
    return f"{policy} ({named})" if named else policy


def in_layer_order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name))
