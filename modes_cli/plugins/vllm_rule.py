"""A bundle's rule on what vLLM's router chose: which (token, expert) pairs are left out. Knows tensors, and nothing of vLLM.

Everything is computed from buffers at fixed addresses and waits for no device, so it can be captured in a CUDA graph.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from modes_cli.errors import BadArtifact
from modes_cli.models.groups import TokenGroups, groups_by_id, with_decode
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.policy import Rule, routing_probability

Skip = Literal["weight", "drop"]
DROPPED = -1  # an expert id that vLLM's kernels leave out


class TokenReader:
    """The group of every row of a step, from the buffers in which an engine keeps the step's tokens.

    Args:
        input_ids: [N] integer, the step's tokens one request after the other; images stand as their placeholder's id.
        query_start: [R + 1] integer, where each request's tokens begin; behind the last request its end, repeated.
        tokens: the bundle's token groups.
    """

    def __init__(self, input_ids: Tensor, query_start: Tensor, tokens: TokenGroups) -> None:
        self._ids, self._start = input_ids, query_start
        lists = (tokens.vision_ids, tokens.special_ids, tokens.audio_ids)
        self._lists = [torch.tensor(ids, dtype=torch.int64, device=input_ids.device) for ids in lists]

    def groups(self, rows: int) -> Tensor:
        """[rows] int32. Rows behind the last token are padding; what they are called makes no difference.

        The last row of each request predicts a token of the answer: `decode`, if it is text. So is the last row of each part
        of a prompt that is computed in parts, which predicts nothing.

        Raises:
            ValueError: more rows than the engine has tokens for.
        """
        if rows > len(self._ids):
            raise ValueError(f"the experts see {rows} tokens, the engine's buffer holds {len(self._ids)}")
        last = (self._start[1:].long() - 1).clamp(0, max(rows - 1, 0))
        decoding = torch.zeros(rows, dtype=torch.bool, device=self._ids.device)
        if rows:
            decoding.index_fill_(0, last, True)
        return with_decode(groups_by_id(self._ids[:rows], *self._lists), decoding)


@dataclass(frozen=True)
class LayerRule:
    """What one MoE layer does with its router's choice.

    Attributes:
        rule: on the layer's device, see `placed`.
        layer: index among the MoE layers.
        reader: of the model's tokens.
        hidden_size: of the model; an engine may have padded its hidden states.
        skip: `weight`: a skipped pair's weight is 0, its expert is computed all the same; `drop`: its expert id is -1 as well.
    """

    rule: Rule
    layer: int
    reader: TokenReader
    hidden_size: int
    skip: Skip

    def __call__(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """weights [T, k] and ids [T, k] of the pairs that stay; dtypes as given.

        Args:
            hidden: [T, H or more], what the experts are given.
            weights: [T, k], in any common scale: it cancels out.
            ids: [T, k] of all experts, before any mapping to where they lie.
        """
        keep = self.keep(hidden, weights, ids)
        kept = torch.where(keep, weights, torch.zeros_like(weights))
        return kept, torch.where(keep, ids, torch.full_like(ids, DROPPED)) if self.skip == "drop" else ids

    def keep(self, hidden: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """[T, k] bool."""
        group = self.reader.groups(weights.shape[0])
        seen = Pairs(self.layer, routing_probability(weights), group, ids, hidden[:, : self.hidden_size])
        return self.rule.reaches(self.rule.score(seen), group)


def placed(rule: Rule, device: torch.device) -> Rule:
    """The rule with its tensors on a device.

    Raises:
        BadArtifact: it looks at attention weights, which an engine's kernels do not keep.
    """
    if rule.contribution is not None and rule.contribution.needs_attention:
        raise BadArtifact(
            "thresholds.safetensors",
            "policy",
            "looks at attention weights, which vLLM's kernels do not keep",
            hint="search another one: `modes search --policy modes`",
        )
    return replace(rule, score_scale=rule.score_scale.to(device), tau=rule.tau.to(device))
