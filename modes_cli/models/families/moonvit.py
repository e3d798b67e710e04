"""MoonViT, Kimi's vision tower: images of any size, packed one after the other.

The tower of transformers' kimi_k25 is the same with a time axis, which leaves a single image unchanged: its first frame has
no time embedding, and the mean over one frame is the frame. It stores queries, keys and values apart, with permuted rows.
Here parameters have the names and shapes of Kimi-VL's files, so that weights need no conversion.

Shapes: P patches of all images together, H hidden size, M = P / (merged patches) tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids


class MoonViTConfig(Kimi_K25VisionConfig):
    """As kimi_k25's, with the names that Kimi-VL's config.json has."""

    model_type = "moonvit"
    attribute_map = {"init_pos_emb_height": "pos_emb_height", "init_pos_emb_width": "pos_emb_width"}  # noqa: RUF012


class MoonViTPositionEmbedding(nn.Module):
    """A learned table [rows, columns, H], resampled to each image's grid (bicubic)."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        if config.pos_emb_height != config.pos_emb_width:
            raise ValueError(
                f"a table of position embeddings of `{config.pos_emb_height}` x `{config.pos_emb_width}`: it has to be square"
            )
        self.weight = nn.Parameter(torch.zeros(config.pos_emb_height, config.pos_emb_width, config.hidden_size))

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """`patches` [P, H] with their positions added; `grid` is [images, 3]: 1, rows, columns."""
        taps, shares = get_vision_interpolation_indices_and_weights(
            grid, self.weight.shape[0], mode="bicubic", align_corners=False
        )
        # Resampled in float32 and rounded once, as interpolation of a bfloat16 table does.
        table = self.weight.flatten(0, 1).float()
        position = F.embedding_bag(taps, table, per_sample_weights=shares.float(), mode="sum")
        return patches + position.to(patches.dtype)


class MoonViTPatchEmbed(nn.Module):
    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.pos_emb = MoonViTPositionEmbedding(config)

    def forward(self, pixel_values: Tensor, grid: Tensor) -> Tensor:
        embedded: Tensor = self.pos_emb(self.proj(pixel_values).flatten(1), grid)
        return embedded


class MoonViTMLP(nn.Module):
    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.fc0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc1(F.gelu(self.fc0(hidden), approximate="tanh"))
        return out


class MoonViTBlock(nn.Module):
    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm0 = nn.LayerNorm(size, eps=1e-5)
        self.norm1 = nn.LayerNorm(size, eps=1e-5)
        self.wqkv = nn.Linear(size, 3 * size)
        self.wo = nn.Linear(size, size)
        self.mlp = MoonViTMLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        """`hidden` [P, H]; `cos` and `sin` [P, head size / 2]; `lengths`: patches per image."""
        hidden = hidden + self.attention(self.norm0(hidden), cos, sin, lengths)
        out: Tensor = hidden + self.mlp(self.norm1(hidden))
        return out

    def attention(self, hidden: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        query, key, value = self.wqkv(hidden).unflatten(-1, (3, self.heads, -1)).unbind(1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        images = zip(*(part.transpose(0, 1).split(lengths, 1) for part in (query, key, value)), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in images], 1)
        attended: Tensor = self.wo(out.transpose(0, 1).flatten(1))
        return attended


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring values of `states` [P, heads, head size] as pairs, in float32.

    The result holds the pairs' first values, then their second ones: an order that queries and keys share cancels out.
    """
    first, second = states[..., 0::2].float(), states[..., 1::2].float()
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(states.dtype)


class MoonViTEncoder(nn.Module):
    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.rotary_emb = Kimi_K25VisionRotaryEmbedding(config)
        self.blocks = nn.ModuleList([MoonViTBlock(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)

    def forward(self, hidden: Tensor, grid: Tensor) -> Tensor:
        cos, sin = self.rotary_emb(hidden, get_vision_position_ids(grid, 1))
        half = cos.shape[-1] // 2  # both halves are the same
        lengths = grid.prod(-1).tolist()
        for block in self.blocks:
            hidden = block(hidden, cos[:, :half].float(), sin[:, :half].float(), lengths)
        out: Tensor = self.final_layernorm(hidden)
        return out


class MoonViT(nn.Module):
    """forward(pixel_values [P, 3, patch, patch], image_grid_hws [images, 2]) -> [M, patches per token, H]."""

    def __init__(self, config: MoonViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = MoonViTPatchEmbed(config)
        self.encoder = MoonViTEncoder(config)

    def forward(self, pixel_values: Tensor, image_grid_hws: Tensor) -> Tensor:
        grid = F.pad(image_grid_hws, (1, 0), value=1)  # one frame
        hidden = self.encoder(self.patch_embed(pixel_values, grid), grid)
        rows, columns = self.config.merge_kernel_size
        order = torch.tensor(merge_order(image_grid_hws.tolist(), rows, columns), device=hidden.device)
        merged: Tensor = hidden[order].unflatten(0, (-1, rows * columns))
        return merged


def merge_order(grids: list[list[int]], rows: int, columns: int) -> list[int]:
    """The indices of all patches, those that become one token beside each other."""
    order: list[int] = []
    for height, width in grids:
        index = torch.arange(len(order), len(order) + height * width)
        blocks: Any = index.view(height // rows, rows, width // columns, columns).transpose(1, 2)
        order += blocks.flatten().tolist()
    return order
