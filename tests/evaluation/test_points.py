"""Which of a bundle's points is evaluated: chosen from bundle.json alone, before any graph is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modes_cli.artifacts.bundle import Bundle, OperatingPoint
from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadOption
from modes_cli.evaluation import subject as subjects
from modes_cli.evaluation.subject import subject_of
from modes_cli.export.integrity import read_bundle
from modes_cli.requests import EvaluateRequest
from modes_cli.run_folder import RunFolder
from modes_cli.runtime import ort_model
from tests import examples

# (target, decode target): tau of text
POINTS = {(0.5, None): 0.1, (0.5, 0.4): 0.2, (0.5, 0.6): 0.3, (0.75, 0.6): 0.4, (0.75, 0.7): 0.5, (0.9, None): 0.6}
OWN = (0.75, 0.6)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    points = [
        OperatingPoint(target=target, decode_target=decode, tau={"text": tau}, skip_ratio=target, kl=0.1)
        for (target, decode), tau in POINTS.items()
    ]
    own = {"target": OWN[0], "decode_target": OWN[1], "tau": {"text": POINTS[OWN]}}
    bundle: Bundle = examples.artifact("bundle").model_copy(update={"points": points, **own})
    (tmp_path / "bundle.json").write_text(bundle.model_dump_json())
    monkeypatch.setattr(subjects, "check_for_loading", read_bundle)  # there are no other files
    return tmp_path


def request(folder: Path, target: float | None, decode: float | None) -> EvaluateRequest:
    return EvaluateRequest(DataSpec("digits", "test", 2), folder, folder, target, decode_target=decode)


@pytest.mark.parametrize(
    ("target", "decode", "chosen"),
    [
        (None, None, OWN),
        (0.75, None, OWN),  # not that without a decode target
        (None, 0.6, OWN),
        (0.75, 0.7, (0.75, 0.7)),
        (None, 0.7, (0.75, 0.7)),
        (0.5, None, (0.5, None)),  # the one that was searched without
        (0.5, 0.4, (0.5, 0.4)),
        (0.5, 0.6, (0.5, 0.6)),
        (None, 0.4, (0.5, 0.4)),
        (0.9, None, (0.9, None)),
    ],
)
def test_the_point_of_a_bundle(
    target: float | None,
    decode: float | None,
    chosen: tuple[float, float | None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Any] = []

    class Model:
        def __init__(self, *_: object) -> None: ...

        def generate(self, _images: object, _questions: object, _most: int, tau: object) -> None:
            used.append(tau)

    monkeypatch.setattr(ort_model, "OrtModel", Model)
    subject = subject_of(request(folder, target, decode), RunFolder(folder))
    assert (subject.target, subject.decode_target) == chosen
    subject.open()([], True, 1)
    assert used == [{"text": POINTS[chosen]}]


def test_no_such_point(folder: Path) -> None:
    for target, decode, said in ((0.6, None, "target `0.6`"), (0.9, 0.4, "target `0.9` and decode target `0.4`")):
        with pytest.raises(BadOption, match=f"no point for {said}") as raised:
            subject_of(request(folder, target, decode), RunFolder(folder))
        assert "target `0.75` and decode target `0.7`" in str(raised.value.hint)
    with pytest.raises(BadOption, match=r"no point for decode target `0\.9`"):
        subject_of(request(folder, None, 0.9), RunFolder(folder))
