"""One table of several evaluations: means over runs, and what the search chose in each."""

import pytest

from modes_cli.artifacts import Evaluation
from modes_cli.artifacts.evaluation import Interval, PolicyAccuracy
from modes_cli.errors import ModesError
from tests import examples
from tools.policy_table import CHOSEN, markdown, table


def accuracy(policy: str, target: float, retained: float, *, chosen: bool = False) -> PolicyAccuracy:
    return PolicyAccuracy(
        policy=policy,
        parameters={},
        target=target,
        decode_target=None,
        tau={"text": 0.1, "vision": 0.2},
        skip_ratio={"all": target, "text": target},
        kl=1 - retained,
        accuracy=retained,
        retained=retained,
        interval=Interval(low=retained, high=retained),
        ahead=0.0,
        ahead_low=0.0,
        ahead_high=0.0,
        ties_best=False,
        chosen=chosen,
    )


def evaluation(*comparison: PolicyAccuracy) -> Evaluation:
    found: Evaluation = examples.artifact("evaluation")
    return found.model_copy(update={"comparison": list(comparison)})


def test_means_over_runs_and_what_was_chosen_in_each() -> None:
    first = evaluation(accuracy("modes", 0.5, 0.9), accuracy("dmt", 0.5, 1.0, chosen=True), accuracy("topk", 0.5, 0.5))
    second = evaluation(accuracy("modes", 0.5, 0.8, chosen=True), accuracy("dmt", 0.5, 0.7))
    rows = {row["policy"]: row for row in table([first, second])}
    assert rows.keys() == {CHOSEN, "modes", "dmt"}  # topk is in one run only
    assert rows["modes"]["retained"] == pytest.approx(0.85)
    assert rows[CHOSEN]["retained_by_run"] == [1.0, 0.8]
    assert rows[CHOSEN]["chose"] == [["dmt", {}], ["modes", {}]]
    assert rows["dmt"]["kl"] == pytest.approx(0.15)
    lines = markdown(list(rows.values())).splitlines()
    assert lines[0] == "| policy | 0.5 |"
    assert lines[2] == "| `auto` | 90.0 |"


def test_runs_about_something_else_are_refused() -> None:
    one = evaluation(accuracy("modes", 0.5, 0.9))
    other = one.model_copy(update={"data": one.data.model_copy(update={"digest": "f" * 64})})
    with pytest.raises(ModesError, match="same model and samples"):
        table([one, other])
    with pytest.raises(ModesError, match="same model and samples"):
        table([evaluation()])
