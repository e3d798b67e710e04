"""Bundles with quantised experts, by command lines from hub-layout checkpoints: ONNX Runtime against PyTorch with the weights
that come back, in both layouts; and what is refused.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from modes_cli.artifacts import Calibration
from modes_cli.calibration import calibrate
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.errors import BadArtifact, BadOption, KernelError, StaleArtifact
from modes_cli.export import export_bundle, packing
from modes_cli.export.integrity import check_for_loading
from modes_cli.export.verify import verify_bundle
from modes_cli.export.weights import Recoded, Target
from modes_cli.models.loading import load
from modes_cli.models.quantization import SCHEMES, WEIGHTS, dequantise, quantise
from modes_cli.requests import CalibrateRequest, ExportRequest, ModelSpec
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.providers import CPU, CUDA
from modes_cli.runtime.session import open_graph
from modes_cli.runtime.torch_model import TorchRuntime, open_model
from modes_cli.search.calibrated import quantization
from tests.checkpoint_internvl import write_internvl
from tests.checkpoints import small_samples
from tests.export.bundles import read, relist
from tests.export.test_internvl import DATA, ask_torch, commands, feed_ort
from tests.once import once

SHARD = "model-00001-of-00001.safetensors"
# GPT-OSS stores experts transposed and interleaved, with biases; Qwen3 one by one.
KINDS = {"int8": "qwen3_moe", "int4": "gpt_oss"}


@dataclass(frozen=True)
class Made:
    scheme: str
    run: Path
    torch: TorchRuntime
    ort: OrtModel

    @property
    def bundle(self) -> Path:
        return self.run / "bundle"


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Made:
    def make(folder: Path) -> None:
        checkpoint, at = write_internvl(folder / "checkpoint", KINDS[request.param]), ("--run", folder / "run")
        commands(
            ("calibrate", checkpoint, "--quantize", request.param, *DATA, *at),
            ("search", "--target", 0.5, "--policy", "modes", "--no-frontier", *at),
            ("export", "--quantize", request.param, *at),
        )

    folder = once(tmp_path_factory.getbasetemp(), f"quantised-{request.param}", make)
    model = open_model(ModelSpec(str(folder / "checkpoint"), device="cpu"), folder / "run")
    return Made(request.param, folder / "run", model, OrtModel(folder / "run" / "bundle", "cpu", 1))


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundle, tmp_path / "bundle"))


def test_verifies_and_describes_itself(made: Made) -> None:
    checks = verify_bundle(made.bundle)
    assert [check for check in checks if not check.ok] == []
    assert any(f"in {made.scheme}, 32 to a scale" in check.detail for check in checks)
    quantization = read(made.bundle).quantization
    assert quantization is not None
    assert (quantization.scheme, quantization.block) == (made.scheme, 32)


def test_the_same_logits_tokens_and_kept_pairs(made: Made) -> None:
    one, two = small_samples(2)
    asked = [one, Sample("t", (two.images[0].resize((96, 24)),), "Add?", "", "t")]
    tokens, logits, kept = ask_torch(made.torch, made.torch.rule, asked)
    found, prefill = feed_ort(made.ort, asked, tokens, None)
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(prefill, kept[0].numpy())
    assert float(logits.std()) > 0.5  # or the comparison would mean little


def test_the_weights_are_the_checkpoints_quantised(made: Made) -> None:
    """As from_pretrained makes them of the same files, both layouts; all else is as in an unquantised bundle."""
    scheme = SCHEMES[made.scheme]
    loaded = load(ModelSpec(str(made.run.parent / "checkpoint"), device="cpu"))
    stored = load_file(made.bundle / SHARD)
    state = loaded.model.state_dict()
    experts = {f"{block.name}.{name}": block for block in loaded.blocks for name in WEIGHTS}
    assert stored.keys() == state.keys() | {f"{name}_scales" for name in experts}
    for name, tensor in state.items():
        if (block := experts.get(name)) is None:
            assert torch.equal(stored[name], tensor)
            continue
        matrix = tensor.mT if block.transposed else tensor
        values, scales = quantise(matrix, scheme)
        assert torch.equal(stored[name], values)
        assert torch.equal(stored[f"{name}_scales"], scales)
        back = dequantise(values, scales, scheme, matrix.shape[-1])
        ours = made.torch.loaded.model.state_dict()[name]
        assert torch.equal(ours.mT if block.transposed else ours, back)


def test_the_graph_reads_them_in_place(made: Made) -> None:
    graph = onnx.load(str(made.bundle / "decoder.onnx"), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    kind = onnx.TensorProto.INT8 if made.scheme == "int8" else onnx.TensorProto.UINT8
    nodes = [node for node in graph.node if node.op_type == "SkipExperts"]
    assert nodes
    for node in nodes:
        found = [tensors[node.input[at]] for at in (6, 7, 11, 12)]
        assert [tensor.data_type for tensor in found] == [kind, kind, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT16]
        assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in found)
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["block"], attributes["transposed"]) == (32, 0)


def test_the_same_bytes_again(made: Made, tmp_path: Path) -> None:
    assert export_bundle(ExportRequest(run=made.run)).bundle == read(made.bundle)  # there already
    again = export_bundle(ExportRequest(run=made.run, output=tmp_path / "again", format="safetensors")).bundle
    digests = {file.path: file.sha256 for file in read(made.bundle).files}
    assert {file.path: file.sha256 for file in again.files}.items() <= digests.items()


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_thresholds_of_other_weights(made: Made) -> None:
    other = next(scheme for scheme in SCHEMES if scheme != made.scheme)
    with pytest.raises(BadOption, match=f"`--quantize {other}`.* on experts in {made.scheme}"):
        export_bundle(ExportRequest(run=made.run, quantize=other))
    data = DataSpec("digits", "validation", 4, 0)
    for quantize in (other, None):
        spec = ModelSpec(str(made.run.parent / "checkpoint"), device="cpu", quantize=quantize)
        with pytest.raises(StaleArtifact, match=r"options\.quantize"):
            calibrate(CalibrateRequest(spec, data, made.run, 2))


def test_a_calibration_with_an_unknown_scheme(made: Made, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(made.run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle"))))
    calibration = run.read(Calibration)
    with pytest.raises(BadArtifact, match=r"options\.quantize.*`int3`"):
        quantization(calibration.model_copy(update={"options": {**calibration.options, "quantize": "int3"}}))


def test_runtimes_that_cannot(made: Made) -> None:
    with pytest.raises(BadOption, match=f"{made.scheme}, which transformers cannot load"):
        open_model(ModelSpec(str(made.bundle), device="cpu"), None)
    if CUDA in ort.get_available_providers():
        with pytest.raises(KernelError, match=f"{made.scheme} are not on CUDA yet"):
            open_graph(made.bundle, read(made.bundle), "decoder.onnx", [CUDA, CPU])


def _fails(bundle: Path, *words: str) -> None:
    failed = [check for check in verify_bundle(bundle) if not check.ok]
    assert any(all(word in check.detail for word in words) for check in failed), failed
    assert not any(check.name == "session" for check in failed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_makes_no_sense(copy: Path, value: float) -> None:
    stored = load_file(copy / SHARD)
    name = next(name for name in stored if name.endswith("down_proj_scales"))
    stored[name][1, 2, 0] = value
    save_file(stored, copy / SHARD, {"format": "pt"})
    relist(copy, SHARD)
    _fails(copy, name, f"a scale is `{value}`")


def test_scales_that_are_missing_or_do_not_fit(copy: Path) -> None:
    stored = load_file(copy / SHARD)
    name = next(name for name in stored if name.endswith("down_proj_scales"))
    for changed in ({}, {name: stored[name][:, 1:].contiguous()}, {name: stored[name].float()}):
        save_file({key: value for key, value in stored.items() if key != name} | changed, copy / SHARD, {"format": "pt"})
        relist(copy, SHARD)
        with pytest.raises(BadArtifact, match="down_proj"):
            check_for_loading(copy)


def test_bundle_json_that_says_something_else(copy: Path, made: Made) -> None:
    tree = json.loads((copy / "bundle.json").read_text())
    other = next(scheme for scheme in SCHEMES if scheme != made.scheme)
    for said in (None, {"scheme": other, "block": 32}, {"scheme": made.scheme, "block": 64}):
        (copy / "bundle.json").write_text(json.dumps(tree | {"quantization": said}))
        with pytest.raises(BadArtifact):
            check_for_loading(copy)


# -- streaming ------------------------------------------------------------------------------------------------------------


def test_pieces_may_end_anywhere_and_holes_stay_holes() -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, 40, generator=g)
    weights[1] = 0
    raw = weights.numpy().tobytes()
    one = len(raw) // 3
    holes = [packing.Hole(one - 8), packing.Hole(8)]
    pieces = [raw[:100], raw[100:one], *holes, raw[2 * one : 2 * one + 52], raw[2 * one + 52 :]]
    source = Target("w", "F32", (3, 4, 40), ())
    for scheme in SCHEMES.values():
        for target, expected in zip(packing._pair(source, scheme, False), quantise(weights, scheme), strict=True):
            assert isinstance(target.recoded, Recoded)
            found = list(target.recoded.recode(iter(pieces)))
            assert [isinstance(piece, packing.Hole) for piece in found] == [False, True, False]
            joined = b"".join(bytes(len(piece)) if isinstance(piece, packing.Hole) else piece for piece in found)
            assert joined == expected.contiguous().view(torch.uint8).numpy().tobytes()
            assert target.bytes == len(joined)
