"""Qwen3-VL-MoE checkpoints of any size in the hub's layout whose weights take no space: files with holes.

The hub's files hold fused experts transposed, in shards that an index names.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from modes_cli.artifacts import Calibration, Thresholds
from modes_cli.models.checkpoint import REFERENCE_FOLDER
from modes_cli.models.loading import describe, versions
from modes_cli.requests import ModelSpec
from modes_cli.run_folder import RunFolder
from tests import examples
from tests.checkpoints import PROCESSOR_FILES

# name, shape as the file has it -> the values, or None for a hole
Fill = Callable[[str, tuple[int, ...]], NDArray[np.float32] | None]

_ROPE = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


def qwen3_vl_30b_a3b() -> transformers.Qwen3VLMoeConfig:
    """The sizes of Qwen3-VL-30B-A3B-Instruct."""
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": _ROPE, "dtype": "bfloat16",
    }  # fmt: skip
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16, "in_channels": 3,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2048, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    return transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652, vision_end_token_id=151653, dtype="bfloat16",
    )  # fmt: skip


def nothing(_name: str, _shape: tuple[int, ...]) -> None:
    """Every weight is a hole."""
    return


def hub_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors as the hub's files have them."""
    with torch.device("meta"):
        model = transformers.Qwen3VLMoeForConditionalGeneration._from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: (s[0], s[2], s[1]) if ".experts." in name else s for name, s in shapes.items()}


def write_sparse(folder: Path, config: Any, fill: Fill = nothing, *, dtype: str = "BF16", shard: int = 5 << 30) -> Path:
    """A checkpoint folder with the built-in model's processor. `fill` gives float32 values and then wants `dtype` F32."""
    folder.mkdir(parents=True)
    item = {"BF16": 2, "F32": 4}[dtype]
    groups = list(_groups(hub_shapes(config), item, shard))
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map.update(dict.fromkeys(group, file))
        _write(folder / file, group, fill, dtype, item)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    for name in (*PROCESSOR_FILES, "generation_config.json"):
        if (REFERENCE_FOLDER / name).exists():
            shutil.copy(REFERENCE_FOLDER / name, folder / name)
    return folder


def _groups(shapes: dict[str, tuple[int, ...]], item: int, shard: int) -> Iterator[dict[str, tuple[int, ...]]]:
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        if group and size + math.prod(shape) * item > shard:
            yield group
            group, size = {}, 0
        group[name] = shape
        size += math.prod(shape) * item
    yield group


def _write(path: Path, group: dict[str, tuple[int, ...]], fill: Fill, dtype: str, item: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in group.items():
        length = math.prod(shape) * item
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + offset)
        for name, shape in group.items():
            if (values := fill(name, shape)) is not None:
                assert (values.shape, values.dtype, dtype) == (shape, np.float32, "F32")
                file.seek(8 + len(head) + header[name]["data_offsets"][0])
                file.write(values.tobytes())


def write_run(folder: Path, checkpoint: Path, layers: list[int], experts: int, top_k: int, tau: float = 0.01) -> Path:
    """A run folder as calibrate and search of this checkpoint could have left it, with made-up numbers."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    _, info, _ = describe(ModelSpec(str(checkpoint), device="cpu"))
    share = {name: 1 / len(layers) for name in ("all", "text", "vision", "prompt", "decode")}
    importance = {str(layer): share | {f"kl_{name}": 0.1 for name in share} for layer in layers}
    calibration = examples.artifact("calibration")
    made = {
        **calibration.model_dump(), "model": info.model_dump(), "versions": versions().model_dump(), "importance": importance,
        "moe_layers": len(layers), "experts": experts, "top_k": top_k,
        "options": {**calibration.options, "text_only": False, "special": "keep", "batch_size": 8},
    }  # fmt: skip
    digest_of = run.write(Calibration.model_validate(made))
    thresholds = examples.artifact("thresholds")
    first = thresholds.results[0]
    ratios = {"all": first.skip_ratio, **first.skip_ratio_per_group}
    result = {
        **first.model_dump(), "policy": "modes", "parameters": {"per_modality": 0.0},
        "tau": {"text": tau, "vision": 2 * tau},
        "skip_ratio_per_layer": {str(layer): ratios for layer in layers},
    }  # fmt: skip
    from modes_cli import files

    found = {
        **thresholds.model_dump(), "model": info.model_dump(), "versions": versions().model_dump(), "results": [result],
        "calibration": files.sha256(digest_of),
    }  # fmt: skip
    run.write(Thresholds.model_validate(found))
    return folder
