"""`evaluate` says how many of its samples were calibrated on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from modes_cli import options
from modes_cli.artifacts import Calibration
from modes_cli.data.overlap import overlap, sample_digest
from modes_cli.data.presets import PRESETS
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.evaluation import evaluate
from modes_cli.requests import EvaluateRequest
from modes_cli.run_folder import RunFolder
from tests.notes import Notes
from tests.pipeline import prepared_run
from tests.runs import SAMPLES


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, one_thread: None) -> Path:
    return Path(shutil.copytree(prepared_run(tmp_path_factory.getbasetemp())[1], tmp_path / "run"))


def request(run: Path, data: DataSpec, *, bundle: bool = False, fresh: bool = False) -> EvaluateRequest:
    folder = run / "bundle" if bundle else None
    return EvaluateRequest(data, run, folder, 0.6, 8, 2, "cpu", fresh=fresh, progress=Notes())


def said(request: EvaluateRequest) -> list[str]:
    assert isinstance(request.progress, Notes)
    return request.progress.said


SOME = DataSpec("digits", "validation", SAMPLES + 2)  # the calibration's own, and two more


@pytest.mark.parametrize("bundle", [False, True])
def test_samples_of_the_calibration_are_counted_and_said(bundle: bool, run: Path) -> None:
    asked = request(run, SOME, bundle=bundle)
    assert evaluate(asked).artifact.overlap == SAMPLES
    (warning,) = said(asked)
    assert warning.startswith(f"warning: `{SAMPLES}` of the {SAMPLES + 2} samples were calibrated on too")
    assert json.loads((run / "evaluation.json").read_text())["overlap"] == SAMPLES
    again = request(run, SOME, bundle=bundle)
    assert evaluate(again).reused
    assert said(again) == [warning]


def test_other_samples_are_none_and_nothing_is_said(run: Path) -> None:
    asked = request(run, DataSpec("digits", "test", 4))
    assert evaluate(asked).artifact.overlap == 0
    assert said(asked) == []


def test_where_the_samples_are_not_known_nothing_is_claimed(run: Path, tmp_path: Path) -> None:
    """A calibration of an earlier version, and a bundle away from its run folder."""
    folder = RunFolder(run)
    before = folder.read(Calibration)
    folder.write(before.model_copy(update={"sample_digests": None}))
    assert evaluate(request(run, SOME, bundle=True)).artifact.overlap is None
    asked = replace(request(run, SOME, bundle=True), run=tmp_path / "elsewhere")
    assert evaluate(asked).artifact.overlap is None
    assert said(asked) == []
    folder.write(before.model_copy(update={"data": before.data.model_copy(update={"seed": 9})}))  # of something else
    assert evaluate(request(run, SOME, bundle=True, fresh=True)).artifact.overlap is None


def test_a_digest_is_of_what_the_model_is_shown() -> None:
    red = Image.new("RGB", (4, 3), "red")
    sample = Sample("a", (red,), "What?", "red", "color")
    assert sample_digest(sample) == sample_digest(replace(sample, id="b", answer="Red", task="other"))
    others = [
        replace(sample, question="What "),
        replace(sample, images=(red, red)),
        replace(sample, images=()),
        replace(sample, images=(Image.new("RGB", (3, 4), "red"),)),
        replace(sample, images=(Image.new("RGB", (4, 3), (254, 0, 0)),)),
    ]
    digests = [sample_digest(other) for other in [sample, *others]]
    assert len(set(digests)) == len(digests)
    assert overlap([*digests, digests[0]], digests[:2]) == 3


@pytest.mark.parametrize("source", ["digits", *PRESETS])
def test_defaults_never_evaluate_what_was_calibrated_on(source: str) -> None:
    columns = (None, None, None)
    calibrated = options.calibration_data("m", source, None, None, 0, columns)
    evaluated = options.evaluation_data("m", source, None, None, 0, columns)
    assert None not in (calibrated.split, evaluated.split)
    assert calibrated.split != evaluated.split
