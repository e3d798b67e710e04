"""Work beside a block: its result, its errors, and that no thread outlives the block."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from modes_cli.errors import WriteFailed
from modes_cli.export import bundle as exporter
from modes_cli.export import export_bundle, weights
from modes_cli.export.beside import Check, beside, raise_failure
from modes_cli.requests import ExportRequest
from modes_cli.safetensors_header import read_header
from tests.export.bundles import make_checkpoint, make_run


def test_both_run_at_the_same_time() -> None:
    here, there = threading.Event(), threading.Event()

    def work(_: Check) -> int:
        there.set()
        assert here.wait(60)
        return 7

    with beside(work) as future:
        assert there.wait(60)
        raise_failure(future)  # it has not ended, so it has not failed
        here.set()
    assert future.result() == 7


def test_an_error_of_the_work_leaves_the_block() -> None:
    def work(_: Check) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"), beside(work):
        pass
    reached = []

    def block() -> None:
        with beside(work) as future:
            future.exception(60)
            raise_failure(future)
            reached.append("the end")

    with pytest.raises(OSError, match="no space"):
        block()
    assert not reached


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_ends_the_work(kind: type[BaseException]) -> None:
    ended = threading.Event()

    def work(check: Check) -> None:
        try:
            while True:
                check()
        finally:
            ended.set()

    with pytest.raises(kind), beside(work):
        raise kind
    assert ended.is_set()


def test_a_disk_that_is_full_while_graphs_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export ends after the graph at hand, with what the system said, and leaves nothing."""
    run = make_run(tmp_path / "run", make_checkpoint(tmp_path / "checkpoint"))
    full, saved = threading.Event(), list[str]()

    def write(*_: object, **__: object) -> None:
        full.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    def graphs(_: object) -> dict[str, Callable[[], bool]]:
        return {name: lambda: full.wait(60) for name in ("embedding.onnx", "vision.onnx")}

    def save(traced: bool, path: Path, _: object) -> None:
        assert traced
        saved.append(path.name)
        path.touch()

    monkeypatch.setattr(weights, "write_weights", write)
    monkeypatch.setattr(exporter, "_graphs", graphs)
    monkeypatch.setattr(exporter, "_save", save)
    with pytest.raises(WriteFailed, match="No space left"):
        export_bundle(ExportRequest(run=run))
    assert saved[:1] == ["embedding.onnx"]
    assert sorted(path.name for path in run.iterdir()) == ["calibration.json", "thresholds.json"]


def test_weights_are_narrowed_beside_a_trace(tmp_path: Path) -> None:
    """What tracing switches on (fake tensors, proxies) is switched on in its own thread only."""
    wide = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    save_file({"w": wide}, tmp_path / "in.safetensors")
    targets = weights.plan({"w": (64, 64)}, read_header(tmp_path / "in.safetensors").tensors, "bfloat16")
    traced, runs, out = threading.Event(), [], tmp_path / "out"
    out.mkdir()

    def work(check: Check) -> None:
        while not (traced.is_set() and runs):
            written = weights.write_weights(out, targets, check=check)
            runs.append(torch.equal(load_file(out / written[0].path)["w"], wide.bfloat16()))

    with beside(work):
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        with mode:
            module, example = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(20))), torch.zeros(2, 8)
        program = torch.export.export(module, (example,), strict=False)
        traced.set()
    assert len([node for node in program.graph.nodes if "linear" in str(node.target)]) == 20
    assert all(runs)
