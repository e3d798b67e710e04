"""decoder-cuda.onnx of the families besides Qwen3-VL-MoE, in float16 on the CPU: InternVL3.5 with both kinds of text model
(GroupQueryAttention, with GPT-OSS's sinks and windows) and Kimi's models (latent attention, as ai.onnx's Attention).
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from modes_cli.export import export_bundle
from modes_cli.export.bundle import _save
from modes_cli.export.decoder import DecoderSpec, export_decoder
from modes_cli.export.integrity import HALF_DECODER, check_for_loading
from modes_cli.export.plan import make_plan
from modes_cli.export.verify import verify_bundle
from modes_cli.requests import ExportRequest
from modes_cli.run_folder import RunFolder
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.providers import CPU, CUDA
from modes_cli.runtime.session import DECODER, decoder_name
from modes_cli.search.calibrated import model_spec
from modes_cli.search.selection import found_in, select
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.registry import from_result
from tests import checkpoint_internvl as internvl
from tests import checkpoint_kimi_k25 as kimi_k25
from tests.checkpoint_kimi_vl import write_kimi_vl
from tests.export.bundles import COLUMNS, make_run
from tests.export.test_grouped import GROUPED, NOTHING, SharedBuffers, real_rows, require_same, steps, tokens, with_graph

NAMES = ("left padding", "with and without")
LAYERS = 2
PROBABILITY = {"text": 0.24, "vision": 0.26}  # below which pairs are skipped; four experts share 1


def alike(*layers: int) -> dict[int, tuple[float, ...]]:
    return dict.fromkeys(layers, (1 / len(layers),) * len(COLUMNS))


def checkpoint(folder: Path, family: str, dtype: torch.dtype) -> tuple[Path, str, dict[int, tuple[float, ...]]]:
    """Its folder, its family, and the same importance for each of its MoE layers."""
    if family == "kimi_vl":
        return write_kimi_vl(folder, dtype=dtype), family, alike(1, 2, 3)
    if family == "kimi_k25":
        return kimi_k25.write_kimi_k25(folder, dtype=dtype, layers=LAYERS), family, alike(1)
    return internvl.write_internvl(folder, family, dtype, LAYERS), "internvl", alike(*range(LAYERS))


def exported(folder: Path, family: str, dtype: torch.dtype) -> Path:
    made, name, shares = checkpoint(folder / "checkpoint", family, dtype)
    counts = (internvl.EXPERTS, internvl.TOP_K) if name == "internvl" else (kimi_k25.EXPERTS, kimi_k25.TOP_K)
    tau = {group: value / len(shares) for group, value in PROBABILITY.items()}
    run = make_run(folder / "run", made, tau, shares, *counts, family=name)
    return export_bundle(ExportRequest(run=run)).path


@pytest.fixture(scope="module", params=[*internvl.TEXTS, "kimi_k25", "kimi_vl"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, exported(tmp_path_factory.mktemp(request.param), request.param, torch.float16)


def test_the_logits_of_the_float32_graph(half: tuple[str, Path]) -> None:
    """Prompts with padding, one that ends, one without images. Nothing is skipped: a score at a threshold may fall to the other
    side, and a router whose logits all but tie may take another expert.
    """
    family, folder = half
    wide, narrow = OrtModel(folder, threads=1), with_graph(folder, HALF_DECODER)
    for name in NAMES:
        expected = steps(wide, name, tau=NOTHING)
        found = steps(narrow, name, tokens(expected), NOTHING)
        for one, other in zip(real_rows(found), real_rows(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=0.1)
            assert np.abs(one - other).mean() < 0.02
        assert any((one.logits != other.logits).any() for one, other in zip(found, expected, strict=True))
        assert expected[0].logits.std() > 0.3
        if family in internvl.TEXTS:  # one buffer for past and present is GroupQueryAttention's
            shared = steps(SharedBuffers(narrow), name, tokens(expected), NOTHING)
            for one, other in zip(real_rows(shared), real_rows(found), strict=True):
                np.testing.assert_array_equal(one, other)
        assert steps(narrow, name, tokens(expected))[0].kept.sum() < found[0].kept.sum()


def test_what_it_is_made_of(half: tuple[str, Path]) -> None:
    family, folder = half
    bundle = check_for_loading(folder)
    assert [check for check in verify_bundle(folder) if not check.ok] == []
    assert decoder_name(bundle, [CUDA, CPU]) == HALF_DECODER
    model = onnx.load_model(folder / HALF_DECODER, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    nodes = [node for node in model.graph.node if node.op_type in ("GroupQueryAttention", "Attention")]
    assert {node.op_type for node in nodes} == {"Attention" if family.startswith("kimi") else "GroupQueryAttention"}
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph.node) == 2 * len(nodes)
    sinks = [len(node.input) == 12 and node.input[11].endswith(".sinks") for node in nodes]
    assert sinks == [family == "gpt_oss"] * len(nodes)
    windows = [a.i for node in nodes for a in node.attribute if a.name == "local_window_size"]
    assert windows == ([internvl.WINDOW] if family == "gpt_oss" else [])
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert {types[name] for name in types if ".key" in name or ".value" in name} == {onnx.TensorProto.FLOAT16}
    assert types["logits"] == types["inputs_embeds"] == onnx.TensorProto.FLOAT


def test_sinks_and_windows_in_float32(tmp_path: Path) -> None:
    """GroupQueryAttention against Attention with a mask and one more key, to float32 rounding, far beyond the window."""
    bundle = exported(tmp_path, "gpt_oss", torch.float32)
    folder = Path(shutil.copytree(bundle, tmp_path / "with-another-graph"))
    run = RunFolder(tmp_path / "run")
    thresholds, calibration = found_in(run)
    result = select(thresholds, None, None)
    rule = from_result(result, Measured(calibration, run))
    plan = make_plan(model_spec(calibration, "cpu", False), thresholds, result, rule, onnx=True)
    assert plan.family is not None
    spec = DecoderSpec(plan.config.get_text_config(), 0, plan.blocks, plan.tokens, rule, grouped=True)
    _save(export_decoder(plan.model, plan.mode, plan.family, spec), folder / GROUPED, plan)
    plain = OrtModel(bundle, threads=1)
    assert not (bundle / HALF_DECODER).exists()
    assert decoder_name(check_for_loading(bundle), [CUDA, CPU]) == DECODER
    for name in NAMES:
        expected = steps(plain, name)
        assert expected[-1].attention_mask.shape[1] > internvl.WINDOW
        require_same(steps(with_graph(folder, GROUPED, bundle), name, tokens(expected)), expected, 1e-4)
