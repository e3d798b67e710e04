"""InternVL3.5: plain positions, no DeepStack, and a vision tower over square tiles of one size."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from modes_cli.export import attention
from modes_cli.export.attention import Cache
from modes_cli.export.skeleton import keep_only

_PARTS = ("model.vision_tower", "model.multi_modal_projector")


class InternVL:
    """With a Qwen3-MoE text model."""

    text = "model.language_model"
    head = "lm_head"
    embedding = "model.language_model.embed_tokens"
    vision = "model.vision_tower"
    position_rows = 1
    placeholder: int | None = None
    frames_together = False

    def deepstack(self, config: Any) -> int:
        return 0

    def run_text(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache, deepstack: list[Tensor]
    ) -> Tensor:
        attention.replace(text, multimodal=cache.multimodal)
        out = text(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=self.masks(text.config, mask),
            past_key_values=cache,
            use_cache=False,
        )
        return cast(Tensor, out.last_hidden_state)

    def masks(self, config: Any, mask: Tensor) -> Any:
        """What the text model takes as its mask [B, 1, S, P + S]."""
        return mask

    def vision_tower(self, model: nn.Module, config: Any) -> nn.Module:
        return VisionTower(model)

    def vision_inputs(self, config: Any) -> dict[str, tuple[Tensor, list[str | int]]]:
        vision = config.vision_config
        tile = [int(vision.num_channels), *(int(side) for side in vision.image_size)]
        return {"pixel_values": (torch.zeros(2, *tile), ["tiles", *tile])}


class VisionTower(nn.Module):
    """Tower, pixel shuffle and projector, as the model itself puts them together."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = keep_only(model, list(_PARTS)).get_submodule("model")
        # In a tuple, so that the text model's weights do not become part of this module.
        self._whole: tuple[Any] = (model.get_submodule("model"),)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self._whole[0].get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return features.flatten(0, 1)
