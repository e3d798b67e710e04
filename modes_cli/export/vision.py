"""The vision graph: images in the form that the family's processor gives them, features for the decoder out."""

from typing import Any

import onnx_ir as ir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from modes_cli.export import graph
from modes_cli.export.families.base import Family
from modes_cli.export.graph import AUTO


def export_vision(model: nn.Module, mode: FakeTensorMode, family: Family, config: Any) -> ir.Model:
    """The family's vision inputs (`Family.vision_inputs`) -> image_features [M, (1 + n) * H].

    Positions, interpolation and segments are computed in the graph, so a deployment needs no Python to prepare them.
    """
    width = (1 + family.deepstack(config)) * int(config.text_config.hidden_size)
    with mode:
        inputs = family.vision_inputs(config)
    shapes = {name: shape for name, (_, shape) in inputs.items()}
    return graph.trace(
        family.vision_tower(model, config).eval(),
        {name: example for name, (example, _) in inputs.items()},
        {name: {axis: AUTO for axis, size in enumerate(shape) if isinstance(size, str)} for name, shape in shapes.items()},
        shapes,
        {"image_features": ["image_tokens", width]},
    )
