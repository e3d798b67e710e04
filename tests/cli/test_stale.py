"""Artifacts of another model, data set, version or option: the field is named, and the command that renews it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modes_cli import files
from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import Commands, content


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--samples", 6), "data.samples `4`, this run uses `6`"),
        (("--seed", 1), "data.seed `0`, this run uses `1`"),
        (("--split", "test"), "data.split `validation`, this run uses `test`"),
        (("--batch-size", 4), "options.batch_size `2`, this run uses `4`"),
        (("--dtype", "bfloat16"), "model.dtype `float32`, this run uses `bfloat16`"),
        (("--revision", "v2"), "model.revision `None`, this run uses `v2`"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("step", ["profile", "calibrate"])
def test_another_option(
    command: Commands, tiny_checkpoint: Path, folder: Path, step: str, changed: tuple[Any, ...], says: str
) -> None:
    before = content(folder)
    ended = command(step, tiny_checkpoint, *DATA, *changed, "--run", folder, "--json")
    renew = f"`modes {step} {tiny_checkpoint} --run {folder} --fresh`"
    ended.refused("stale_artifact", says, str(folder), hint=renew)
    assert content(folder) == before


@pytest.mark.parametrize("step", ["profile", "calibrate"])
def test_another_model(command: Commands, tiny_checkpoint: Path, folder: Path, tmp_path: Path, step: str) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    before = content(folder)
    ended = command(step, other, *DATA, "--run", folder, "--json")
    ended.refused("stale_artifact", f"model.id `{tiny_checkpoint}`, this run uses `{other}`", hint=f"`modes {step} {other} ")
    assert content(folder) == before
    command(step, other, *DATA, "--run", folder, "--fresh").ok()  # as the hint says


def test_the_checkpoint_changed_in_its_place(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, run = Path(shutil.copytree(tiny_checkpoint, tmp_path / "it")), tmp_path / "run"
    command("calibrate", checkpoint, *DATA, "--run", run).ok()
    command("search", *SEARCH, "--run", run).ok()
    edit(checkpoint / "config.json", lambda tree: tree.update(note="trained further"))
    before = content(run)
    for step in (("search", "--target", 0.4, "--policy", "modes"), ("search", *SEARCH), ("export",), ("evaluate", *DATA)):
        ended = command(*step, "--run", run, "--json")
        ended.refused("stale_artifact", "model.digest `", hint=f"`modes calibrate {checkpoint} --run {run} --fresh`")
    assert content(run) == before


def test_the_data_changed_in_its_place(command: Commands, tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    rows = [{"image": "it.png", "question": "What?", "answer": str(n)} for n in range(4)]
    Image.new("RGB", (16, 16)).save(tmp_path / "it.png")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--run", folder, "--json")
    command("calibrate", tiny_checkpoint, "--data", path, "--samples", 4, "--fresh", *options).ok()
    path.write_text("".join(json.dumps({**row, "answer": "yes"}) + "\n" for row in rows))
    ended = command("search", "--target", 0.3, "--fresh", *options)
    ended.refused("stale_artifact", "data.digest `", hint=f"`modes calibrate {tiny_checkpoint} --run {folder} --fresh`")


@pytest.mark.parametrize(
    ("step", "field"),
    [("calibrate", "modes"), ("search", "modes"), ("search", "torch"), ("export", "transformers"), ("evaluate", "modes")],
)
def test_another_version(command: Commands, tiny_checkpoint: Path, folder: Path, step: str, field: str) -> None:
    edit(folder / "calibration.json", lambda tree: tree["versions"].update({field: "0.0.9"}))
    digest = files.sha256(folder / "calibration.json")
    edit(folder / "thresholds.json", lambda tree: tree.update(calibration=digest))
    before = content(folder)
    options: dict[str, tuple[Any, ...]] = {"calibrate": (tiny_checkpoint, *DATA), "search": ("--fresh",), "evaluate": DATA}
    ended = command(step, *options.get(step, ()), "--run", folder, "--json")
    renew = f"`modes calibrate {tiny_checkpoint} --run {folder} --fresh`"
    ended.refused("stale_artifact", f"versions.{field} `0.0.9`, this run uses `", "calibration.json", hint=renew)
    assert content(folder) == before


def test_after_another_calibration(command: Commands, tiny_checkpoint: Path, folder: Path) -> None:
    """Thresholds belong to one calibration."""
    command("calibrate", tiny_checkpoint, *DATA, "--seed", 7, "--fresh", "--run", folder).ok()
    before = content(folder)
    renew = f"`modes search --run {folder} --fresh`"
    for step in (("export",), ("evaluate", *DATA)):
        command(*step, "--run", folder, "--json").refused("stale_artifact", "thresholds.json` was made with", hint=renew)
    command("search", *SEARCH, "--run", folder, "--json").refused("stale_artifact", "calibration `", hint=renew)
    assert content(folder) == before
    command("search", *SEARCH, "--run", folder, "--fresh").ok()
    command("export", "--format", "safetensors", "--run", folder).ok()


@pytest.mark.parametrize(
    ("changed", "field"),
    [(("--policy", "gmlg"), "options.policy `modes`"), (("--passes", 20), "options.passes `40`")],
)
def test_another_search(command: Commands, folder: Path, changed: tuple[Any, ...], field: str) -> None:
    before = content(folder)
    ended = command("search", *SEARCH, *changed, "--run", folder, "--json")
    ended.refused("stale_artifact", field, "thresholds.json", hint=f"`modes search --run {folder} --fresh`")
    assert content(folder) == before


def test_another_evaluation(command: Commands, folder: Path) -> None:
    evaluate = ("evaluate", *DATA, "--run", folder, "--json", "--max-new-tokens")
    command(*evaluate, 2).ok()
    before = content(folder)
    ended = command(*evaluate, 3)
    renew = f"`modes evaluate --run {folder} --fresh`"
    ended.refused("stale_artifact", "options.max_new_tokens `2`, this run uses `3`", hint=renew)
    command(*evaluate, 2, "--target", 0.3).refused("stale_artifact", "options.target `0.5`, this run uses `0.3`", hint=renew)
    assert content(folder) == before
    command(*evaluate, 2).ok()  # what is there is used again
    assert content(folder) == before
