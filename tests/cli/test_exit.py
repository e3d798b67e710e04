"""What scripts and pipelines build on: exit codes of gates, and silence."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import Commands
from tests.export.bundles import shared_bundle

EVALUATE = ("evaluate", *DATA, "--max-new-tokens", 2)


def test_a_gate_that_fails(command: Commands, folder: Path) -> None:
    """With exit code 3, after the artifact is written and the result printed."""
    ended = command(*EVALUATE, "--min-retained", 1.5, "--run", folder, "--json")
    assert ended.code == 3
    assert ended.json["error"]["kind"] == "gate_failed"
    assert "less than `1.5`" in ended.err
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["retained"] == ended.json["retained"]
    assert ended.json["artifact"] == str(folder / "evaluation.json")
    assert command(*EVALUATE, "--min-retained", 1.5, "--run", folder).code == 3  # also when there is nothing to do
    assert command(*EVALUATE, "--min-retained", 0, "--run", folder).code == 0


@pytest.mark.parametrize("least", ["nan", "-1", "inf"])
def test_a_gate_that_makes_no_sense(command: Commands, folder: Path, least: str) -> None:
    ended = command(*EVALUATE, f"--min-retained={least}", "--run", folder, "--json")
    ended.refused("bad_option", f"`--min-retained {least}")
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize("step", ["profile", "calibrate", "search", "export", "evaluate", "report", "verify", "generate"])
def test_quiet(
    command: Commands, tiny_checkpoint: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory, step: str
) -> None:
    bundle = shared_bundle(tmp_path_factory.getbasetemp())
    arguments: dict[str, tuple[object, ...]] = {
        "profile": (tiny_checkpoint, *DATA),
        "calibrate": (tiny_checkpoint, *DATA),
        "search": SEARCH,
        "export": ("--format", "safetensors"),
        "evaluate": (*DATA, "--max-new-tokens", 2),
        "verify": (bundle,),
        "generate": (bundle, "--prompt", "What?", "--max-new-tokens", 2),
    }
    run = () if step in ("verify", "generate") else ("--run", folder)
    fresh = () if step in ("report", "verify", "generate") else ("--fresh",)
    ended = command(step, *arguments.get(step, ()), *run, *fresh, "--quiet").ok()
    assert ended.err == ""
    assert ended.out


def test_quiet_as_it_is_typed(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing that is imported or loaded says a word either."""
    ended = command.cold("calibrate", tiny_checkpoint, *DATA, "--run", tmp_path / "run", "-q", "--json").ok()
    assert ended.err == ""
    assert set(ended.json) == {"importance", "samples", "forward_equivalents", "naive_forwards", "artifact", "seconds"}
