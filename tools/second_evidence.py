"""A training-only loss: where one layer's attention should look when a question is about to be answered.

A small decoder finds out last how to look up the cell that a question asks about, and learns little before. The loss tells
two heads of one layer which vision tokens hold the evidence; nothing of it stays in the model but its weights.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

HEADS = 2  # of a layer's, that are told


def evidence_targets(cells: Sequence[Sequence[int]], grid: int, tokens_per_side: int) -> Tensor:
    """For each question the share of attention that each vision token should get: [N, tokens], rows sum to 1, or to 0
    where no cell is evidence.

    Args:
        cells: for each question the indices of the cells, in reading order, that its answer follows from.
        grid: cells per side.
    """
    line = np.arange(tokens_per_side) // (tokens_per_side // grid)
    cell_of = (line[:, None] * grid + line[None, :]).reshape(-1)
    targets = np.array([np.isin(cell_of, list(own)) for own in cells], dtype=np.float32)
    return torch.from_numpy(targets / np.maximum(targets.sum(1, keepdims=True), 1))


def first_of_answers(answer: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and positions at which an answer's first token is predicted, in reading order. `answer` [B, S] bool."""
    before = F.pad(answer[:, :-1], (1, 0))
    rows, positions = (answer & ~before).nonzero(as_tuple=True)
    return rows, positions


class EvidenceAttention:
    """Listens to a `DeepseekV3Attention` without a query latent; `loss` is that of its last forward."""

    def __init__(self, attention: Any) -> None:
        self._layer, self._seen = attention, dict[str, Any]()
        attention.q_proj.register_forward_hook(lambda _m, _i, out: self._seen.__setitem__("query", out))
        attention.register_forward_pre_hook(self._see_rotation, with_kwargs=True)
        expand = attention.expand_kv

        def expanding(*given: Tensor) -> tuple[Tensor, Tensor]:
            key, value = expand(*given)
            self._seen["key"] = key
            return key, value

        attention.expand_kv = expanding

    def _see_rotation(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen["rotation"] = kwargs["position_embeddings"]

    def loss(self, answer: Tensor, first_vision: int, targets: Tensor) -> Tensor:
        """Cross-entropy of `targets` [N, T] with attention over the T vision tokens, minus the least possible; scalar.

        Args:
            answer: [B, S] bool, at whose N starts the questions are answered.
            first_vision: position of the first vision token in each row.
        """
        layer, (cos, sin) = self._layer, self._seen["rotation"]
        query = self._seen["query"].unflatten(-1, (-1, layer.qk_head_dim)).transpose(1, 2)
        plain, turned = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], -1)
        turned, _ = apply_rotary_pos_emb_interleave(turned, turned, cos, sin)
        rows, positions = first_of_answers(answer)
        query = torch.cat([plain, turned], -1)[rows, :HEADS, positions]  # [N, heads, head size]
        key = self._seen["key"][:, :HEADS, first_vision : first_vision + targets.shape[1]][rows]
        logits = torch.einsum("nhd,nhtd->nht", query, key) * layer.scaling
        surprise = -(targets[:, None] * logits.log_softmax(-1)).sum(-1)
        least = -(targets * targets.clamp_min(1e-9).log()).sum(-1)
        asked = targets.sum(-1) > 0
        return (surprise.mean(1) - least)[asked].mean()
