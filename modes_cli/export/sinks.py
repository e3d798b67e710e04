"""Attention sinks (GPT-OSS) for an attention operator that knows none.

A sink is a logit s per head that takes part in the softmax and carries no value:

    out = sum_j exp(a_j) v_j / (exp(s) + sum_j exp(a_j)),   a_j = scaling * q . k_j

The same comes out of one more key with a zero value whose logit is s for every query. For that, queries get one more
coordinate, s / scaling, which is 0 in all keys and 1 in the added one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_MULTIPLE = 8  # of the coordinates; the fast attention kernels of GPUs take no other head sizes


def with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of a plain attention with the same `scaling` whose output [B, heads, S, D] is that with sinks.

    Args:
        query: [B, heads, S, D]; key, value: [B, kv heads, T, D].
        mask: [B, 1, S, T] bool, True where a token may look.
        sinks: [heads].
        scaling: what logits are multiplied with.

    Returns:
        query [B, heads, S, D'], key [B, kv heads, T + 1, D'], value [B, kv heads, T + 1, D], mask [B, 1, S, T + 1].
    """
    batch, heads, length, size = query.shape
    more = _MULTIPLE - size % _MULTIPLE  # at least one
    column = (sinks.to(query.dtype) / scaling)[None, :, None, None].expand(batch, heads, length, 1)
    added = F.pad(torch.ones(1, 1, 1, 1, dtype=key.dtype, device=key.device), (size, more - 1))
    return (
        torch.cat([query, F.pad(column, (0, more - 1))], -1),
        torch.cat([F.pad(key, (0, more)), added.expand(batch, key.shape[1], 1, size + more)], 2),
        F.pad(value, (0, 0, 0, 1)),
        F.pad(mask, (0, 1), value=True),
    )
