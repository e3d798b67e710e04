"""Targets that no threshold reaches, or that are no shares: the answer is the largest ratio that can be reached."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import SEARCH
from tests.cli.process import Commands, content


def largest(run: Path) -> float:
    """Everything but special tokens, which are never skipped but counted."""
    tokens = json.loads((run / "calibration.json").read_text())["tokens"]
    return float(1 - tokens["special"] / sum(tokens.values()))


@pytest.mark.parametrize("policy", ["modes", "auto"])
def test_a_target_that_no_threshold_reaches(command: Commands, folder: Path, policy: str) -> None:
    before = content(folder)
    ended = command("search", "--target", 0.99, "--policy", policy, "--fresh", "--run", folder, "--json")
    reachable = f"{largest(folder):.4f}"
    ended.refused("unreachable_target", "`0.99`", f"`{policy}`", f"`{reachable}`", hint=f"`--target {reachable[:4]}`")
    assert content(folder) == before


def test_the_target_that_the_hint_names_is_reached(command: Commands, folder: Path) -> None:
    target = int(largest(folder) * 100) / 100
    options = ("--policy", "modes", "--fresh", "--run", folder, "--json")
    (found,) = command("search", "--target", target, *options).ok().json["results"]
    assert found["skip_ratio"] >= target


def test_one_of_several_targets_is_out_of_reach(command: Commands, folder: Path) -> None:
    """What was found before stays; nothing is searched in vain."""
    before = content(folder)
    ended = command("search", *SEARCH, "--target", 0.97, "--run", folder, "--json")
    ended.refused("unreachable_target", "`0.97`", f"`{largest(folder):.4f}`")
    assert content(folder) == before


@pytest.mark.parametrize("target", ["1.5", "-0.1", "nan", "inf", "88"])
def test_a_target_outside_0_to_1(command: Commands, folder: Path, target: str) -> None:
    before = content(folder)
    ended = command("search", f"--target={target}", "--run", folder, "--json")
    ended.refused("bad_option", f"`--target {target}`", "between 0 and 1", hint=f"`{largest(folder):.4f}`")
    assert content(folder) == before


def test_a_target_outside_0_to_1_as_it_is_typed(command: Commands, folder: Path) -> None:
    ended = command.cold("search", "--target", 1.01, "--run", folder)
    ended.refused("bad_option", "`--target 1.01`", hint=f"`{largest(folder):.4f}`")
    assert ended.out == ""


@pytest.mark.parametrize("step", ["export", "evaluate"])
def test_a_target_that_was_not_searched(command: Commands, folder: Path, step: str) -> None:
    before = content(folder)
    ended = command(step, "--target", 0.4, "--run", folder, "--json")
    ended.refused("bad_option", "`0.4`", "0.3, 0.5", hint="`modes search --target 0.4")
    assert content(folder) == before


@pytest.mark.parametrize(
    ("option", "value", "kind", "code"),
    [("--policy", "magic", "bad_option", 1), ("--passes", "2", "bad_option", 1), ("--strategy", "guess", "usage", 2)],
)
def test_searches_that_make_no_sense(command: Commands, folder: Path, option: str, value: str, kind: str, code: int) -> None:
    before = content(folder)
    ended = command("search", "--target", 0.5, option, value, "--fresh", "--run", folder, "--json")
    ended.refused(kind, f"`{value}`", code=code)
    assert content(folder) == before
