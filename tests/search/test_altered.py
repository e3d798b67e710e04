"""Calibration tensors that were damaged, or altered together with their digest, are refused before the search uses them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modes_cli import files
from modes_cli.calibration.calibrate import TENSORS
from modes_cli.errors import BadArtifact
from modes_cli.search import find_thresholds
from tests.runs import search_request

Fresh = Callable[..., Path]


def rewrite(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and make the digest in calibration.json fit again, as an attacker would."""
    path = run / TENSORS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    tree = json.loads((run / "calibration.json").read_text())
    tree["tensors"] |= {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    (run / "calibration.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("damage", ["altered", "truncated", "longer", "missing"])
def test_altered_tensors_are_refused(damage: str, fresh_run: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modes_cli.search.calibrated.load", lambda _: pytest.fail("loaded the model"))
    run = fresh_run("tiny")
    path = run / TENSORS
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"altered": data, "truncated": data[:-8], "longer": data + b"\0"}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    with pytest.raises(BadArtifact, match=r"calibration\.safetensors"):
        find_thresholds(search_request(run, 0.5))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("score_histogram", lambda t: t.update(score_histogram=t["score_histogram"][:-1].clone())),
        ("score_histogram", lambda t: t.update(score_histogram=t["score_histogram"].float())),
        ("score_histogram", lambda t: t["score_histogram"].view(-1).__setitem__(0, -1)),
        ("score_histogram", lambda t: t["score_histogram"].zero_()),
        ("score_histogram", lambda t: t.pop("score_histogram")),
        (
            "reference_log_probabilities",
            lambda t: t.update(reference_log_probabilities=t["reference_log_probabilities"][1:].clone()),
        ),
        ("reference_log_probabilities", lambda t: t["reference_log_probabilities"].view(-1).__setitem__(0, float("nan"))),
        (
            "reference_log_probabilities",
            lambda t: t.update(reference_log_probabilities=t["reference_log_probabilities"][:, :7].clone()),
        ),
        (
            "reference_log_probabilities",
            lambda t: t.update(reference_log_probabilities=t["reference_log_probabilities"].double()),
        ),
    ],
)
def test_tensors_of_a_wrong_form_are_refused(
    name: str, change: Callable[[dict[str, torch.Tensor]], None], fresh_run: Fresh
) -> None:
    run = fresh_run("tiny")
    rewrite(run, change)
    with pytest.raises(BadArtifact, match=name):
        find_thresholds(search_request(run, 0.5))


def test_reference_distributions_of_other_samples_are_refused(fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    rewrite(run, lambda t: t.update(reference_log_probabilities=t["reference_log_probabilities"][1:].clone()))
    tree = json.loads((run / "calibration.json").read_text())
    tree["answer_tokens"] -= 1
    (run / "calibration.json").write_text(json.dumps(tree))
    with pytest.raises(BadArtifact, match="reference_log_probabilities"):
        find_thresholds(search_request(run, 0.5))


def test_a_file_that_is_no_safetensors_is_refused(fresh_run: Fresh) -> None:
    run = fresh_run("tiny")
    (run / TENSORS).write_bytes(b"\x80\x04" * 50)
    tree = json.loads((run / "calibration.json").read_text())
    tree["tensors"] |= {"sha256": files.sha256(run / TENSORS), "bytes": 100}
    (run / "calibration.json").write_text(json.dumps(tree))
    with pytest.raises(BadArtifact, match=r"calibration\.safetensors"):
        find_thresholds(search_request(run, 0.5))
