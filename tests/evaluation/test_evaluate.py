"""Accuracy, full and skipped, through PyTorch and through a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadOption, MissingArtifact, StaleArtifact
from modes_cli.evaluation import evaluate
from modes_cli.evaluation.answering import is_right
from modes_cli.requests import EvaluateRequest
from tests.pipeline import prepared_run

DATA = DataSpec("digits", "test", 12)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, one_thread: None) -> Path:
    return Path(shutil.copytree(prepared_run(tmp_path_factory.getbasetemp())[1], tmp_path / "run"))


def request(run: Path, *, bundle: bool = False, target: float | None = 0.6, **more: object) -> EvaluateRequest:
    folder = run / "bundle" if bundle else None
    return EvaluateRequest(DATA, run, folder, target, 5, 6, "cpu", **more)  # type: ignore[arg-type]


def test_both_runtimes_give_the_same_answers_and_ratios(run: Path) -> None:
    torch = evaluate(request(run)).artifact
    ort = evaluate(request(run, bundle=True, fresh=True)).artifact

    assert (torch.runtime, ort.runtime) == ("torch", "ort")
    for key in ("full", "skipped", "retained", "per_task", "changed"):
        assert getattr(torch, key) == getattr(ort, key)
    assert torch.skip_ratio.keys() == ort.skip_ratio.keys() == {"all", "text", "vision", "decode"}
    for group, share in torch.skip_ratio.items():
        assert share == pytest.approx(ort.skip_ratio[group], abs=0.01)
    assert torch.skip_ratio["all"] > 0.4


def test_counts_agree_with_their_parts(run: Path) -> None:
    artifact = evaluate(request(run)).artifact
    assert sum(task.samples for task in artifact.per_task.values()) == 12
    assert artifact.full == pytest.approx(sum(t.full * t.samples for t in artifact.per_task.values()) / 12)
    assert artifact.skipped == pytest.approx(sum(t.skipped * t.samples for t in artifact.per_task.values()) / 12)
    assert artifact.policies == {"dmt": artifact.skipped}
    for change in artifact.changed:
        assert change.full != change.skipped


def test_is_reused_and_refused_when_it_is_of_something_else(run: Path) -> None:
    evaluate(request(run))
    assert evaluate(request(run)).reused
    with pytest.raises(StaleArtifact, match="target") as caught:
        evaluate(request(run, target=0.3))
    assert "--fresh" in (caught.value.hint or "")
    assert not evaluate(request(run, target=0.3, fresh=True)).reused


def test_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"0\.45"):
        evaluate(request(run, target=0.45))
    with pytest.raises(BadOption, match=r"0\.45"):
        evaluate(request(run, bundle=True, target=0.45))
    with pytest.raises(BadOption, match="no bundle"):
        evaluate(EvaluateRequest(DATA, run, tmp_path))
    with pytest.raises(MissingArtifact):
        evaluate(EvaluateRequest(DATA, tmp_path / "nothing"))


@pytest.mark.parametrize(("given", "wanted", "right"), [(" Top  Left", "top left", True), ("7", "8", False), ("", "no", False)])
def test_exact_match_forgives_case_and_white_space_only(given: str, wanted: str, right: bool) -> None:
    assert is_right(given, wanted) is right
