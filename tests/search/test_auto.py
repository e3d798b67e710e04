"""Which policy `auto` takes: by measured damage on the samples that decide, within its budget, never worse than the paper's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modes_cli.artifacts import Calibration
from modes_cli.errors import BadArtifact, BadOption
from modes_cli.models.groups import DECODE, GROUPS, TEXT, VISION
from modes_cli.run_folder import RunFolder
from modes_cli.search.alternatives import Found, alternatives
from modes_cli.search.auto import choose
from modes_cli.search.calibrated import Calibrated, model_spec, recalled
from modes_cli.search.candidates import ScoreCounts, candidates
from modes_cli.search.objective import Point
from modes_cli.search.problem import Candidate, Target
from modes_cli.search.staircase import Staircase
from modes_cli.search.strategies import STRATEGIES
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, Rule
from tests.search.fakes import FakeObjective, NoPolicy, counts_of, random_scale, scores

FRONTIER = STRATEGIES["frontier"]
Again = tuple[Measured, Calibrated]


class Paper(NoPolicy):
    name = "modes"


class Named(NoPolicy):
    pass


class Factors(FakeObjective):
    """Damage of a candidate is a common bowl times its own factors (deciding half, other half), by a mark in its scale."""

    def __init__(self, staircase: Staircase, factors: dict[float, tuple[float, float]]) -> None:
        super().__init__(staircase, lambda t, v: 0.01 + t**2 + v**2)
        self.factors = factors

    def measure(self, rule: Rule, share: float = 1.0) -> Point:
        point = super().measure(rule, share)
        decides, reported = self.factors[round(float(rule.score_scale[0, -1]), 3)]
        whole = point.kl * (decides + reported) / 2
        return Point(rule, whole, point.kl * decides, point.kl * reported, point.skip_ratio, point.per_group, [], point.share)


def options(factors: list[tuple[float, float]], paper: int) -> tuple[list[Candidate], Factors]:
    """Candidates whose rules differ only in the scale of special tokens, which decides nothing."""
    counts, scale = counts_of(scores(0, tokens=(600, 1200, 150, 0, 60))), random_scale(0)
    made, by_mark = [], {}
    for number, factor in enumerate(factors):
        own = scale.clone()
        own[:, -1] = mark = round(1 + number / 100, 3)
        by_mark[mark] = factor
        kind: Policy = Paper() if number == paper else Named()
        made.append(Candidate(kind, Rule(own, torch.zeros(len(GROUPS))), counts))
    return made, Factors(Staircase(counts, scale), by_mark)


@pytest.mark.parametrize("best", range(7))
def test_the_candidate_with_least_damage_on_the_deciding_half_wins(best: int) -> None:
    factors = [(1.0 if number == best else 1.5 + number / 10, 1.0) for number in range(7)]
    made, objective = options(factors, paper=0)
    choice = choose(made, objective, Target(0.6), FRONTIER, 100, 40)  # type: ignore[arg-type]
    assert choice.winner is made[best]
    assert choice.best is not None
    assert 0.6 <= choice.best.skip_ratio <= 0.61
    assert choice.tried[0] == (choice.winner, choice.best)
    assert [point.kl_selection for _, point in choice.tried[1:]] == sorted(p.kl_selection for _, p in choice.tried[1:])
    assert objective.passes <= 40


def test_the_other_half_decides_nothing() -> None:
    made, objective = options([(1.2, 0.1), (1.0, 9.0), (1.3, 0.1)], paper=0)
    assert choose(made, objective, Target(0.5), FRONTIER, 100, 40).winner is made[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("passes", [4, 6, 10, 16, 40])
def test_never_worse_than_the_papers_rule_and_within_the_budget(passes: int) -> None:
    """Trials rank the paper's rule last; where it is the best after a whole search, it wins all the same."""
    made, objective = options([(1.0, 1.0), (1.01, 1.0), (1.02, 1.0), (1.03, 1.0), (1.04, 1.0)], paper=4)
    choice = choose(made, objective, Target(0.6), FRONTIER, 100, passes)  # type: ignore[arg-type]
    assert 0 < objective.passes <= passes
    assert choice.best is not None
    objective.seen.clear()
    alone = choose(made[4:], objective, Target(0.6), FRONTIER, 100, passes)  # type: ignore[arg-type]
    assert alone.best is not None
    if passes >= 16:
        assert choice.best.kl_selection <= alone.best.kl_selection


def test_a_target_for_decode_is_met_by_every_candidate_that_wins() -> None:
    made, objective = options([(1.0, 1.0), (1.5, 1.0)], paper=0)
    choice = choose(made, objective, Target(0.6, 0.7), FRONTIER, 100, 40)  # type: ignore[arg-type]
    assert choice.best is not None
    assert 0.7 <= choice.best.per_group["decode"] <= 0.72
    assert choice.best.skip_ratio >= 0.6
    assert len({float(choice.best.rule.tau[group]) for group in (TEXT, VISION, DECODE)}) == 3


# -- a real model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(calibrated: dict[str, Path]) -> Iterator[Again]:
    run = RunFolder(calibrated["tiny"])
    calibration = run.read(Calibration)
    with recalled(run, calibration, model_spec(calibration, "cpu", False)) as found:
        yield Measured(calibration, run), found


@pytest.mark.parametrize(
    ("name", "strategy", "tried"),
    [
        ("gmlg", "frontier", ["gmlg"]),
        ("modes", "frontier", ["modes", "modes"]),
        ("modes:per_modality=1", "frontier", ["modes"]),
        ("tempered:power=0.75", "two-pointer", ["tempered"]),
        ("auto", "two-pointer", ["modes"]),
        ("auto", "exhaustive", ["modes"]),
    ],
)
def test_a_named_policy_is_tried_in_its_variants_only(name: str, strategy: str, tried: list[str], again: Again) -> None:
    measured, calibrated = again
    made = candidates(name, strategy, measured, ScoreCounts(calibrated.counts, calibrated.objective))
    assert [option.policy.name for option in made] == tried
    given = name.partition(":")[2]
    if given:
        key, _, value = given.partition("=")
        assert made[0].policy.parameters[key] == float(value)


@pytest.mark.parametrize(
    "name", ["magic", "tempered:power", "tempered:power=x", "tempered:force=1", "modes:per_modality=2", "dmt:power=1"]
)
def test_policies_and_parameters_that_do_not_exist_are_refused(name: str, again: Again) -> None:
    measured, calibrated = again
    with pytest.raises(BadOption, match="`"):
        candidates(name, "frontier", measured, ScoreCounts(calibrated.counts, calibrated.objective))


def test_auto_tries_the_papers_rule_first(again: Again) -> None:
    measured, calibrated = again
    made = candidates("auto", "frontier", measured, ScoreCounts(calibrated.counts, calibrated.objective))
    names = [option.policy.name for option in made]
    assert names[0] == "modes"
    assert {"modes", "tempered", "grouped", "dmt"} <= set(names)
    assert len({(option.policy.name, tuple(option.policy.parameters.items())) for option in made}) == len(made)


def test_what_auto_cannot_try_is_said(again: Again) -> None:
    measured, calibrated = again
    bare, heard = Measured(measured.calibration), list[str]()  # no tensors beside the calibration
    scores = scored(calibrated)
    made = candidates("auto", "frontier", bare, scores, heard.append)
    assert {"norm", "predicted", "salient"}.isdisjoint(option.policy.name for option in made)
    assert [one.split("`")[3] for one in heard] == ["salient", "predicted", "norm"]
    with pytest.raises(BadArtifact):
        candidates("predicted", "frontier", bare, scores)


def test_auto_is_no_worse_than_modes_where_it_counts(again: Again) -> None:
    measured, calibrated = again
    scores = scored(calibrated)
    calibrated.objective.forget()
    auto = choose(candidates("auto", "frontier", measured, scores), calibrated.objective, Target(0.6), FRONTIER, 100, 40)
    calibrated.objective.forget()
    modes = choose(candidates("modes", "frontier", measured, scores), calibrated.objective, Target(0.6), FRONTIER, 100, 12)
    assert auto.best is not None
    assert modes.best is not None
    assert auto.best.kl_selection <= 1.01 * modes.best.kl_selection


def scored(calibrated: Calibrated) -> ScoreCounts:
    return ScoreCounts(calibrated.counts, calibrated.objective)


def test_alternatives_meet_the_same_target(again: Again) -> None:
    measured, calibrated = again
    found = alternatives(scored(calibrated), measured, ["modes", "gmlg", "dmt"], 0.6, None, 8)
    for name, one in found.items():
        assert isinstance(one, Found)
        assert one.policy.name == name
        assert 0.6 <= one.point.skip_ratio <= 0.61
        assert torch.equal(one.rule.tau, one.point.rule.tau)


def test_an_alternative_that_cannot_reach_the_target_says_how_far_it_goes(again: Again) -> None:
    measured, calibrated = again
    tokens = measured.calibration.tokens
    largest = 1 - tokens["special"] / sum(tokens.values())
    found = alternatives(scored(calibrated), measured, ["dmt"], largest + 0.01, None, 6)
    assert "skip ratio" in str(found["dmt"])
