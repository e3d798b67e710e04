"""Every policy at every target, on the same samples: the built-in model, which has most of its answers right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.evaluation import PolicyAccuracy
from modes_cli.calibration import calibrate
from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadOption, StaleArtifact
from modes_cli.evaluation import evaluate
from modes_cli.evaluation.comparison import Contender, compared
from modes_cli.models.groups import GROUPS
from modes_cli.requests import EvaluateRequest
from modes_cli.search import alternatives, find_thresholds
from modes_cli.skipping.policy import Rule, tau_vector
from modes_cli.skipping.registry import policy_names
from tests.once import once
from tests.runs import calibration_request, search_request

SAMPLES, PASSES = 22, 5
NAMES = ("threshold", "topk", "modes")


class Stages:
    """Progress that keeps the stages and how far each came."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def start(self, label: str, total: int) -> None:
        self.now = label
        self.total[label], self.done[label] = total, 0

    def advance(self, pieces: int = 1) -> None:
        self.done[self.now] += pieces

    def note(self, text: str) -> None:
        raise AssertionError(text)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Thresholds of the paper's policy for 0.5 and 0.8."""

    def make(run: Path) -> None:
        calibrate(calibration_request("digits", run, samples=11, batch_size=11))
        find_thresholds(search_request(run, 0.5, 0.8, policy="modes", passes=PASSES, frontier=False))

    return once(tmp_path_factory.getbasetemp(), "comparison-run", make)


@pytest.fixture
def run(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "run"))


def request(run: Path, target: float | None = None, samples: int = SAMPLES, **more: object) -> EvaluateRequest:
    data = DataSpec("digits", "test", samples)
    return EvaluateRequest(data, run, None, target, 11, 6, "cpu", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Stages, Path]:
    """A comparison at both targets."""
    run, stages = Path(shutil.copytree(searched, tmp_path_factory.mktemp("compared") / "run")), Stages()
    return evaluate(request(run, policies=NAMES, progress=stages)).artifact, stages, run


def test_the_table(whole: tuple[Evaluation, Stages, Path]) -> None:
    found, stages, _ = whole
    assert [(one.target, one.policy, one.chosen) for one in sorted(found.comparison, key=lambda c: (c.target, c.policy))] == [
        (target, name, name == "modes") for target in (0.5, 0.8) for name in sorted(NAMES)
    ]
    for at in (0.5, 0.8):
        rows = [one for one in found.comparison if one.target == at]
        assert [one.accuracy for one in rows] == sorted((one.accuracy for one in rows), reverse=True)
        assert rows[0].ties_best
        chosen = next(one for one in rows if one.chosen)
        assert (chosen.ahead, chosen.ahead_low, chosen.ahead_high) == (0.0, 0.0, 0.0)
        for one in rows:
            assert one.ahead == one.accuracy - chosen.accuracy
            assert one.ahead_low <= one.ahead <= one.ahead_high
            assert one.retained == one.accuracy / found.full
            assert one.interval is not None
            assert one.interval.low <= one.retained <= one.interval.high
            assert one.skip_ratio.keys() == {"all", "text", "vision", "decode"}
            assert one.skip_ratio["all"] == pytest.approx(at, abs=0.08)  # other samples than those of the search
    assert found.full > 0.8
    assert (found.target, found.left_out) == (0.8, [])
    assert found.policies == {one.policy: one.accuracy for one in found.comparison if one.target == 0.8}
    own = next(one for one in found.comparison if one.chosen and one.target == 0.8)
    assert (own.accuracy, own.retained, own.interval) == (found.skipped, found.retained, found.interval)
    assert own.skip_ratio == found.skip_ratio
    # One pass with all experts serves everybody.
    assert stages.total == stages.done == {"search with other policies": 4, "evaluate": SAMPLES * (1 + 6)}


def test_a_row_is_what_a_search_and_an_evaluation_of_that_policy_give(
    whole: tuple[Evaluation, Stages, Path], run: Path
) -> None:
    found, _, _ = whole
    plain = evaluate(request(run)).artifact
    assert (plain.full, plain.skipped, plain.interval) == (found.full, found.skipped, found.interval)
    assert (plain.per_task, plain.changed) == (found.per_task, found.changed)
    assert (plain.comparison, plain.policies) == ([], {"modes": plain.skipped})
    for name in ("threshold", "topk"):
        asked = search_request(run, 0.8, policy=name, passes=PASSES, frontier=False, fresh=True)
        (result,) = find_thresholds(asked).artifact.results
        alone = evaluate(request(run, fresh=True)).artifact
        row = next(one for one in found.comparison if (one.policy, one.target) == (name, 0.8))
        assert (row.kl, row.tau, row.parameters) == (result.kl, result.tau, result.parameters)
        assert (row.accuracy, row.retained, row.interval) == (alone.skipped, alone.retained, alone.interval)
        assert row.skip_ratio == alone.skip_ratio


def test_is_reused_by_what_was_compared(whole: tuple[Evaluation, Stages, Path]) -> None:
    found, _, run = whole
    again = evaluate(request(run, policies=("modes", "topk", "threshold", "topk")))  # in another order
    assert again.reused
    assert again.artifact == found
    for other in (("topk",), ()):
        with pytest.raises(StaleArtifact, match=r"options\.policies `modes,threshold,topk`") as caught:
            evaluate(request(run, policies=other))
        assert "--fresh" in (caught.value.hint or "")


def test_a_target_of_decode(run: Path) -> None:
    find_thresholds(search_request(run, 0.5, policy="modes", passes=PASSES, frontier=False, decode_target=0.7))
    found = evaluate(request(run, 0.5, decode_target=0.7, policies=("topk",))).artifact
    assert (found.target, found.decode_target) == (0.5, 0.7)
    assert {(one.policy, one.target, one.decode_target) for one in found.comparison} == {
        ("modes", 0.5, 0.7),
        ("topk", 0.5, 0.7),
    }
    assert all(one.skip_ratio["decode"] > 0.6 for one in found.comparison)
    plain = evaluate(request(run, 0.5, decode_target=0.7, fresh=True)).artifact
    assert (plain.decode_target, plain.skipped, plain.skip_ratio) == (0.7, found.skipped, found.skip_ratio)
    without = evaluate(request(run, 0.5, fresh=True)).artifact  # the result that was searched without
    assert without.decode_target is None
    assert without.skip_ratio["decode"] != plain.skip_ratio["decode"]


def test_all_policies_at_one_target_and_those_without_thresholds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds thresholds is replaced: it says which policies it was asked for."""
    asked = []

    def none(calibrated: object, measured: object, names: list[str], *at: object) -> dict[str, str]:
        asked.append((*names, *at))
        return {name: f"{name} cannot" for name in names}

    monkeypatch.setattr(alternatives, "alternatives", none)
    found = evaluate(request(run, 0.5, samples=2, policies=("all",))).artifact
    others = [name for name in policy_names() if name != "modes"]
    assert asked == [(name, 0.5, None, PASSES) for name in others]
    assert [(one.policy, one.target, one.reason) for one in found.left_out] == [(n, 0.5, f"{n} cannot") for n in others]
    assert [(one.policy, one.chosen) for one in found.comparison] == [("modes", True)]
    assert found.options["policies"] == ",".join(policy_names())


def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    for policies, says in ((("topk", "magic"), "no policy `magic`"), (("auto",), "`auto` is no policy to compare")):
        with pytest.raises(BadOption, match=says):
            evaluate(request(run, policies=policies))
    with pytest.raises(BadOption, match="a bundle has one policy") as caught:
        evaluate(EvaluateRequest(DataSpec("digits", "test", 2), run, tmp_path, policies=("all",)))
    assert caught.value.hint == "leave out `--bundle`"
    with pytest.raises(BadOption, match="sample by sample"):
        evaluate(request(run, policies=("all",), lmms_tasks=("chartqa",)))
    with pytest.raises(BadOption, match=r"decode 0\.7"):
        evaluate(request(run, 0.8, decode_target=0.7, policies=("all",)))


def contender(policy: str, number: float, *, chosen: bool = False, decode_target: float | None = None) -> Contender:
    tau = {"text": number, "vision": 0.5} | ({} if decode_target is None else {"decode": number / 2})
    return Contender(policy, {}, 0.5, decode_target, Rule(torch.ones(1, len(GROUPS)), tau_vector(tau)), 0.1, chosen)


def rows(right: dict[str, list[bool]], full: list[bool], chosen: str) -> dict[str, PolicyAccuracy]:
    numbers = {name: number / 8 for number, name in enumerate(right)}
    ones = [contender(name, number, chosen=name == chosen) for name, number in numbers.items()]
    by_rule = {one.rule.key: right[one.policy] for one in ones}
    table = compared(ones, full, by_rule, {key: {"all": 0.5} for key in by_rule}, ["text", "vision"], 0)
    assert [one.accuracy for one in table] == sorted((one.accuracy for one in table), reverse=True)
    return {one.policy: one for one in table}


def test_ties_are_those_that_the_paired_difference_does_not_tell_apart() -> None:
    """A policy that loses five answers of a hundred, and wins none, is worse; one that loses as many as it wins is not."""
    full = [True] * 90 + [False] * 10
    right = {
        "best": full,
        "swaps": [False] * 3 + [True] * 89 + [False] * 8,
        "loses": [False] * 8 + [True] * 82 + [False] * 10,
        "nothing": [False] * 100,
    }
    table = rows(right, full, "swaps")
    assert list(table) == ["best", "swaps", "loses", "nothing"]
    assert [one.ties_best for one in table.values()] == [True, True, False, False]
    best, swaps, loses, nothing = table.values()
    assert best.ahead == pytest.approx(0.01)
    assert best.ahead_low < 0 < best.ahead_high
    assert loses.ahead == pytest.approx(-0.07)
    assert loses.ahead_high < 0
    assert nothing.ahead == pytest.approx(-0.89)
    assert (swaps.retained, nothing.retained) == (pytest.approx(89 / 90), 0.0)
    assert best.interval is not None
    assert (best.interval.low, best.interval.high) == (1.0, 1.0)
    assert (nothing.interval and nothing.interval.high) == 0.0
    assert best.tau == {"text": 0.0, "vision": 0.5}


def test_where_the_full_model_has_nothing_right_there_is_no_share() -> None:
    table = rows({"a": [True, False], "b": [False, False]}, [False, False], "a")
    assert [(one.retained, one.interval) for one in table.values()] == [(0.0, None), (0.0, None)]


def test_targets_of_decode_are_targets_of_their_own() -> None:
    """The same rule may stand at several targets, and is answered once; decode's threshold is shown where it differs."""
    ones = [contender("p", 0.25, chosen=True), contender("p", 0.25, chosen=True, decode_target=0.75), contender("q", 0.25)]
    right = {ones[0].rule.key: [True, False], ones[1].rule.key: [True, True]}
    assert len(right) == 2
    table = compared(ones, [True, True], right, {key: {"all": 0.5} for key in right}, ["text", "vision"], 0)
    assert [(one.policy, one.decode_target, one.accuracy, one.chosen) for one in table] == [
        ("p", None, 0.5, True),
        ("q", None, 0.5, False),
        ("p", 0.75, 1.0, True),
    ]
    assert [one.tau.get("decode") for one in table] == [None, None, 0.125]
