"""Rotary positions as one operator for queries and one for keys, instead of the dozen plain ones of a traced model.

`Rotation` is ai.onnx's RotaryEmbedding, which takes the cosines and sines of each token. `MultimodalRotation` is
com.microsoft.MRotaryEmbedding, for three rows of positions (M-RoPE): it looks cosines and sines up itself, by row and column.
Tables over all positions would be as long as the longest context (128 MB each way for Qwen3-VL), so it gets those of the tokens
of this step, and their numbers as positions.

Both take angles as transformers does: position times frequency in float32, then rounded to the type of the activations.
"""

from collections.abc import Callable
from typing import Any, cast

import onnx
import onnxscript
import torch
from torch import Tensor, nn

from modes_cli.errors import UnknownLayout

DOMAIN, VERSION = "com.microsoft", 1
MULTIMODAL = "MRotaryEmbedding"
_INTERLEAVED_SECTIONS = 1  # mrope_layout of Qwen3-VL: time, height, width, time, ... along the frequencies
_CHANGING = ("dynamic", "longrope")  # kinds of rotary positions whose frequencies depend on the length of what was read

torch.library.define("modes_trace::rotary", "(Tensor x, Tensor cos, Tensor sin, int heads, bool interleaved) -> Tensor")
torch.library.define(
    "modes_trace::multimodal_rotary",
    "(Tensor x, Tensor positions, Tensor cos, Tensor sin, int heads, int[] sections) -> Tensor",
)


@torch.library.register_fake("modes_trace::rotary")
def _rotary_shape(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool) -> Tensor:
    """[B, S, heads * D]; without `heads` as x, [B, heads, S, D]."""
    return torch.empty_like(x.flatten(2) if heads and x.ndim == 4 else x)


@torch.library.register_fake("modes_trace::multimodal_rotary")
def _multimodal_shape(x: Tensor, *_: Any) -> Tensor:
    """[B, S, heads * D]."""
    return torch.empty_like(x.flatten(2) if x.ndim == 4 else x)


class Rotation:
    """What a text model's `rotary_emb` gives to its layers."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        """[B, S, D / 2]."""
        self.cos, self.sin = cos, sin

    def __call__(self, tokens: Tensor, heads: int) -> Tensor:
        """[B, S, heads * D] from that or from [B, S, heads, D]; the two of a pair lie half a head apart."""
        return cast(Tensor, torch.ops.modes_trace.rotary(tokens, self.cos, self.sin, heads, False))

    def by_heads(self, tokens: Tensor, interleaved: bool) -> Tensor:
        """[B, heads, S, D] from the same. `interleaved`: the two of a pair lie side by side, before and afterwards."""
        return cast(Tensor, torch.ops.modes_trace.rotary(tokens, self.cos, self.sin, 0, interleaved))


class MultimodalRotation:
    """The same for three rows of positions."""

    def __init__(self, positions: Tensor, cos: Tensor, sin: Tensor, sections: list[int]) -> None:
        """`positions` [3, B, S] int64: rows of `cos` and `sin` [N, D / 2]. `sections`: frequencies of time, height, width."""
        self.positions, self.cos, self.sin, self.sections = positions, cos, sin, sections

    def __call__(self, tokens: Tensor, heads: int) -> Tensor:
        """As `Rotation`."""
        parts = (self.positions, self.cos, self.sin, heads, self.sections)
        return cast(Tensor, torch.ops.modes_trace.multimodal_rotary(tokens, *parts))


def replace(text: nn.Module, *, multimodal: bool) -> None:
    """Make a text model's `rotary_emb` give its layers one of these.

    Args:
        multimodal: as `MultimodalRotation` where positions have three rows; else angles are put together outside.

    Raises:
        UnknownLayout: frequencies that change while tokens are generated.
    """
    rotary: Any = text.get_submodule("rotary_emb")
    if rotary.rope_type in _CHANGING:
        raise UnknownLayout(f"rotary positions of type `{rotary.rope_type}` change with the length of the context")
    sections: list[int] = list(getattr(rotary, "mrope_section", ()))

    def forward(hidden: Tensor, position_ids: Tensor) -> Rotation | MultimodalRotation:
        def of(angles: Tensor) -> tuple[Tensor, Tensor]:
            found = angles.cos(), angles.sin()
            if rotary.attention_scaling != 1:
                found = found[0] * rotary.attention_scaling, found[1] * rotary.attention_scaling
            return found[0].to(hidden.dtype), found[1].to(hidden.dtype)

        if position_ids.ndim == 2:
            return Rotation(*of(position_ids[..., None].float() * rotary.inv_freq))
        if not multimodal:
            rows = position_ids.index_select(0, torch.tensor(_rows(sections, rotary.inv_freq.shape[0])))  # [D / 2, B, S]
            return Rotation(*of(rows.permute(1, 2, 0).float() * rotary.inv_freq))
        flat = position_ids.reshape(-1, 1)
        numbers = (torch.ones_like(position_ids).flatten().cumsum(0) - 1).view(position_ids.shape)
        return MultimodalRotation(numbers, *of(flat.float() * rotary.inv_freq), sections)

    rotary.forward = forward


def _rows(sections: list[int], count: int) -> list[int]:
    """Which row of positions each of `count` frequencies takes: height at 1, 4, ..., width at 2, 5, ..., else time."""
    return [row if (row := column % 3) and column < 3 * sections[row] else 0 for column in range(count)]


def _register_schema() -> None:
    """onnxscript and the ONNX checker look operators up by schema. Of this one's attributes only those used here."""
    if onnx.defs.has(MULTIMODAL, DOMAIN):
        return
    parameter, attribute, kind = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute, onnx.defs.OpSchema.AttrType
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            MULTIMODAL,
            DOMAIN,
            VERSION,
            inputs=[
                parameter("input", "T"), parameter("position_ids", "M"), parameter("cos_cache", "T"),
                parameter("sin_cache", "T"),
            ],
            outputs=[parameter("output", "T")],
            type_constraints=[("T", floats, "activations"), ("M", ["tensor(int64)"], "positions")],
            attributes=[
                attribute("num_heads", kind.INT, "of the input", required=True),
                attribute("mrope_section", kind.INTS, "frequencies of time, height and width", required=True),
                attribute("mrope_layout", kind.INT, "1: sections interleaved", required=True),
            ],
        )
    )  # fmt: skip


_register_schema()
_MICROSOFT = onnxscript.values.Opset(DOMAIN, VERSION)
_ONNX: Any = onnxscript.opset23


def _flat(x: Any) -> Any:
    """[B, S, heads, D] -> [B, S, heads * D]: no data moves."""
    return x if len(x.shape) == 3 else _ONNX.Reshape(x, _ONNX.Constant(value_ints=[0, 0, -1]))


def _rotary(x: Any, cos: Any, sin: Any, heads: int, interleaved: bool) -> Any:
    if not heads:
        return _ONNX.RotaryEmbedding(x, cos, sin, None, interleaved=int(interleaved))
    return _ONNX.RotaryEmbedding(_flat(x), cos, sin, None, num_heads=heads, interleaved=int(interleaved))


def _multimodal_rotary(x: Any, positions: Any, cos: Any, sin: Any, heads: int, sections: list[int]) -> Any:
    return _MICROSOFT.MRotaryEmbedding(
        _flat(x), positions, cos, sin, num_heads=heads, mrope_section=list(sections), mrope_layout=_INTERLEAVED_SECTIONS
    )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...)."""
    ops = torch.ops.modes_trace
    return {ops.rotary.default: _rotary, ops.multimodal_rotary.default: _multimodal_rotary}
