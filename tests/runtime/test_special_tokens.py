"""`--special skip`: special tokens are text, from the calibration to the bundle, in ONNX Runtime and in PyTorch alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modes_cli.artifacts import Calibration
from modes_cli.calibration import calibrate
from modes_cli.errors import BadArtifact, BadOption, StaleArtifact
from modes_cli.export import export_bundle
from modes_cli.models.groups import SPECIAL, TokenGroups
from modes_cli.requests import CalibrateRequest, ExportRequest, ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import open_model
from modes_cli.search import find_thresholds
from modes_cli.search.calibrated import model_spec
from tests.checkpoints import small_samples
from tests.once import once
from tests.runs import calibration_request, search_request

EVERYTHING = {"text": 1e9, "vision": 1e9}


def request(checkpoint: Path, run: Path, special: str) -> CalibrateRequest:
    made = calibration_request(checkpoint, run, samples=4, batch_size=2)
    return replace(made, model=replace(made.model, special=special))


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated, searched and exported with special tokens as text."""

    def make(folder: Path) -> None:
        calibrate(request(tiny_checkpoint, folder, "skip"))
        find_thresholds(search_request(folder, 0.97, policy="dmt", passes=4))
        export_bundle(ExportRequest(folder))

    return once(tmp_path_factory.getbasetemp(), "special-run", make)


def test_the_calibration_counts_them_as_text_and_says_so(run: Path, tiny_checkpoint: Path) -> None:
    found = RunFolder(run).read(Calibration)
    assert found.options["special"] == "skip"
    assert found.tokens["special"] == 0
    assert found.tokens["text"] > 0
    assert model_spec(found, "cpu", False).special == "skip"
    with pytest.raises(StaleArtifact, match=r"options\.special"):
        calibrate(request(tiny_checkpoint, run, "keep"))
    for wrong in (None, True):
        other = found.model_copy(update={"options": {**found.options, "special": wrong}})
        with pytest.raises(BadArtifact, match=r"options\.special"):
            model_spec(other, "cpu", False)


def test_no_token_keeps_its_experts_in_either_runtime(run: Path) -> None:
    samples = small_samples(2)
    images, questions = [list(s.images) for s in samples], [s.question for s in samples]
    ort = OrtModel(run / "bundle", threads=1)
    bundled = open_model(ModelSpec(str(run / "bundle"), device="cpu"), None)
    assert ort.bundle.special_token_ids == []
    assert ort.tokens == bundled.loaded.tokens == TokenGroups(ort.tokens.vision_ids, ())
    found = {}
    for tau in (EVERYTHING, None):
        answers = [model.generate(images, questions, 3, tau) for model in (ort, bundled)]
        assert torch.equal(answers[0].counts.total, answers[1].counts.total)
        assert torch.equal(answers[0].counts.kept, answers[1].counts.kept)
        assert answers[0].tokens == answers[1].tokens
        assert int(answers[0].counts.total[..., SPECIAL].sum()) == 0
        found[tau is None] = answers[0].skip_ratio["all"]
    assert found == {False: 1.0, True: pytest.approx(0.97, abs=0.03)}


def test_the_runs_own_model_skips_them_too(run: Path, tiny_checkpoint: Path) -> None:
    opened = open_model(ModelSpec(str(tiny_checkpoint), device="cpu"), run)
    assert opened.loaded.tokens.special_ids == ()
    samples = small_samples(1)
    answers = opened.generate([list(samples[0].images)], [samples[0].question], 2, EVERYTHING)
    opened.engine.remove()
    assert answers.skip_ratio["all"] == 1.0


def test_anything_else_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="`sometimes`"):
        calibrate(request(tiny_checkpoint, tmp_path, "sometimes"))
