"""What a schema cannot say: comparisons of one field with another. Each raises ValueError, which pydantic makes an error."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

ROUNDING = 1e-6  # of sums and quotients of float32 and float64, in whatever order they were taken


def require_rising(name: str, values: Sequence[int] | Sequence[float]) -> None:
    """Each value once, in rising order."""
    for before, after in pairwise(values):
        if not before < after:
            raise ValueError(f"{name} are not in rising order, each once: {before} stands before {after}")


def require_once(name: str, values: Iterable[str]) -> None:
    """No value twice."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{name}: `{value}` occurs twice")
        seen.add(value)


def require_some_of(part: str, few: int, whole: str, many: int) -> None:
    """A part is no more than the whole."""
    if few > many:
        raise ValueError(f"{part} is {few}, more than {whole}, {many}")


def require_known(name: str, groups: Iterable[str], known: Iterable[str]) -> None:
    """Only token groups that are known."""
    if unknown := sorted(set(groups) - set(known)):
        raise ValueError(f"{name} names {unknown}, which are no groups")


def require_close(name: str, found: float, what: str, expected: float) -> None:
    """Two numbers that say the same, up to rounding."""
    if abs(found - expected) > ROUNDING * max(1.0, abs(expected)):
        raise ValueError(f"{name} is {found!r}, {what} {expected!r}")


def no_larger(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    """Whether thresholds are no larger in any group. `decode` has that of `text`, and others 0, where they are not named."""
    groups = first.keys() | second.keys()
    return all(tau_of(first, group) <= tau_of(second, group) for group in {*groups, "decode"})


def tau_of(tau: Mapping[str, float], group: str) -> float:
    """The threshold of a group."""
    return tau.get(group, tau.get("text", 0.0) if group == "decode" else 0.0)
