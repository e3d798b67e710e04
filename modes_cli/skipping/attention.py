"""How much attention each token receives, for rules that ask: where it stands among the tokens of its sequence.

Only eager attention has the matrix of weights. So for a forward whose rule asks, the decoder runs eager attention, and whatever
it ran before afterwards; each MoE layer's attention is the module of its decoder layer that returns a [B, heads, S, keys]
tensor. In rules that do not ask, nothing is changed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modes_cli.errors import ModesError
from modes_cli.models.blocks import MoEBlock


class AttentionReceived:
    """Collects attention while a forward runs: `begin`, any number of `standing`, `end`.

    Args:
        blocks: the MoE layers whose attention is wanted.
    """

    def __init__(self, model: nn.Module, blocks: list[MoEBlock]) -> None:
        self._received: dict[int, Tensor] = {}  # by decoder layer: [B, S], over S tokens of this forward
        self._real: Tensor | None = None
        self._before: str | None = None
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        self._config = decoder.config
        self._undo: list[Callable[[], None]] = []
        for block in blocks:
            layer = model.get_submodule(block.moe.rpartition(".")[0])
            for child in layer.children():
                self._undo.append(child.register_forward_hook(partial(self._see, block.layer)).remove)

    def remove(self) -> None:
        self.end()
        while self._undo:
            self._undo.pop()()

    def begin(self, real: Tensor) -> None:
        """A forward begins; `real` [B, S] bool is False at padding."""
        self._received, self._real = {}, real
        self._before = self._config._attn_implementation
        self._config._attn_implementation = "eager"

    def end(self) -> None:
        """It has ended, well or not."""
        if self._before is not None:
            self._config._attn_implementation = self._before
        self._received, self._real, self._before = {}, None, None

    def _see(self, layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._real is None or not isinstance(output, tuple):
            return
        batch, length = self._real.shape
        for weights in output:
            if isinstance(weights, Tensor) and weights.dim() == 4 and weights.shape[::2] == (batch, length):
                self._received[layer] = received(weights.float().mean(1)[..., -length:], self._real.to(weights.device))

    def standing(self, block: MoEBlock, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """(tokens,) float32: share of the real tokens of the same sequence that are more important; 1 for padding, and where a
        sequence has no other token.

        Args:
            hidden: (tokens, H), what the experts are given.
            rows: (B * S,) bool, which tokens these are; None: all.

        Raises:
            ModesError: the model's attention modules return no weights.
        """
        seen = self._received.get(block.layer)
        if seen is None or self._real is None:
            raise ModesError(
                f"decoder layer `{block.layer}` gives no attention weights",
                hint="take a policy that does not look at attention",
            )
        norm = hidden.float().abs().sum(-1)
        if rows is not None:
            norm = torch.zeros(rows.shape, dtype=norm.dtype, device=norm.device).masked_scatter(rows, norm)
        standing = places(seen.to(norm.device) * norm.view(seen.shape), self._real.to(norm.device)).reshape(-1)
        return standing if rows is None else standing[rows]


def received(weights: Tensor, real: Tensor) -> Tensor:
    """[B, S]: the mean attention that each token is given by the tokens from itself on; `weights` [B, S queries, S keys]."""
    length = real.shape[1]
    seeing = real[:, :, None] & torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    return (weights * seeing).sum(1) / seeing.sum(1).clamp(min=1)


def places(importance: Tensor, real: Tensor) -> Tensor:
    """[B, S] float32: share of a row's real tokens that are more important, equal ones before the token among them."""
    order = torch.argsort(importance.masked_fill(~real, -1.0), dim=1, descending=True, stable=True)
    place = torch.argsort(order, dim=1)
    count = real.sum(1, keepdim=True)
    return torch.where(real & (count > 1), place / count.clamp(min=1), 1.0)
