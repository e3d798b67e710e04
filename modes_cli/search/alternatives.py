"""Thresholds of other policies for the same target, to be compared with what a search chose."""

from collections.abc import Sequence
from dataclasses import dataclass

from modes_cli.errors import BadArtifact
from modes_cli.search.auto import choose
from modes_cli.search.candidates import ScoreCounts, candidate
from modes_cli.search.objective import Point
from modes_cli.search.problem import Target
from modes_cli.search.strategies import STRATEGIES
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, Rule
from modes_cli.skipping.registry import variants


@dataclass(frozen=True)
class Found:
    """A policy's best thresholds for a target, confirmed by a pass over the whole calibration set."""

    policy: Policy
    rule: Rule
    point: Point


def alternatives(
    scores: ScoreCounts, measured: Measured, names: Sequence[str], target: float, decode_target: float | None, passes: int
) -> dict[str, Found | str]:
    """Each policy's best variant and thresholds, found with at most `passes` passes each beside those that `scores` takes to
    know a rule for the first time; or why it has none.

    Raises:
        BadOption: no such policy.
    """
    found: dict[str, Found | str] = {}
    for name in names:
        try:
            options = [candidate(one, measured, scores) for one in variants(name)]
        except BadArtifact as error:
            found[name] = str(error)
            continue
        choice = choose(options, scores.objective, Target(target, decode_target), STRATEGIES["frontier"], 2, passes)
        if choice.best is None:
            reached = max((point.skip_ratio for point in choice.measured), default=0.0)
            found[name] = f"reaches a skip ratio of {reached:.4f} at most"
        else:
            found[name] = Found(choice.winner.policy, choice.best.rule, choice.best)
    return found
