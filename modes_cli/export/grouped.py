"""Attention as com.microsoft.GroupQueryAttention. Past and present may be one buffer: no layer but the first then copies it.

The operator sees a row as so many tokens without a gap, and puts new ones behind them (`seqlens_k`). Rows of a batch have
padding, at the left of a prompt or where a row has ended. So tokens enter the layers with the real ones first and leave them
in the order they came in; the next real tokens take the places of padding in the cache. That gives what a mask gives, for

- a prompt (no past) of any batch,
- one token for each row of any batch,
- several tokens after a past for one row. For several rows the operator refuses.

A window (GPT-OSS) is counted in real tokens: those of a row lie side by side with a mask as well. How many places of a row are
real, the cache itself tells, as with `FlatCache`: behind them the keys of the first layer are
zeros, whatever was in the buffer. ONNX Runtime has the operator for float32 and float16 on the CPU, for float16 and bfloat16
on CUDA; positions are applied before it (`rotary`), since it knows none with three rows (M-RoPE).
"""

from collections.abc import Callable
from typing import Any, cast

import onnx
import onnxscript
import torch
from torch import Tensor

from modes_cli.export.attention import is_latent

DOMAIN, VERSION = "com.microsoft", 1
OPERATOR = "GroupQueryAttention"
_HEAD_MULTIPLE = 8
_NO_WINDOW = -1

torch.library.define(
    "modes_trace::group_query_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, Tensor last, Tensor mask, "
    "Tensor? sinks, int heads, float scale, int window) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("modes_trace::last_place", "(Tensor past_key, Tensor mask, Tensor ids) -> Tensor")
torch.library.define("modes_trace::only_first", "(Tensor key, Tensor count) -> Tensor")


@torch.library.register_fake("modes_trace::group_query_attention")
def _attention_shapes(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, S, heads * D]; keys and values [B, kv heads, T, D]. At run time T is that of a larger buffer, if past is one;
    nothing traced after this operator depends on T.
    """
    batch, heads, past, size = past_key.shape
    present = past_key.new_empty((batch, heads, past + key.shape[1], size))
    return torch.empty_like(query), present, torch.empty_like(present)


@torch.library.register_fake("modes_trace::last_place")
def _last_place_shape(past_key: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """[B] int32: real places before the new tokens, and their number less 1."""
    return ids.new_empty((ids.shape[0],), dtype=torch.int32)


@torch.library.register_fake("modes_trace::only_first")
def _only_first_shape(key: Tensor, count: Tensor) -> Tensor:
    """[B, kv heads, T, D] as `key`: zeros from place `count` [B] int32 on."""
    return torch.empty_like(key)


def fits(config: Any, cache: tuple[int, int, int]) -> bool:
    """Whether a text model's attention is one that the operator has: keys and values of one width, windows and sinks as in
    GPT-OSS.
    """
    heads, key, value = cache
    plain = key == value and key % _HEAD_MULTIPLE == 0 and int(config.num_attention_heads) % heads == 0
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return plain and not (is_latent(config) or other or getattr(config, "use_sliding_window", False))


class RealFirst:
    """The order in which tokens go through the layers: of each row the real ones first, each kind in its own order."""

    def __init__(self, real: Tensor) -> None:
        """`real` [B, S] bool."""
        batch, length = real.shape
        ones = real.to(torch.int64)
        count = ones.sum(1, keepdim=True)
        # A padding token goes behind all real ones: their number, and that of the padding before it.
        self._place = torch.where(real, ones.cumsum(1) - 1, count + (1 - ones).cumsum(1) - 1)
        places = torch.arange(length, device=real.device)[None].expand(batch, length)
        self._origin = torch.zeros_like(self._place).scatter(1, self._place, places)
        self._row = torch.arange(batch, device=real.device)[:, None] * length

    def sort(self, tokens: Tensor) -> Tensor:
        """[B, S] or [B, S, W], into this order."""
        return self._take(tokens, self._origin)

    def restore(self, tokens: Tensor) -> Tensor:
        """The same, back in the order of the prompt."""
        return self._take(tokens, self._place)

    def _take(self, tokens: Tensor, index: Tensor) -> Tensor:
        rows = (self._row + index).flatten()
        return tokens.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape)


class GroupedCache:
    """Turns the graph's past inputs into its present outputs, inside the operator. See `FlatCache`."""

    multimodal = True

    def __init__(self, past: list[Tensor], mask: Tensor, ids: Tensor, real: Tensor) -> None:
        """`mask` [B, P + S] int64, `ids` [B, S]; `real` [B, S] bool: which new places are not padding, in any order."""
        self.past, self.mask = past, mask
        self.present: list[Tensor] = list(past)
        self.last = torch.ops.modes_trace.last_place(past[0], mask, ids)
        self.count = self.last + 1 - (~real).sum(1).to(torch.int32)

    def get_seq_length(self, *_: Any) -> int:
        return self.past[0].shape[2]

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `attention.Cache`. Nobody looks at `mask`."""
        first, heads = 2 * layer.layer_idx, query.shape[-1] // layer.head_dim
        sinks, window = getattr(layer, "sinks", None), getattr(layer, "sliding_window", None)
        out, key, value = torch.ops.modes_trace.group_query_attention(
            query, key, value, *self.past[first : first + 2], self.last, self.mask, sinks, heads, layer.scaling,
            window or _NO_WINDOW,
        )  # fmt: skip
        if first == 0:
            # Values too, though nobody counts them: CUDA's kernel asks whether the keys share a buffer and takes the values to
            # do as they do, so either both come out of it into the buffer that was fed, or neither.
            key, value = (torch.ops.modes_trace.only_first(part, self.count) for part in (key, value))
        self.present[first : first + 2] = key, value
        return cast(Tensor, out)


_UNUSED = {"cos_cache": "T", "sin_cache": "T", "position_ids": "tensor(int64)", "attention_bias": "T"}


def _register_schema() -> None:
    """onnxscript looks operators up by schema. Of this one's attributes only those used here."""
    if onnx.defs.has(OPERATOR, DOMAIN):
        return
    parameter, attribute, kind = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute, onnx.defs.OpSchema.AttrType
    tensors = [parameter(name, "T") for name in ("query", "key", "value", "past_key", "past_value")]
    counts = [parameter(name, "M") for name in ("seqlens_k", "total_sequence_length")]
    option = onnx.defs.OpSchema.FormalParameterOption.Optional
    unused = [parameter(name, kind, param_option=option) for name, kind in _UNUSED.items()]
    sinks = parameter("head_sink", "T", param_option=option)
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            OPERATOR,
            DOMAIN,
            VERSION,
            inputs=[*tensors, *counts, *unused, sinks],
            outputs=[parameter(name, "T") for name in ("output", "present_key", "present_value")],
            type_constraints=[("T", floats, "activations and cache"), ("M", ["tensor(int32)"], "lengths")],
            attributes=[
                attribute("num_heads", kind.INT, "of queries", required=True),
                attribute("kv_num_heads", kind.INT, "of keys and values", required=True),
                attribute("scale", kind.FLOAT, "of q . k", required=True),
                attribute("local_window_size", kind.INT, "how many places a token sees, its own included", required=False),
            ],
        )
    )


_register_schema()
_MICROSOFT = onnxscript.values.Opset(DOMAIN, VERSION)
_ONNX: Any = onnxscript.opset23
_FLOAT, _INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32


def _attention(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, last: Any, mask: Any, sinks: Any, heads: int,
    scale: float, window: int,
) -> Any:  # fmt: skip
    total = _ONNX.Cast(_ONNX.Shape(mask, start=1), to=_INT32)
    inputs = [query, key, value, past_key, past_value, last, total]
    if sinks is not None:
        inputs += [*(None for _ in _UNUSED), sinks]
    options = {} if window == _NO_WINDOW else {"local_window_size": window}
    kv_heads = int(past_key.shape[1])
    return _MICROSOFT.GroupQueryAttention(*inputs, num_heads=heads, kv_num_heads=kv_heads, scale=scale, **options, _outputs=3)


def _last_place(past_key: Any, mask: Any, ids: Any) -> Any:
    """Of the places that a step may look at, those of which one head's key in the first layer is not zero: no real key is."""
    one = _ONNX.Constant(value_ints=[1])
    length = _ONNX.Shape(ids, start=1)
    past = _ONNX.Sub(_ONNX.Shape(mask, start=1), length)  # a buffer may be longer
    first_head = _ONNX.Constant(value_ints=[0, 0]), _ONNX.Concat(one, past, axis=0), _ONNX.Constant(value_ints=[1, 2])
    seen = _ONNX.Cast(_ONNX.Slice(past_key, *first_head), to=_FLOAT)  # [B, 1, P, D]
    # The new tokens as ones behind them: P may be 0, and ONNX Runtime reduces nothing to a wrong shape.
    size = _ONNX.Concat(_ONNX.Shape(ids, start=0, end=1), one, length, _ONNX.Shape(past_key, start=3), axis=0)
    places = _ONNX.Concat(seen, _ONNX.Expand(_ONNX.Constant(value_floats=[1.0]), size), axis=2)
    largest = _ONNX.ReduceMax(_ONNX.Abs(places), _ONNX.Constant(value_ints=[1, 3]), keepdims=0)  # [B, P + S]
    real = _ONNX.Cast(_ONNX.Greater(largest, _ONNX.Constant(value_floats=[0.0])), to=_INT32)
    return _ONNX.Sub(_ONNX.ReduceSum(real, one, keepdims=0), _ONNX.Cast(one, to=_INT32))


def _only_first(key: Any, count: Any) -> Any:
    """In float32, because ONNX Runtime's Where has no bfloat16; and no product, because a buffer may hold NaN."""
    zero, one = _ONNX.Constant(value_int=0), _ONNX.Constant(value_int=1)
    places = _ONNX.Range(zero, _ONNX.Squeeze(_ONNX.Shape(key, start=2, end=3)), one)
    ends = _ONNX.Unsqueeze(_ONNX.Cast(count, to=onnx.TensorProto.INT64), _ONNX.Constant(value_ints=[1]))
    kept = _ONNX.Unsqueeze(_ONNX.Less(places, ends), _ONNX.Constant(value_ints=[1, 3]))  # [B, 1, T, 1]
    return _ONNX.CastLike(_ONNX.Where(kept, _ONNX.Cast(key, to=_FLOAT), _ONNX.Constant(value_float=0.0)), key)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...)."""
    ops = torch.ops.modes_trace
    return {
        ops.group_query_attention.default: _attention,
        ops.last_place.default: _last_place,
        ops.only_first.default: _only_first,
    }
