"""The operator as the exporter sees it: what is traced in PyTorch, and what it becomes in the graph.

`modes::skip_experts`, the operator that runs in PyTorch, has one output. While tracing we need the second one as well,
the kept pairs per group, so tracing has its own stand-in; it only knows shapes and is never run.
"""

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch
from torch import Tensor

DOMAIN, NAME, ROUTE, VERSION = "modes", "SkipExperts", "Route", 1

torch.library.define(
    "modes_trace::skip_experts",
    "(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor group, Tensor tau, Tensor score_scale, "
    "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, str activation, float alpha, float limit, "
    "bool transposed, bool interleaved, Tensor? score, Tensor? gate_up_scales=None, Tensor? down_scales=None, int block=0) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    "modes_trace::score",
    "(Tensor expert_ids, Tensor expert_weights, Tensor group, Tensor score_scale, Tensor? x, Tensor predictor_logits, "
    "Tensor coefficients, Tensor range, Tensor? saliency, Tensor? saliency_range, float power, int top_k) -> Tensor",
)
torch.library.define("modes_trace::last_rows", "(Tensor x, Tensor count) -> Tensor")


@torch.library.register_fake("modes_trace::skip_experts")
def _skip_experts_shapes(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, group: Tensor, tau: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Output [T, H] as x; kept pairs [G] int64."""
    return torch.empty_like(x), torch.empty(tau.shape, dtype=torch.int64, device=x.device)


@torch.library.register_fake("modes_trace::score")
def _score_shape(expert_ids: Tensor, expert_weights: Tensor, *_: Any) -> Tensor:
    """[T, k] float32."""
    return torch.empty_like(expert_weights)


@torch.library.register_fake("modes_trace::last_rows")
def _last_rows_shape(x: Tensor, count: Tensor) -> Tensor:
    """[B, S, H] as x. At run time S is `count` where that is not 0; nothing after this operator depends on S."""
    return torch.empty_like(x)


def _register_schema() -> None:
    """onnxscript and the ONNX checker look operators up by schema."""
    if onnx.defs.has(NAME, DOMAIN):
        return
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    option, kind = onnx.defs.OpSchema.FormalParameterOption, onnx.defs.OpSchema.AttrType
    optional: dict[str, Any] = {"param_option": option.Optional}
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            NAME,
            DOMAIN,
            VERSION,
            doc="Routed experts, of those (token, expert) pairs only whose score reaches the threshold of the group.",
            inputs=[
                parameter("hidden", "T"), parameter("expert_ids", "I"), parameter("expert_weights", "T"),
                parameter("group", "G"), parameter("tau", "F"), parameter("score_scale", "F"),
                parameter("gate_up", "W"), parameter("down", "W"),
                parameter("gate_up_bias", "B", **optional), parameter("down_bias", "B", **optional),
                parameter("score", "F", **optional),
                parameter("gate_up_scales", "S", **optional), parameter("down_scales", "S", **optional),
            ],
            outputs=[parameter("out", "T"), parameter("kept", "K", **optional)],
            type_constraints=[
                ("T", floats, "activations"), ("I", ["tensor(int64)", "tensor(int32)"], "expert ids"),
                ("W", [*floats, "tensor(int8)", "tensor(uint8)"], "weights; uint8: two of 4 bits"),
                ("B", floats, "biases: as the weights, or float32 with quantised ones"),
                ("S", ["tensor(float16)"], "scales of quantised weights"),
                ("G", ["tensor(int32)"], "groups"), ("F", ["tensor(float)"], "thresholds"), ("K", ["tensor(int64)"], "counts"),
            ],
            attributes=[
                attribute("activation", kind.STRING, "silu, gelu_tanh or swiglu_oai", required=True),
                attribute("alpha", kind.FLOAT, "of swiglu_oai", required=True),
                attribute("limit", kind.FLOAT, "of swiglu_oai", required=True),
                attribute("transposed", kind.INT, "1: gate_up [E, H, 2I], down [E, I, H]", required=True),
                attribute("interleaved", kind.INT, "1: gate and up rows in turn", required=True),
                attribute("block", kind.INT, "weights that share a scale, where they are quantised", required=False),
            ],
        )
    )  # fmt: skip
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            ROUTE,
            DOMAIN,
            VERSION,
            doc="Softmax and top-k of logits, and the scores of the chosen pairs by a formula; or the scores alone.",
            inputs=[
                parameter("logits", "F", **optional), parameter("expert_ids", "I", **optional),
                parameter("expert_weights", "F", **optional), parameter("group", "G", **optional),
                *(
                    parameter(name, "F", **optional)
                    for name in (
                        "score_scale", "x", "predictor_logits", "predictor_bias", "coefficients", "range", "saliency",
                        "saliency_range",
                    )
                ),
            ],
            outputs=[
                parameter("out_ids", "I", **optional), parameter("out_weights", "F", **optional),
                parameter("score", "F", **optional),
            ],
            type_constraints=[
                ("F", ["tensor(float)"], "all else"), ("I", ["tensor(int64)"], "expert ids"),
                ("G", ["tensor(int32)"], "groups"),
            ],
            attributes=[
                attribute("top_k", kind.INT, "experts of a token", required=True),
                attribute("softmax_first", kind.INT, "1: softmax of all logits; 0: of the chosen ones", required=False),
                attribute("normalise", kind.INT, "1: weights are divided by their sum", required=False),
                attribute("power", kind.FLOAT, "of the saliency", required=False),
            ],
        )
    )  # fmt: skip


_register_schema()
_MODES = onnxscript.values.Opset(DOMAIN, VERSION)
_ONNX: Any = onnxscript.opset23


def _skip_experts(
    x: Any, expert_ids: Any, expert_weights: Any, group: Any, tau: Any, score_scale: Any, gate_up: Any, down: Any,
    gate_up_bias: Any, down_bias: Any, activation: str, alpha: float, limit: float, transposed: bool, interleaved: bool,
    score: Any, gate_up_scales: Any = None, down_scales: Any = None, block: int = 0,
) -> Any:  # fmt: skip
    inputs = [
        x, expert_ids, expert_weights, group, tau, score_scale, gate_up, down, gate_up_bias, down_bias, score,
        gate_up_scales, down_scales,
    ]  # fmt: skip
    while inputs[-1] is None:  # those in between keep their place, empty
        inputs.pop()
    return _MODES.SkipExperts(
        *inputs,
        activation=activation,
        alpha=alpha,
        limit=limit,
        transposed=int(transposed),
        interleaved=int(interleaved),
        **({"block": block} if block else {}),
        _outputs=2,
    )


def _score(
    expert_ids: Any, expert_weights: Any, group: Any, score_scale: Any, x: Any, predictor_logits: Any, coefficients: Any,
    range: Any, saliency: Any, saliency_range: Any, power: float, top_k: int,
) -> Any:  # fmt: skip
    own = [None, expert_ids, expert_weights, group, score_scale, x, predictor_logits, None, coefficients, range]
    salient = [] if saliency is None else [saliency, saliency_range]
    return _MODES.Route(*own, *salient, power=power, top_k=top_k, _outputs=3)[2]


def _last_rows(x: Any, count: Any) -> Any:
    """Rows -count and after; count 0 begins at row 0 and so gives all of them."""
    ends = _ONNX.Constant(value_ints=[torch.iinfo(torch.int64).max])
    return _ONNX.Slice(x, _ONNX.Neg(count), ends, _ONNX.Constant(value_ints=[1]))


def _softmax(x: Any, dim: int, dtype: int = -1) -> Any:
    """A router's softmax of bfloat16 logits is one in float32. The exporter's own would round first and then cast, and half of
    the probabilities would be equal.
    """
    return _ONNX.Softmax(_ONNX.Cast(x, to=dtype) if dtype > 0 else x, axis=dim)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...)."""
    return {
        torch.ops.modes_trace.skip_experts.default: _skip_experts,
        torch.ops.modes_trace.score.default: _score,
        torch.ops.modes_trace.last_rows.default: _last_rows,
        torch.ops.aten.softmax.int: _softmax,
    }
