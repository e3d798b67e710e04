"""What the exporter asks of a model family."""

from typing import Any, Protocol

from torch import Tensor, nn

from modes_cli.export.attention import Cache


class Family(Protocol):
    """Shapes: B batch, S new tokens, P past tokens, H hidden size, n deepstack features, M image tokens."""

    text: str  # module path of the text model
    head: str  # of the output projection
    embedding: str  # of the token embedding
    vision: str  # of the vision tower
    position_rows: int  # 3: position_ids [3, B, S]; 1: [B, S]
    placeholder: int | None  # whose embedding an image token without features has; None: its own
    frames_together: bool  # whether the frames of a clip are seen together; else each may go through the tower alone

    def deepstack(self, config: Any) -> int:
        """How many decoder layers receive further image features."""
        ...

    def run_text(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache, deepstack: list[Tensor]
    ) -> Tensor:
        """Hidden states [B, S, H] after the last norm.

        Args:
            text: the text model, traced.
            embeds: [B, S, H].
            positions: [3, B, S] or [B, S] int64.
            mask: [B, 1, S, P + S] bool, True where a token may look.
            deepstack: n of [B, S, H], zero at text rows.
        """
        ...

    def vision_tower(self, model: nn.Module, config: Any) -> nn.Module:
        """forward(the vision inputs, by name) -> [M, (1 + n) * H]. It owns the tower at its own path."""
        ...

    def vision_inputs(self, config: Any) -> dict[str, tuple[Tensor, list[str | int]]]:
        """What the vision graph takes: for each name an example and its shape, with a name for every axis that may vary.

        The first is `pixel_values`, packed patches or tiles of one size. A second one, where there is one, has a row per
        image, rows and columns in patches last.
        """
        ...
