"""Kimi-K2.5: DeepSeek-V3's text model, and MoonViT over pictures and over clips whose frames are seen together."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.kimi_k25.modeling_kimi_k25 import apply_rotary_pos_emb_vision

from modes_cli.export.attention import Cache
from modes_cli.export.families import deepseek_text, moonvit
from modes_cli.export.skeleton import keep_only


class KimiK25:
    text = "model.language_model"
    head = "lm_head"
    embedding = "model.language_model.embed_tokens"
    vision = "model.vision_tower"
    position_rows = 1
    placeholder: int | None = 0
    frames_together = True

    def deepstack(self, config: Any) -> int:
        return 0

    def run_text(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache, deepstack: list[Tensor]
    ) -> Tensor:
        return deepseek_text.run_text(text, embeds, positions, mask, cache)

    def vision_tower(self, model: nn.Module, config: Any) -> nn.Module:
        return VisionTower(keep_only(model, [self.vision, "model.mm_projector"]), config.vision_config)

    def vision_inputs(self, config: Any) -> dict[str, tuple[Tensor, list[str | int]]]:
        patch = [3, config.vision_config.patch_size, config.vision_config.patch_size]
        return {
            "pixel_values": (torch.zeros(48, *patch), ["patches", *patch]),
            "image_grid_thw": (torch.zeros(2, 3, dtype=torch.int64), ["images", 3]),
        }


class VisionTower(nn.Module):
    """Tower and projector. The frames of a clip attend to each other, and each token is the mean over them."""

    def __init__(self, tree: nn.Module, config: Any) -> None:
        super().__init__()
        self.model = tree.get_submodule("model")
        self.merge, self.most_frames = moonvit.square(config.merge_kernel_size), config.pos_emb_time
        self.mask: Tensor | None = None
        tower: Any = self.model.vision_tower
        for block in tower.layers:
            block.attn.forward = _attention(self, block.attn)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        tower, projector = cast(Any, self.model.vision_tower), cast(Any, self.model.mm_projector)
        embed = tower.patch_embed
        where = moonvit.places(image_grid_thw, pixel_values.shape[0])
        self.mask = (where.image[:, None] == where.image[None])[None, None]
        table = embed.pos_emb.time_position_embeddings  # row 0 is zero: a picture has no time
        time = torch.where(where.frames > 1, where.frame + 1, 0)
        hidden = moonvit.embedded(embed.proj, pixel_values)
        hidden = hidden + (moonvit.resampled(embed.pos_emb.position_embeddings, where) + table[time])
        rotary = tower.rotary_emb(hidden, torch.stack([where.rows, where.cols], -1))
        for block in tower.layers:
            hidden = block(hidden, cu_seqlens=where.image, position_embeddings=rotary)
        self.mask = None
        return cast(Tensor, projector(self._pooled(tower.final_layernorm(hidden), image_grid_thw)).squeeze(1))

    def _pooled(self, hidden: Tensor, grid: Tensor) -> Tensor:
        """[M, merge², D]: the mean over frames."""
        tokens = torch.div((grid[:, 1] * grid[:, 2]).sum(), self.merge**2, rounding_mode="floor").item()
        patches, step, frames = moonvit.merged(grid, cast(int, tokens), self.merge)
        total = hidden[patches]
        for frame in range(1, self.most_frames):
            there = frame < frames
            total = total + torch.where(there[..., None], hidden[torch.where(there, patches + frame * step, patches)], 0.0)
        return total / frames[..., None]


def _attention(tower: VisionTower, attn: Any) -> Any:
    def forward(hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        parts = (proj(hidden)[None].unflatten(-1, (attn.num_heads, -1)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        query, key, value = parts
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=tower.mask, scale=attn.scaling)
        return cast(Tensor, attn.proj(out[0].transpose(0, 1).flatten(1)))

    return forward
