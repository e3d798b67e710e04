"""The size of a whole bundle with quantised experts, for a model with the proportions of Qwen3-VL-30B-A3B in bfloat16."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from modes_cli.export.verify import verify_bundle
from modes_cli.models.quantization import WEIGHTS
from tests.checkpoints import reference_config, save
from tests.export.test_internvl import DATA, commands

MOST = {"int8": 0.30, "int4": 0.18}  # of a float32 model's bytes
EXPERTS_SHARE = 0.933  # of Qwen3-VL-30B-A3B's 31.07 billion parameters, those of the routed experts


def write_proportional(folder: Path) -> Path:
    """Widths an eighth of Qwen3-VL-30B-A3B's, 2 of its 48 layers, and what is no expert reduced likewise."""
    reference = reference_config()
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    names = ("patch_size", "spatial_merge_size", "temporal_patch_size")
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            **{name: reference["text_config"][name] for name in ("eos_token_id", "pad_token_id")},
            "bos_token_id": None,
            "vocab_size": 560,
            "hidden_size": 256,
            "intermediate_size": 768,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            **{name: reference["vision_config"][name] for name in names},
            "depth": 2,
            "hidden_size": 80,
            "intermediate_size": 296,
            "num_heads": 2,
            "out_hidden_size": 256,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **{name: reference[name] for name in ids},
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).to(torch.bfloat16)
    return save(model, folder, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_proportional(tmp_path_factory.mktemp("proportional"))


@pytest.mark.parametrize("scheme", MOST)
def test_whole_bundle(checkpoint: Path, tmp_path: Path, scheme: str, one_thread: None) -> None:
    at = ("--run", tmp_path / "run")
    commands(
        ("calibrate", checkpoint, "--quantize", scheme, *DATA, *at),
        ("search", "--target", 0.5, "--policy", "modes", "--no-frontier", *at),
        ("export", *at),
    )
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    counts = {name: torch.Size(shape).numel() for name, shape in sizes.items()}
    experts = sum(count for name, count in counts.items() if name.endswith(WEIGHTS))
    assert EXPERTS_SHARE - 0.01 <= experts / sum(counts.values()) <= EXPERTS_SHARE
    bundle = tmp_path / "run" / "bundle"
    assert all(check.ok for check in verify_bundle(bundle))
    # The kernel libraries do not grow with the model: 11 MB beside 30 GB.
    found = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.suffix != ".so")
    assert found <= MOST[scheme] * 4 * sum(counts.values())
