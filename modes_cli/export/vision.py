"""The vision graph: packed patches of any mix of images in, features for the decoder out."""

from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.export import graph
from modes_cli.export.families.base import Family
from modes_cli.export.graph import AUTO


def export_vision(model: nn.Module, mode: FakeTensorMode, family: Family, config: Any) -> ir.Model:
    """pixel_values [N, C] float32, image_grid_thw [images, 3] int64 -> image_features [M, (1 + n) * H].

    Positions, interpolation and segments are computed in the graph, so a deployment needs no Python to prepare them.
    """
    values, merged = family.patch_size(config)
    width = (1 + family.deepstack(config)) * int(config.text_config.hidden_size)
    with mode:
        example = {"pixel_values": torch.zeros(10 * merged, values), "image_grid_thw": torch.zeros(2, 3, dtype=torch.int64)}
    return graph.trace(
        family.vision_tower(model, config).eval(),
        example,
        {"pixel_values": {0: AUTO}, "image_grid_thw": {0: AUTO}},
        {"pixel_values": ["patches", values], "image_grid_thw": ["images", 3]},
        {"image_features": ["image_tokens", width]},
    )
