"""Which of a search's results a later step uses."""

from modes_cli.artifacts import Thresholds
from modes_cli.artifacts.thresholds import SearchResult
from modes_cli.errors import BadOption


def select(thresholds: Thresholds, target: float | None) -> SearchResult:
    """The result for a target; without one, the only result or the one with the largest target.

    Raises:
        BadOption: no result for that target.
    """
    if target is None:
        return thresholds.results[-1]  # in rising order
    for result in thresholds.results:
        if result.target == target:
            return result
    known = ", ".join(f"{result.target:g}" for result in thresholds.results)
    raise BadOption(
        f"no thresholds for target `{target:g}`; there are some for {known}",
        hint=f"search it first: `modes search --target {target:g}`",
    )
