"""GPT-OSS's norms as ai.onnx's RMSNormalization.

They multiply with weights in float32 before they round. Traced with weights of another type, that is a product of two types,
which ONNX has not, and which is not recognised as a norm.
"""

from collections.abc import Callable
from typing import Any, cast

import onnxscript
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

torch.library.define("modes_trace::rms_norm", "(Tensor x, Tensor weight, float epsilon) -> Tensor")


@torch.library.register_fake("modes_trace::rms_norm")
def _rms_norm_shape(x: Tensor, *_: Any) -> Tensor:
    """As x."""
    return torch.empty_like(x)


def replace(text: nn.Module) -> None:
    """Make every such norm of a text model this operator."""
    norms: list[Any] = [module for module in text.modules() if isinstance(module, GptOssRMSNorm)]
    for norm in norms:
        norm.forward = _forward(norm)


def _forward(norm: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden_states: cast(Tensor, torch.ops.modes_trace.rms_norm(hidden_states, norm.weight, norm.variance_epsilon))


_ONNX: Any = onnxscript.opset23
_FLOAT = 1  # of TensorProto: the type that is computed in


def _rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    return _ONNX.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=_FLOAT)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export(custom_translation_table=...)."""
    return {torch.ops.modes_trace.rms_norm.default: _rms_norm}
