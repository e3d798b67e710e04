"""Every long step, stopped again and again: nothing is measured twice, and the result has the bytes of an undisturbed run."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modes_cli import unfinished
from modes_cli.data.sample import DataSpec
from modes_cli.evaluation import evaluate
from modes_cli.export import export_bundle, weights
from modes_cli.export.unfinished import LIST, UnfinishedBundle, folder_of
from modes_cli.models import profiling
from modes_cli.models.profiling import profile_model
from modes_cli.requests import EvaluateRequest, ExportRequest, ModelSpec, ProfileRequest
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.torch_model import TorchRuntime
from modes_cli.search import find_thresholds, objective
from tests.cli.process import content
from tests.export.bundles import shared_bundle
from tests.once import once
from tests.pipeline import prepared_run
from tests.runs import calibration_request, search_request

MOST = 12  # times a step is stopped


class Stopped(BaseException):
    """Not an error that anybody may handle."""


class Work:
    """Counts pieces of work, and stops when as many are done as one run may do."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self.done, self._left = patch, 0, -1

    def counts(self, owner: Any, name: str, *, after: bool = False) -> None:
        """Each call of `owner.name` is one; it stops before the next one, or `after` it."""
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._left == 0 and not after:
                raise Stopped
            found = original(*args, **kwargs)
            self.done += 1
            self._left -= 1
            if self._left == 0 and after:
                raise Stopped
            return found

        self._patch.setattr(owner, name, counted)

    def one_run_of(self, pieces: int, step: Callable[[], object]) -> None:
        """Run until it is stopped."""
        self._left = pieces
        with pytest.raises(Stopped):
            step()
        self._left, self.done = -1, 0

    def in_runs_of(self, pieces: int, step: Callable[[], object], between: Callable[[], object] = lambda: None) -> int:
        """How often the step was stopped before it ended."""
        for stopped in range(MOST):
            self._left = pieces
            try:
                step()
                self._left = -1
                return stopped
            except Stopped:
                between()
        raise AssertionError(f"not done after {MOST} runs")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Work:
    monkeypatch.setattr(unfinished, "INTERVAL", 0.0)
    return Work(monkeypatch)


def untimed(folder: Path) -> dict[str, Any]:
    """A run folder but for measured seconds."""

    def without(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in tree.items() if not name.endswith("seconds")}

    found = content(folder)
    return {
        name: json.loads(data, object_hook=without) if name in ("profile.json", "evaluation.json") else data
        for name, data in found.items()
    }


def test_profile(work: Work, tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = DataSpec("digits", "validation", 7)

    def step(run: str) -> Any:
        return profile_model(ProfileRequest(ModelSpec(str(tiny_checkpoint), device="cpu"), data, tmp_path / run, 2)).artifact

    step("whole")
    work.counts(profiling._Observer, "see")
    assert work.in_runs_of(1, lambda: step("parts")) == 3
    assert work.done == 4  # batches
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    assert all(layer.seconds > 0 for layer in step("parts").layers)


@pytest.fixture(scope="module")
def searched(tiny_checkpoint: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the tiny model: five batches, the last a small one, and two targets."""
    from modes_cli.calibration import calibrate

    def make(run: Path) -> None:
        calibrate(calibration_request(tiny_checkpoint, run, samples=9, batch_size=2))
        find_thresholds(search_request(run, 0.3, 0.5, policy="modes", passes=6))

    return once(tmp_path_factory.getbasetemp(), "continued-run", make)


def test_search(work: Work, searched: Path, tmp_path: Path) -> None:
    """Stopped inside passes, while scores are counted, between targets, and in the price list."""

    def step(run: str) -> None:
        find_thresholds(search_request(tmp_path / run, 0.3, 0.6, policy="norm", passes=5, frontier=True))

    for run in ("whole", "parts"):
        shutil.copytree(searched, tmp_path / run)
        (tmp_path / run / "thresholds.json").unlink()
    work.counts(objective, "answer_logits")
    step("whole")
    batches, work.done = work.done, 0
    assert batches > 100
    assert work.in_runs_of(batches // 4 + 1, lambda: step("parts")) == 3
    assert work.done == batches
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_passes_of_another_calibration_are_not_used(work: Work, searched: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from modes_cli.calibration import calibrate

    run = Path(shutil.copytree(searched, tmp_path / "run"))
    (run / "thresholds.json").unlink()

    def step(run: Path) -> None:
        find_thresholds(search_request(run, 0.3, policy="modes", passes=6))

    work.counts(objective, "answer_logits")
    work.one_run_of(7, lambda: step(run))
    for where in (run, tmp_path / "whole"):
        calibrate(calibration_request(tiny_checkpoint, where, samples=9, batch_size=2, seed=1, fresh=True))
        step(where)
    assert content(run) == content(tmp_path / "whole")


@pytest.mark.parametrize("policies", [(), ("topk", "predicted")], ids=["plain", "policies"])
def test_evaluate(work: Work, searched: Path, tmp_path: Path, policies: tuple[str, ...]) -> None:
    def step(run: str) -> None:
        request = EvaluateRequest(DataSpec("digits", "test", 5), tmp_path / run, None, 0.5, 2, 3, "cpu", policies=policies)
        evaluate(request)

    for run in ("whole", "parts"):
        shutil.copytree(searched, tmp_path / run)
    work.counts(TorchRuntime, "answer")
    if policies:
        work.counts(objective, "answer_logits")
    step("whole")
    pieces, work.done = work.done, 0
    assert pieces == 6 or policies
    assert work.in_runs_of((pieces + 2) // 3, lambda: step("parts")) == 2
    assert work.done == pieces
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


def test_evaluate_a_bundle(work: Work, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    prepared = prepared_run(tmp_path_factory.getbasetemp())[1]

    def step(run: str) -> None:
        evaluate(EvaluateRequest(DataSpec("digits", "test", 5), tmp_path / run, prepared / "bundle", None, 2, 3, "cpu"))

    step("whole")
    work.counts(OrtModel, "generate")
    assert work.in_runs_of(4, lambda: step("parts")) == 1
    assert work.done == 6  # three batches in two ways
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


# -- export -----------------------------------------------------------------------------------------------------------


def test_export_with_graphs(work: Work, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The weights and two graphs by the first two runs; the last one finds all four files."""
    whole = shared_bundle(tmp_path_factory.getbasetemp())
    request = ExportRequest(whole.parent, tmp_path / "bundle")
    work.counts(UnfinishedBundle, "finished", after=True)
    assert work.in_runs_of(2, lambda: export_bundle(request)) == 2
    assert work.done == 4
    assert content(tmp_path) == {f"bundle/{name}": data for name, data in content(whole).items()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("write_weights", "places"):
        monkeypatch.setattr(weights, name, functools.partial(getattr(weights, name), limit=100_000))


def test_export_of_many_shards(
    work: Work, small_shards: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What was written stays the same file; a damaged one, a half one and one that nobody knows are not taken over."""
    run = shared_bundle(tmp_path_factory.getbasetemp()).parent
    request = ExportRequest(run, tmp_path / "parts", format="safetensors")
    export_bundle(ExportRequest(run, tmp_path / "whole", format="safetensors"))
    inodes: dict[str, int] = {}
    halves = folder_of(tmp_path / "parts")

    def between() -> None:
        inodes.update({path.name: path.stat().st_ino for path in halves.glob("model-*.safetensors")})
        if len(inodes) == 3:
            damaged = sorted(halves.glob("model-*.safetensors"))[1]
            raw = bytearray(damaged.read_bytes())
            raw[-1] ^= 1
            damaged.write_bytes(raw)
            inodes.pop(damaged.name)
            (halves / "model-00004-of-00018.safetensors").write_bytes(b"half")
            (halves / "stranger").mkdir()

    work.counts(UnfinishedBundle, "finished", after=True)
    stopped = work.in_runs_of(3, lambda: export_bundle(request), between)
    shards = sorted(path.name for path in (tmp_path / "whole").glob("model-*.safetensors"))
    assert (len(shards) > 5, stopped > 1) == (True, True)
    assert work.done == len(shards) + 1  # the damaged one twice
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    kept = {name: (tmp_path / "parts" / name).stat().st_ino for name in inodes}
    assert kept == inodes


@pytest.mark.parametrize("change", ["target", "fresh", "list"])
def test_files_of_another_export_are_not_used(
    work: Work, small_shards: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, change: str
) -> None:
    run, output = shared_bundle(tmp_path_factory.getbasetemp()).parent, tmp_path / "bundle"
    work.counts(UnfinishedBundle, "finished", after=True)
    work.one_run_of(2, lambda: export_bundle(ExportRequest(run, output, format="safetensors")))
    assert not output.exists()
    listed = folder_of(output) / LIST
    if change == "list":
        listed.write_text(listed.read_text()[:-9])
    targets = sorted(one["target"] for one in json.loads((run / "thresholds.json").read_text())["results"])
    other = targets[0] if change == "target" else None
    export_bundle(ExportRequest(run, output, other, format="safetensors", fresh=change == "fresh"))
    assert work.done == len(list(output.glob("model-*.safetensors")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_short_export_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, one_thread: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = shared_bundle(tmp_path_factory.getbasetemp()).parent
    work = Work(monkeypatch)
    work.counts(UnfinishedBundle, "finished", after=True)
    work.one_run_of(1, lambda: export_bundle(ExportRequest(run, tmp_path / "bundle", format="safetensors")))
    assert list(tmp_path.iterdir()) == []
