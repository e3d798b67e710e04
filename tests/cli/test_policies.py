"""`modes evaluate --policies`: what reaches the core, what is printed, and what is refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modes_cli.artifacts import Evaluation
from modes_cli.commands import evaluate
from modes_cli.console import Session
from tests import examples
from tests.cli.conftest import DATA
from tests.cli.process import Commands
from tests.export.bundles import shared_bundle


def shown(found: Evaluation) -> str:
    """What people get of an evaluation, as one text."""
    out = io.StringIO()
    Session(out, json=False, quiet=True).show({}, *evaluate.tables(found))
    return out.getvalue()


def test_options_reach_the_core(modes: Callable[..., Any], core: Any) -> None:
    modes("evaluate", "--policies", "modes, topk", "--target", 0.88, "--decode-target", 0.8)
    request = core.requests["evaluation"]
    assert (request.policies, request.target, request.decode_target) == (("modes", "topk"), 0.88, 0.8)
    modes("evaluate")
    assert (core.requests["evaluation"].policies, core.requests["evaluation"].decode_target) == ((), None)
    modes("export", "--target", 0.88, "--decode-target", 0.8)
    assert (core.requests["export"].target, core.requests["export"].decode_target) == (0.88, 0.8)


def test_json_is_the_artifact_s(modes: Callable[..., Any], core: Any) -> None:
    found, said = examples.artifact("evaluation"), modes("evaluate", "--policies", "all", "--json").json
    assert said["comparison"] == [one.model_dump() for one in found.comparison]
    assert said["left_out"] == [one.model_dump() for one in found.left_out]
    assert (said["interval"], said["decode_target"]) == ({"low": 0.9697, "high": 1.0065}, None)


def test_one_table_of_policies_by_targets(modes: Callable[..., Any], core: Any) -> None:
    out = modes("evaluate", "--policies", "all").out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    at = lines.index("Accuracy retained, by policy and target")
    for line in (
        "policy tempered grouped",  # what was chosen, under 0.75 and 0.88, decode 0.8
        "as searched 98.8 ±1.8 * 95.6 ±2.6 *",
        "modes 98.2 ±2.1 ~ 90.8 ±2.9",
        "grouped 95.6 ±2.6 *",  # not at the first target
        "random 31.8 ±5.2",
        "tempered 98.8 ±1.8 * 94.9 ±2.6 ~",
        "topp",  # at no target
    ):
        assert line in lines[at:], (line, out)
    assert "0.75 0.88, decode 0.8" in lines[at + 1 : at + 4]
    assert "left out: topp at 0.88, decode 0.8: reaches a skip ratio of 0.8712 at most" in lines
    assert "* best at the target, ~ a tie with it (paired bootstrap)" in out
    assert "retained 98.84% (95%: 97.0% to 100.6%); skipped: all 75.1%" in out


def test_without_other_policies_there_is_no_table_of_them() -> None:
    found = examples.artifact("evaluation").model_copy(update={"comparison": [], "left_out": []})
    text = shown(found)
    assert "by policy" not in text
    assert "retained 98.84% (95%: 97.0% to 100.6%)" in text
    assert "retained 98.84%; skipped" in shown(found.model_copy(update={"interval": None}))


def test_intervals_that_do_not_exist_are_not_made_up() -> None:
    found: Evaluation = examples.artifact("evaluation")
    rows = [one.model_copy(update={"interval": None, "retained": 0.0}) for one in found.comparison]
    text = shown(found.model_copy(update={"comparison": rows, "full": 0.0, "interval": None}))
    assert "±" not in text
    assert "the full model has nothing right" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--policies", " , "), "`--policies  , ` names no policy"),
        (("--decode-target", 1.5), "`--decode-target 1.5` is not between 0 and 1"),
    ],
)
def test_what_makes_no_sense(modes: Callable[..., Any], core: Any, options: tuple[object, ...], says: str) -> None:
    ended = modes("evaluate", *options)
    assert (ended.code, core.requests) == (1, {})
    assert says in ended.err
    assert "hint: " in ended.err


def test_a_real_comparison_and_what_is_refused(
    command: Commands, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The tiny model has no answer right: there are ratios and rows, and no share is made up."""
    arguments = ("evaluate", *DATA, "--max-new-tokens", 2, "--run", folder, "--json")
    said = command(*arguments, "--target", 0.5, "--policies", "topk,dmt").ok().json
    assert {(one["policy"], one["target"], one["interval"]) for one in said["comparison"]} == {
        (name, 0.5, None) for name in ("modes", "topk", "dmt")
    }
    assert all(0.3 < one["skip_ratio"]["all"] < 0.7 for one in said["comparison"])
    ended = command(*arguments, "--policies", "all", "--bundle", shared_bundle(tmp_path_factory.getbasetemp()))
    ended.refused("bad_option", "`--policies`", "a bundle has one policy", hint="leave out `--bundle`")
    ended = command(*arguments, "--policies", "topk,magic")
    ended.refused("bad_option", "`magic`", hint="policies are")
