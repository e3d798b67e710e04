"""From a model id to a model in memory: what is refused before weights are read, and what comes out."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from modes_cli.errors import BadArtifact, BadModel, BadOption
from modes_cli.models.loading import Loaded, describe, load, pick_device
from modes_cli.requests import ModelSpec
from tests.checkpoints import DENSE_LAYERS, LAYERS


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_multimodal_checkpoint(tiny: Loaded, tiny_checkpoint: Path) -> None:
    assert (tiny.path, tiny.info.id, tiny.family) == (tiny_checkpoint, str(tiny_checkpoint), "qwen3_vl_moe")
    assert (tiny.info.dtype, tiny.model.dtype, tiny.device.type) == ("float32", torch.float32, "cpu")
    assert len(tiny.blocks) == LAYERS - DENSE_LAYERS
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert tiny.tokenizer is tiny.processor.tokenizer
    assert tiny.tokens.vision_ids == (tiny.model.config.image_token_id, tiny.model.config.video_token_id)


def test_a_text_model_needs_text_only(tiny_text_moe_checkpoint: Path) -> None:
    with pytest.raises(BadModel, match=r"text-only model \(model type `qwen3_moe`\)") as caught:
        load(ModelSpec(str(tiny_text_moe_checkpoint)))
    assert "--text-only" in str(caught.value.hint)

    loaded = load(ModelSpec(str(tiny_text_moe_checkpoint), text_only=True))
    assert loaded.tokenizer is loaded.processor
    assert loaded.tokens.vision_ids == ()
    assert len(loaded.blocks) == LAYERS - DENSE_LAYERS


def test_a_dense_model_is_refused(tiny_dense_checkpoint: Path) -> None:
    with pytest.raises(BadModel, match=r"`Qwen3VLForConditionalGeneration` \(model type `qwen3_vl`\) has no MoE layers"):
        load(ModelSpec(str(tiny_dense_checkpoint)))


def test_a_text_model_is_refused_before_its_weights_are_read(
    tiny_text_moe_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(BadModel, match="text-only"):
        load(ModelSpec(str(tiny_text_moe_checkpoint)))


def test_dtype_is_the_stored_one_or_the_asked_one(tiny_checkpoint: Path, copy: Path) -> None:
    assert describe(ModelSpec(str(tiny_checkpoint), dtype="bfloat16"))[1].dtype == "bfloat16"
    change_config(copy, dtype="float16")
    assert describe(ModelSpec(str(copy)))[1].dtype == "float16"
    assert load(ModelSpec(str(tiny_checkpoint), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_a_dtype_that_is_not_supported_is_refused(copy: Path) -> None:
    change_config(copy, dtype="float64")
    with pytest.raises(BadModel, match="stored as `float64`"):
        load(ModelSpec(str(copy)))


def test_an_unknown_model_type_is_named(copy: Path) -> None:
    change_config(copy, model_type="no_such_model")
    with pytest.raises(BadModel, match="model type `no_such_model`"):
        load(ModelSpec(str(copy)))


def test_a_folder_without_processor_is_refused(copy: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(BadModel, match="processor"):
        load(ModelSpec(str(copy)))


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_weights_are_refused(copy: Path, part: float) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * part)])
    with pytest.raises((BadModel, BadArtifact), match=r"copy|model\.safetensors"):
        load(ModelSpec(str(copy)))


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["moe_intermediate_size"] = 16
    path.write_text(json.dumps(config))
    with pytest.raises(BadModel, match="cannot be loaded"):
        load(ModelSpec(str(copy)))


def test_missing_weights_are_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = copy / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "layers.2" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(BadModel, match=r"lacks `\d+` of the tensors .*language_model\.layers\.2\."):
        load(ModelSpec(str(copy)))


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadOption, match="--device cuda"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
