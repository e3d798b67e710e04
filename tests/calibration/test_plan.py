"""The plan of a calibration, made without weights, against what loading and calibrating then do."""

import json
import math
from pathlib import Path

import pytest

from modes_cli import app
from modes_cli.calibration import calibrate
from modes_cli.calibration.plan import Weights, _fullest, make_plan
from modes_cli.errors import BadModel
from modes_cli.models.loading import Loaded
from modes_cli.requests import ModelSpec
from tests.runs import calibration_request
from tests.sparse_checkpoint import hub_shapes, qwen3_vl_30b_a3b, write_sparse


def test_the_plan_of_a_small_model_is_what_then_happens(tiny: Loaded, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan(ModelSpec(str(tiny_checkpoint), device="cpu"), samples=6, batch_size=4)
    assert plan.parameters == sum(p.numel() for p in tiny.model.parameters())
    tensors = [*tiny.model.parameters(), *tiny.model.buffers()]
    assert plan.weights.total == sum(t.numel() * t.element_size() for t in tensors)
    layers = tiny.model.model.language_model.layers
    assert plan.weights.layers == tuple(4 * sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert plan.weights.experts == 4 * sum(p.numel() for block in tiny.blocks for p in block.experts.parameters())
    assert plan.weights.vision == sum(t.numel() * t.element_size() for t in (*tiny.model.model.visual.parameters(),)) + sum(
        b.numel() * b.element_size() for b in tiny.model.model.visual.buffers()
    )
    made = calibrate(calibration_request(tiny_checkpoint, tmp_path, samples=6, batch_size=4)).artifact
    assert plan.batches == 2
    assert plan.forward_equivalents == made.forward_equivalents
    assert plan.naive_forwards == made.naive_forwards
    assert [str(layer) for layer in plan.moe_layers] == list(made.importance)
    assert (plan.experts, plan.top_k, plan.family) == (made.experts, made.top_k, made.family)
    # A dense layer runs in the recording, the last one in every replay of five columns too, and all of them twice for saliency,
    # whose way back counts as a forward.
    assert plan.forward_equivalents == (1 + 6 + 11 + 16 + len(plan.moe_layers)) / 4 + 3
    assert plan.layer_runs == (3, 8, 13, 18)
    assert plan.offload_read == 2 * sum(n * size for n, size in zip(plan.layer_runs, plan.weights.layers, strict=True))


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_weights_are_spread_as_evenly_as_whole_layers_allow(devices: int) -> None:
    weights = Weights(total=100, experts=0, embedding=10, vision=5, head=9, other=1, layers=(20, 20, 15, 20))
    parts, best = [16, 20, 20, 15, 20, 9], math.inf

    def split(start: int, left: int, worst: int) -> None:
        nonlocal best
        if left == 1:
            best = min(best, max(worst, sum(parts[start:])))
            return
        for end in range(start + 1, len(parts)):
            split(end, left - 1, max(worst, sum(parts[start:end])))

    split(0, devices, 0)
    assert _fullest(weights, devices) == best


def test_a_checkpoint_without_a_layer_is_refused(tmp_path: Path) -> None:
    config = qwen3_vl_30b_a3b()
    config.text_config.num_hidden_layers = 2
    folder = write_sparse(tmp_path / "short", config)
    config.text_config.num_hidden_layers = 3
    config.save_pretrained(folder)
    with pytest.raises(BadModel, match="decoder layer `2` of `3`"):
        make_plan(ModelSpec(str(folder)), 8, 8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-VL-30B-A3B's sizes on disk, in files that are holes."""
    folder = write_sparse(tmp_path_factory.mktemp("large") / "checkpoint", qwen3_vl_30b_a3b())
    assert sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors")) < 1 << 20
    return folder


def test_the_plan_of_qwen3_vl_30b(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["profile", str(large), "--plan", "--json", "--samples", "1024", "--batch-size", "16"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["family"], said["artifact"]) == (str(large), "qwen3_vl_moe", None)
    assert (said["moe_layers"], said["experts"], said["top_k"]) == (48, 128, 8)
    plan = said["plan"]
    shapes = hub_shapes(qwen3_vl_30b_a3b())
    assert plan["parameters"] == sum(math.prod(shape) for shape in shapes.values()) == 31_070_754_032
    layer = sum(math.prod(shape) for name, shape in shapes.items() if ".layers.7." in name and "visual" not in name)
    assert plan["weights"]["layers"] == [2 * layer] * 48
    assert plan["weights"]["experts"] == 48 * 128 * 3 * 2048 * 768 * 2
    assert plan["weights"]["embedding"] == plan["weights"]["head"] == 151936 * 2048 * 2
    placed = {one["name"]: one["weights"] for one in plan["placements"]}
    assert placed["one device"] == plan["weights"]["total"]
    assert placed["offload"] == plan["weights"]["total"] - 46 * 2 * layer
    assert plan["weights"]["total"] / 2 <= placed["2 devices"] < plan["weights"]["total"] / 2 + 2 * 2 * layer
    # 48 layers, five columns: 1 + 5 * (48 + ... + 1) / 48 forwards, one for the experts' outputs and three for saliency,
    # instead of 1 + 5 * 48
    assert (plan["forward_equivalents"], plan["naive_forwards"], plan["batches"]) == (1 + 5 * 49 / 2 + 4, 241, 64)


def test_people_read_the_plan(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["profile", str(large), "--plan", "--samples", "1024", "--batch-size", "16"]) == 0
    out = capsys.readouterr().out
    for words in ("48 MoE layers of 128 experts, top-8", "1,246,241,280 bytes", "62.1 GB", "--offload", "127.5 forward passes"):
        assert words in out, words
