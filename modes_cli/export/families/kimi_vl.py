"""Kimi-VL: DeepSeek-V3's text model, and MoonViT over pictures of any mix of sizes."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modes_cli.export.attention import Cache
from modes_cli.export.families import deepseek_text, moonvit
from modes_cli.export.skeleton import keep_only
from modes_cli.models.families.moonvit import rotate


class KimiVL:
    text = "language_model.model"
    head = "language_model.lm_head"
    embedding = "language_model.model.embed_tokens"
    vision = "vision_tower"
    position_rows = 1
    placeholder: int | None = None
    frames_together = False

    def deepstack(self, config: Any) -> int:
        return 0

    def run_text(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache, deepstack: list[Tensor]
    ) -> Tensor:
        return deepseek_text.run_text(text, embeds, positions, mask, cache)

    def vision_tower(self, model: nn.Module, config: Any) -> nn.Module:
        return VisionTower(keep_only(model, [self.vision, "multi_modal_projector"]), config.vision_config)

    def vision_inputs(self, config: Any) -> dict[str, tuple[Tensor, list[str | int]]]:
        patch = [3, config.vision_config.patch_size, config.vision_config.patch_size]
        return {
            "pixel_values": (torch.zeros(48, *patch), ["patches", *patch]),
            "image_grid_hws": (torch.zeros(2, 2, dtype=torch.int64), ["images", 2]),
        }


class VisionTower(nn.Module):
    """Tower and projector, with everything that is derived from the grids computed from the patches' indices."""

    def __init__(self, tree: nn.Module, config: Any) -> None:
        super().__init__()
        for name, child in tree.named_children():  # not as one submodule: names must stay the checkpoint's
            self.add_module(name, child)
        self.merge = moonvit.square(config.merge_kernel_size)
        self.mask: Tensor | None = None
        for block in cast(Any, self.vision_tower).encoder.blocks:
            block.attention = _attention(self, block)

    def forward(self, pixel_values: Tensor, image_grid_hws: Tensor) -> Tensor:
        embed, encoder = cast(Any, self.vision_tower).patch_embed, cast(Any, self.vision_tower).encoder
        patches = pixel_values.shape[0]
        grid = F.pad(image_grid_hws, (1, 0), value=1)  # one frame
        where = moonvit.places(grid, patches)
        self.mask = (where.image[:, None] == where.image[None])[None, None]
        hidden = moonvit.embedded(embed.proj, pixel_values) + moonvit.resampled(embed.pos_emb.weight, where)
        cos, sin = encoder.rotary_emb(hidden, torch.stack([where.rows, where.cols], -1))
        half = cos.shape[-1] // 2  # both halves are the same
        for block in encoder.blocks:
            hidden = block(hidden, cos[:, :half], sin[:, :half], [])
        self.mask = None
        order, _, _ = moonvit.merged(grid, patches // self.merge**2, self.merge)
        return cast(Tensor, cast(Any, self.multi_modal_projector)(encoder.final_layernorm(hidden)[order]))


def _attention(tower: VisionTower, block: Any) -> Any:
    def attention(hidden: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        query, key, value = block.wqkv(hidden).unflatten(-1, (3, block.heads, -1)).unbind(1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=tower.mask)
        return cast(Tensor, block.wo(out[0].transpose(0, 1).flatten(1)))

    return attention
