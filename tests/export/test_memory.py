"""Holes of a checkpoint become holes of the bundle, and an export holds little of the weights at any time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file

from modes_cli import files
from modes_cli.errors import BadArtifact
from modes_cli.export import sparse, weights
from modes_cli.export.integrity import check_for_loading
from modes_cli.requests import ModelSpec
from modes_cli.safetensors_header import Entry, read_header
from tests.checkpoints import _moe, _multimodal, _text
from tests.sparse_checkpoint import qwen3_vl_30b_a3b, write_run, write_sparse

MB, GB = 10**6, 10**9


def sparse_file(path: Path, shape: tuple[int, ...], written: dict[int, bytes]) -> Entry:
    """One float32 tensor; all but the bytes `written` at these offsets is a hole."""
    length = 4 * int(np.prod(shape))
    head = json.dumps({"w": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, length]}}).encode()
    head += b" " * (-(8 + len(head)) % 4096)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + length)
        for offset, data in written.items():
            file.seek(8 + len(head) + offset)
            file.write(data)
    return read_header(path).tensors["w"]


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("places", [(), (0,), (5 << 20,), ((32 << 20) - 8,), (0, 9 << 20, 31 << 20)])
def test_holes_stay_holes_and_values_stay(tmp_path: Path, places: tuple[int, ...], dtype: str) -> None:
    values = np.array([1.5, -2.0], np.float32).tobytes()
    entry = sparse_file(tmp_path / "in.safetensors", (4096, 2048), dict.fromkeys(places, values))
    targets = weights.plan({"w": entry.shape}, {"w": entry}, dtype)
    assert weights.stored_bytes(targets) == (targets[0].bytes if places else 0)
    (tmp_path / "out").mkdir()
    written = weights.write_weights(tmp_path / "out", targets)
    path = tmp_path / "out" / written[0].path
    expected = load_file(tmp_path / "in.safetensors")["w"].to(getattr(torch, dtype))
    assert torch.equal(load_file(path)["w"], expected)
    assert int(expected.count_nonzero()) == 2 * len(places)
    assert (written[0].bytes, written[0].sha256) == (path.stat().st_size, files.sha256(path))
    # At most the pieces that something was written in, each up to where the next hole begins.
    assert taken(path) <= 4096 + len(places) * sparse.PIECE
    if not places:
        assert taken(path) < 1 << 16


def test_transposed_experts_that_are_holes(tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.experts.down_proj", (4, 256, 512)  # in the file; 512 KiB an expert
    matrix = np.arange(256 * 512, dtype=np.float32).reshape(256, 512)
    entry = sparse_file(tmp_path / "in.safetensors", shape, {2 * matrix.nbytes: matrix.tobytes()})
    targets = weights.plan({name: (4, 512, 256)}, {name: entry}, "float32")
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / weights.write_weights(tmp_path / "out", targets)[0].path
    found = load_file(path)[name]
    assert np.array_equal(found[2].numpy(), matrix.T)
    assert int(found.count_nonzero()) == matrix.size - 1
    assert taken(path) < 2 * matrix.nbytes


def test_a_file_that_became_shorter_is_no_hole(tmp_path: Path) -> None:
    entry = sparse_file(tmp_path / "in.safetensors", (4096, 2048), {})
    os.truncate(entry.file, entry.start + entry.length // 2)
    with pytest.raises(BadArtifact, match="became shorter"):
        list(sparse.pieces(entry))


def export(run: Path) -> tuple[dict[str, Any], int, float]:
    """What `modes export --json` says, the most memory its process held (bytes), and its processor time (seconds)."""
    command = [sys.executable, "-m", "modes_cli", "export", "--run", str(run), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        said, complained = child.stdout.read(), child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, complained.decode()
    return json.loads(said), usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def test_an_export_holds_pieces_of_the_weights(tmp_path: Path) -> None:
    """A layer's experts are 200 MB here, the model 0.4 GB: the process may hold half of it beside its libraries."""
    text = {**_text(), **_moe(), "num_hidden_layers": 2, "hidden_size": 1024, "moe_intermediate_size": 1024}
    sizes = _multimodal({**text, "mlp_only_layers": []})
    sizes["vision_config"]["out_hidden_size"] = 1024
    config = transformers.Qwen3VLMoeConfig(**sizes)
    checkpoint = write_sparse(tmp_path / "checkpoint", config, lambda _, shape: np.zeros(shape, np.float32), dtype="F32")
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert min(size, sum(taken(path) for path in checkpoint.glob("*.safetensors"))) > 400 * MB  # zeros, but no holes
    run = write_run(tmp_path / "run", checkpoint, [0, 1], 16, 4)
    done = subprocess.run([sys.executable, "-c", EXPORT, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    check_for_loading(run / "bundle")
    assert sum(path.stat().st_size for path in (run / "bundle").glob("model-*.safetensors")) > 400 * MB
    assert after - before < 200 * MB


EXPORT = """
import json, sys
from pathlib import Path
import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe
from modes_cli.export import export_bundle
from modes_cli.export.bundle import peak_rss
from modes_cli.requests import ExportRequest
before = peak_rss()
print(json.dumps([before, export_bundle(ExportRequest(Path(sys.argv[1]), format="safetensors")).peak_rss]))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("MODES_TEST_LARGE"), reason="takes minutes; MODES_TEST_LARGE=1 runs it")
def test_the_bundle_of_qwen3_vl_30b(tmp_path: Path) -> None:
    """62 GB of weights that are holes: every graph, header and digest of the real sizes, in less than 2 GB of memory."""
    checkpoint = write_sparse(tmp_path / "checkpoint", qwen3_vl_30b_a3b())
    run = write_run(tmp_path / "run", checkpoint, list(range(48)), 128, 8)
    began = time.perf_counter()
    said, peak, seconds = export(run)
    print(f"{time.perf_counter() - began:.0f} s, {seconds:.0f} s of processor time, {peak / MB:.0f} MB")
    assert peak < 2 * GB
    # Processor time of both threads: how long it takes depends on what else runs. One traces 2914 nodes, the other one digests
    # 62 GB of zeros.
    assert seconds < 300
    bundle = Path(said["bundle"])
    shards = sorted(bundle.glob("model-*.safetensors"))
    assert sum(path.stat().st_size for path in shards) > 62 * GB
    assert sum(taken(path) for path in shards) < 100 * MB
    held = {name: entry for path in shards for name, entry in read_header(path).tensors.items()}
    assert held["model.language_model.layers.47.mlp.experts.gate_up_proj"].shape == (128, 2 * 768, 2048)
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "SkipExperts"]
    assert len(nodes) == 48
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            entry = held[tensor.name]
            assert (place["location"], int(place["offset"])) == (entry.file.name, entry.start)
            assert (int(place["length"]), tuple(tensor.dims)) == (entry.length, entry.shape)
    assert sum(path.stat().st_size for path in bundle.glob("*.onnx")) < 16 * MB
    assert ModelSpec(str(checkpoint)).id == json.loads((bundle / "bundle.json").read_text())["model"]["id"]
