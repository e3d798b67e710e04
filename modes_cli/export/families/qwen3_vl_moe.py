"""Qwen3-VL-MoE: M-RoPE, DeepStack, and a vision tower over packed patches of any mix of sizes."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import apply_rotary_pos_emb_vision

from modes_cli.export import attention
from modes_cli.export.attention import Cache
from modes_cli.export.skeleton import keep_only


class Qwen3VLMoe:
    text = "model.language_model"
    head = "lm_head"
    embedding = "model.language_model.embed_tokens"
    vision = "model.visual"
    position_rows = 3
    placeholder: int | None = None
    frames_together = False

    def deepstack(self, config: Any) -> int:
        return len(config.vision_config.deepstack_visual_indexes)

    def run_text(
        self, text: nn.Module, embeds: Tensor, positions: Tensor, mask: Tensor, cache: Cache, deepstack: list[Tensor]
    ) -> Tensor:
        # Features are zero at text rows, so a sum takes the place of boolean indexing, whose shape depends on the data.
        text._deepstack_process = lambda hidden, _, features: hidden + features  # type: ignore[assignment]
        attention.replace(text, multimodal=cache.multimodal)
        out = text(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, past_key_values=cache,
            visual_pos_masks=mask, deepstack_visual_embeds=deepstack, use_cache=False,
        )  # fmt: skip
        return cast(Tensor, out.last_hidden_state)

    def vision_tower(self, model: nn.Module, config: Any) -> nn.Module:
        return VisionTower(keep_only(model, [self.vision]))

    def vision_inputs(self, config: Any) -> dict[str, tuple[Tensor, list[str | int]]]:
        vision = config.vision_config
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches, grids = torch.zeros(10 * vision.spatial_merge_size**2, values), torch.zeros(2, 3, dtype=torch.int64)
        return {"pixel_values": (patches, ["patches", values]), "image_grid_thw": (grids, ["images", 3])}


class VisionTower(nn.Module):
    """The tower with everything it derives from the grids computed by plain arithmetic over the patches' indices."""

    def __init__(self, tree: nn.Module) -> None:
        super().__init__()
        self.model = tree.get_submodule("model")
        self.mask: Tensor | None = None
        visual: Any = self.model.visual
        for block in visual.blocks:
            block.attn.forward = _attention(self, block.attn)
        visual.patch_embed.forward = _patch_embed(visual.patch_embed.proj)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        visual: Any = self.model.visual
        rows, cols, heights, widths, segment = patch_places(image_grid_thw, pixel_values.shape[0], visual.spatial_merge_size)
        self.mask = (segment[:, None] == segment[None])[None, None]
        indices, weights = bilinear(rows, cols, heights, widths, visual.num_grid_per_side)
        out = visual(
            pixel_values,
            None,
            position_ids=torch.stack([rows, cols], -1),
            interp_indices=indices,
            interp_weights=weights,
            cu_seqlens=segment,
        )
        self.mask = None
        return torch.cat([out.pooler_output, *out.deepstack_features], -1)


def patch_places(grid: Tensor, patches: int, merge: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Where each packed patch lies.

    Args:
        grid: [images, 3] int64: frames, rows, columns of each image or video, in patches.
        patches: their sum.
        merge: side of the squares of patches that become one token; patches are stored square by square.

    Returns:
        row, column of each patch; rows, columns of its image; and a number that patches of the same frame share: [N] each.
    """
    frames, height, width = grid.unbind(1)
    count = frames * height * width
    end = count.cumsum(0)
    index = torch.arange(patches, device=grid.device)
    image = (index[:, None] >= end[None]).sum(1)  # a sum of comparisons instead of repeat_interleave: no shape depends on data
    heights, widths = height[image], width[image]
    within = index - (end - count)[image]
    per_frame = heights * widths
    frame = torch.div(within, per_frame, rounding_mode="floor")
    within = within - frame * per_frame
    square, across = merge * merge, torch.div(widths, merge, rounding_mode="floor")
    block = torch.div(within, square, rounding_mode="floor")
    inside = within - block * square
    block_row = torch.div(block, across, rounding_mode="floor")
    inside_row = torch.div(inside, merge, rounding_mode="floor")
    rows = block_row * merge + inside_row
    cols = (block - block_row * across) * merge + inside - inside_row * merge
    return rows, cols, heights, widths, (frames.cumsum(0) - frames)[image] + frame


def bilinear(rows: Tensor, cols: Tensor, heights: Tensor, widths: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Four table positions and weights per patch [N, 4]: a square table of side x side, resampled with aligned corners."""
    row_taps, row_weights = _taps(rows, heights, side)
    col_taps, col_weights = _taps(cols, widths, side)
    indices = row_taps[:, :, None] * side + col_taps[:, None, :]
    weights = row_weights[:, :, None] * col_weights[:, None, :]
    return indices.reshape(-1, 4), weights.reshape(-1, 4)


def _taps(index: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    place = index.to(torch.float32) * (side - 1) / torch.clamp(size - 1, min=1).to(torch.float32)
    low = torch.floor(place)
    share = place - low
    first = low.to(torch.int64)
    return torch.stack([first, torch.clamp(first + 1, max=side - 1)], -1), torch.stack([1 - share, share], -1)


def _attention(tower: VisionTower, attn: Any) -> Any:
    def forward(hidden: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        patches = hidden.shape[0]
        query, key, value = attn.qkv(hidden).reshape(patches, 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=tower.mask, scale=attn.scaling)
        return cast(Tensor, attn.proj(out[0].transpose(0, 1).reshape(patches, -1)))

    return forward


def _patch_embed(conv: nn.Conv3d) -> Any:
    """The kernel covers a patch exactly, so the convolution is one matrix product."""

    def forward(patches: Tensor) -> Tensor:
        return F.linear(patches, conv.weight.reshape(conv.out_channels, -1), conv.bias)

    return forward
