"""What `modes bench` writes; the times themselves belong to benchmarks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from modes_cli.artifacts.bench import Machine
from modes_cli.benchmark import bench
from modes_cli.benchmark.cost import Cost
from modes_cli.commands.bench import tables
from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadOption, MissingArtifact
from modes_cli.requests import BenchRequest
from tests.pipeline import prepared_run

MACHINE = Machine(cpu="x", threads=1, device="cpu", peak_flops=1e9, read_bandwidth=1e9)


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, one_thread: None) -> Path:
    return Path(shutil.copytree(prepared_run(tmp_path_factory.getbasetemp())[1], tmp_path / "run"))


def test_every_runtime_in_both_phases_full_and_skipped(run: Path) -> None:
    artifact = bench(BenchRequest(DataSpec("digits", "test", 2), run, batches=(1, 2), repeats=2)).artifact

    seen = {(case.phase, case.batch, case.runtime) for case in artifact.cases}
    runtimes = ("transformers", "transformers+modes", "onnxruntime", "onnxruntime+modes")
    assert seen == {(phase, batch, name) for phase in ("prefill", "decode") for batch in (1, 2) for name in runtimes}
    for case in artifact.cases:
        assert case.seconds > 0
        assert case.limit_fraction > 0
        assert (case.skip_ratio > 0) == case.runtime.endswith("+modes")
        if case.runtime == "transformers":
            assert case.speedup == 1.0
    both = {case.phase: case.skip_ratio for case in artifact.cases if case.runtime == "transformers+modes" and case.batch == 1}
    ort = {case.phase: case.skip_ratio for case in artifact.cases if case.runtime == "onnxruntime+modes" and case.batch == 1}
    assert both == pytest.approx(ort, abs=0.02)


def test_needs_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"bundle\.json"):
        bench(BenchRequest(DataSpec("digits", "test", 2), tmp_path))


def test_the_limit_is_arithmetic_or_reading_whichever_is_longer() -> None:
    cost = Cost(dense=900, head=100, expert=100, experts=8, layers=2, top_k=2, bytes_per_parameter=4)
    one = cost.limit(1, 0.0, MACHINE, logits=1)
    hit = 8 * (1 - (7 / 8) ** 2)  # distinct experts of two random pairs
    assert one == pytest.approx(4 * (1000 + 2 * hit * 100) / 1e9)
    assert cost.limit(1, 0.0, MACHINE, logits=1, cached=500) == pytest.approx(one + 500 / 1e9)
    many = cost.limit(10_000, 0.0, MACHINE, logits=10)
    assert many == pytest.approx(2 * (10_000 * 900 + 10 * 100 + 2 * 20_000 * 100) / 1e9)
    assert cost.limit(1, 1.0, MACHINE, logits=1) == pytest.approx(4 * 1000 / 1e9)
    half = cost.limit(10_000, 0.5, MACHINE, logits=10)
    assert math.isclose(half, 2 * (10_000 * 900 + 10 * 100 + 2 * 10_000 * 100) / 1e9)


def test_a_bundle_alone_against_stock_operators_and_transformers(run: Path, tmp_path: Path) -> None:
    """Neither calibration nor thresholds of a run folder are needed, and every runtime has as many threads."""
    bundle = Path(shutil.move(run / "bundle", tmp_path / "bundle"))
    shutil.rmtree(run)
    request = BenchRequest(DataSpec("digits", "test", 2), tmp_path / "elsewhere", bundle, 0.3, batches=(1,), repeats=2)
    artifact = bench(request).artifact

    by_name = {(case.phase, case.runtime): case for case in artifact.cases}
    names = ("transformers", "transformers+modes", "onnxruntime", "onnxruntime+modes", "onnxruntime MoE")
    assert set(by_name) == {(phase, name) for phase in ("prefill", "decode") for name in names}
    assert artifact.options["target"] == 0.3  # one of the bundle's points that is not its own
    assert artifact.options["stock"] is True
    for phase in ("prefill", "decode"):
        stock = by_name[phase, "onnxruntime MoE"]
        assert (stock.skip_ratio, stock.over_stock) == (0, 1.0)
        ours = by_name[phase, "onnxruntime+modes"]
        assert ours.over_stock == pytest.approx(stock.seconds / ours.seconds)
        assert ours.skip_ratio == pytest.approx(by_name[phase, "transformers+modes"].skip_ratio, abs=0.02)
    assert 0.15 < by_name["prefill", "onnxruntime+modes"].skip_ratio < 0.45
    assert any(note.startswith("stock operators, batch 1: logits within") for note in artifact.notes)
    shown = [line for line in map(str, tables(artifact)) if line.startswith("note: ")]
    assert len(shown) == len(artifact.notes)


def test_stock_operators_are_of_the_cpu(run: Path, tmp_path: Path) -> None:
    request = BenchRequest(DataSpec("digits", "test", 2), tmp_path, run / "bundle", device="cuda")
    with pytest.raises(BadOption, match="compared on the CPU"):
        bench(request)
    with pytest.raises(BadOption, match="no point for target"):
        bench(BenchRequest(DataSpec("digits", "test", 2), tmp_path, run / "bundle", 0.99, device="cpu"))
