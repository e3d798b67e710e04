"""The three graphs in ONNX Runtime against transformers."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import PreTrainedModel

from modes_cli.models.groups import GROUPS
from modes_cli.models.loading import load
from modes_cli.requests import ModelSpec


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return load(ModelSpec(str(checkpoint))).model


def run(bundle: Path, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(str(bundle / name), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize(
    "grid",
    [
        [[1, 12, 12]],
        [[1, 2, 2]],
        [[1, 4, 6], [1, 4, 4]],
        [[2, 4, 4], [1, 2, 6], [1, 6, 2], [3, 2, 2]],  # videos among images
        [[1, 2, 16], [1, 16, 2]],
    ],
)
def test_vision_tower(bundle: Path, model: PreTrainedModel, grid: list[list[int]]) -> None:
    sizes = torch.tensor(grid)
    pixels = torch.randn(int(sizes.prod(-1).sum()), 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tower = model.model.visual(pixels, sizes)
    expected = torch.cat([tower.pooler_output, *tower.deepstack_features], -1).numpy()
    found = run(bundle, "vision.onnx", {"pixel_values": pixels.numpy(), "image_grid_thw": sizes.numpy()})
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_embedding(bundle: Path, model: PreTrainedModel) -> None:
    image = model.config.image_token_id
    ids = np.array([[9, image, image, 10], [image, 11, 12, image]])
    features = np.random.default_rng(0).standard_normal((4, 192)).astype(np.float32)
    found = run(bundle, "embedding.onnx", {"input_ids": ids, "image_features": features})
    embeds = model.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy()
    expected = np.concatenate([embeds, np.zeros((2, 4, 128), np.float32)], -1)
    expected[ids == image] = features
    np.testing.assert_array_equal(found, expected)


def test_embedding_without_features(bundle: Path, model: PreTrainedModel) -> None:
    """A generated image token has no feature and keeps its plain embedding."""
    ids = np.array([[9, model.config.image_token_id]])
    found = run(bundle, "embedding.onnx", {"input_ids": ids, "image_features": np.zeros((0, 192), np.float32)})
    np.testing.assert_array_equal(found[..., :64], model.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy())
    assert not found[..., 64:].any()


@pytest.mark.parametrize("name", ["decoder.onnx", "embedding.onnx", "vision.onnx"])
def test_graphs_hold_no_weights(bundle: Path, name: str) -> None:
    graph = onnx.load(bundle / name, load_external_data=False).graph
    inline = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert sum(t.ByteSize() for t in inline) < 50_000
    assert (bundle / name).stat().st_size < 1 << 20
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer)


def test_decoder_interface(bundle: Path) -> None:
    graph = onnx.load(bundle / "decoder.onnx", load_external_data=False).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert shapes["inputs_embeds"] == ["batch", "length", 192]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["position_ids"] == [3, "batch", "length"]
    assert shapes["tau"] == [len(GROUPS)]
    assert shapes["past_key_values.3.value"] == ["batch", 2, "past", 16]
    assert shapes["logits"] == ["batch", "logits_length", 416]
    assert shapes["kept_pairs"] == [3, len(GROUPS)]
    assert shapes["present.0.key"] == ["batch", 2, "total", 16]
    assert {"tau", "logits_to_keep"} <= {t.name for t in graph.initializer}
    nodes = [node for node in graph.node if node.domain == "modes"]
    assert [node.op_type for node in nodes] == ["Route", "SkipExperts"] * 3
    assert not {"Softmax", "TopK"} & {node.op_type for node in graph.node}
    assert sum(node.op_type == "Attention" for node in graph.node) == 4
