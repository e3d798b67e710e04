"""InternVL3.5 with a GPT-OSS text model: every second layer sees a sliding window, and every head has an attention sink.

The sinks reach the attention as `s_aux`; `modes_cli.export.sinks` says what becomes of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from modes_cli.export import norms
from modes_cli.export.attention import Cache
from modes_cli.export.families.internvl import InternVL


class InternVLGptOss(InternVL):
    def run_text(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache, deepstack: list[Tensor]
    ) -> Tensor:
        norms.replace(text)
        return super().run_text(text, embeds, positions, mask, cache, deepstack)

    def masks(self, config: Any, mask: Tensor) -> dict[str, Tensor]:
        """By layer type. The model makes such a dictionary of its mask itself, and takes one that is there already."""
        sliding = mask if config.sliding_window is None else mask & within(mask, int(config.sliding_window))
        return {"full_attention": mask, "sliding_attention": sliding}


def within(mask: Tensor, window: int) -> Tensor:
    """[S, P + S] bool: which places lie less than `window` before a token's. `mask` is [B, 1, S, P + S]."""
    length, total = mask.shape[-2:]
    query = torch.arange(length, device=mask.device)[:, None] + (total - length)
    return torch.arange(total, device=mask.device)[None] > query - window
