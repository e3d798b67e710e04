"""Decoders that `modes bench --shape` builds with random weights: real sizes, and what is timed of them."""

from dataclasses import dataclass
from typing import Any

from modes_cli.errors import BadOption


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Qwen3-VL-MoE text decoder.

    Attributes:
        text: fields of its text configuration.
        prefill: sequences and tokens of each.
        context: tokens that a decode step attends to, its own included.
    """

    name: str
    text: dict[str, Any]
    prefill: tuple[int, int]
    context: int

    def config(self, layers: int | None) -> dict[str, Any]:
        """Fields of a text configuration in which every layer has experts."""
        every_layer = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
        own = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        return {**self.text, **every_layer, **own} | ({} if layers is None else {"num_hidden_layers": layers})


def _rope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section), "mrope_interleaved": True}


_SHAPES = (
    DecoderShape(
        name="qwen3-vl-30b-a3b",
        text={
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 262144,
            "rope_parameters": _rope(24, 20, 20),
        },
        prefill=(8, 1024),
        context=2048,
    ),
    DecoderShape(
        name="tiny",
        text={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": _rope(4, 2, 2),
        },
        prefill=(2, 64),
        context=48,
    ),
)


def decoder_shape(name: str) -> DecoderShape:
    """A shape by name.

    Raises:
        BadOption: there is none of that name.
    """
    for shape in _SHAPES:
        if shape.name == name:
            return shape
    known = ", ".join(shape.name for shape in _SHAPES)
    raise BadOption(f"`--shape {name}` is not known", hint=f"shapes are {known}")
