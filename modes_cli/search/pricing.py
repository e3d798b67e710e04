"""The price list of a model: what each policy costs at every ratio, not only at those that were asked for."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from modes_cli.artifacts.thresholds import FrontierEntry, SearchResult
from modes_cli.search.auto import LEAST_SAMPLES, LEAST_SHARE
from modes_cli.search.edge import Edge
from modes_cli.search.objective import Objective, Point
from modes_cli.search.problem import Candidate, Problem, Target

TARGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TRIES = 3  # a place is corrected so often where the measured ratio is off
_USUAL = 0.3  # place of the edge where nothing is known


def price_list(
    options: Sequence[Candidate],
    results: Sequence[SearchResult],
    objective: Objective,
    tau_of: Callable[[Point], dict[str, float]],
) -> list[FrontierEntry]:
    """Each candidate at each ratio that it reaches, confirmed by measurement on a part of the samples.

    Where on the edge: between the places that were best for the results of the same policy, or of any. `tau_of` gives a
    point's thresholds by the groups that the model has.
    """
    share = min(1.0, max(LEAST_SHARE, LEAST_SAMPLES / objective.samples))
    entries = []
    for option in options:
        places = _places(option, results)
        for ratio in TARGETS:
            problem = Problem(option, Target(ratio), objective)
            if ratio > problem.staircase.largest:
                break
            point = _measured(Edge(problem), _place(places, ratio), share)
            entries.append(_entry(option, ratio, point, tau_of(point)))
    return entries


def _measured(edge: Edge, place: float, share: float) -> Point:
    for _ in range(TRIES):
        point = edge.measure(place, share=share)
        if edge.problem.target.met_by(point) and edge.problem.target.close_to(point):
            break
    return edge.points[place]


def _places(option: Candidate, results: Sequence[SearchResult]) -> Mapping[float, float]:
    """Best places by target, read off the thresholds of results that have one threshold for text and decode."""
    same = [
        result for result in results if (result.policy, result.parameters) == (option.policy.name, option.policy.parameters)
    ]
    stairs = option.staircase()
    known: dict[float, float] = {}
    for result in same:
        if "decode" in result.tau or "text" not in result.tau:
            continue
        low, high = stairs.text_range(result.target)
        share = stairs.skipped(stairs.text, result.tau["text"]) / max(1.0, stairs.pairs(stairs.text))
        known[result.target] = min(1.0, max(0.0, (share - low) / (high - low))) if high > low else _USUAL
    return known


def _place(known: Mapping[float, float], ratio: float) -> float:
    if not known:
        return _USUAL
    targets = sorted(known)
    return float(np.interp(ratio, targets, [known[target] for target in targets]))


def _entry(option: Candidate, ratio: float, point: Point, tau: dict[str, float]) -> FrontierEntry:
    return FrontierEntry(
        target=ratio,
        policy=option.policy.name,
        parameters=option.policy.parameters,
        tau=tau,
        skip_ratio=point.skip_ratio,
        skip_ratio_per_group=point.per_group,
        kl=point.kl,
        share=point.share,
    )
