"""Kimi-VL as it was published, in plain torch and float64, from a checkpoint's files. Nothing of transformers is used.

One sequence at a time; shapes: S tokens, P patches, T past tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Cache = list[tuple[Tensor, Tensor]]  # per layer: latents [T, rank] and rotated shared keys [T, rope]


class Reference:
    """`keep`: which of a token's experts are computed, from its id and their shares [k] of the weight; None: all of them."""

    keep: Callable[[int, Tensor], Tensor] | None = None

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.text, self.vision = self.config["text_config"], self.config["vision_config"]
        self.tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.tensors.update({name: tensor.double() for name, tensor in load_file(path).items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self[f"{name}.weight"].T
        return out + self[f"{name}.bias"] if f"{name}.bias" in self.tensors else out

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self[f"{name}.weight"] + self[f"{name}.bias"]

    def rms_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self[f"{name}.weight"]

    # -- vision ---------------------------------------------------------------------------------------------------------

    def image_features(self, pixels: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """[P, 3, patch, patch] and (rows, columns) per image -> [tokens, H], all images packed."""
        patch = "vision_tower.patch_embed"
        x = pixels.double().flatten(1) @ self[f"{patch}.proj.weight"].flatten(1).T + self[f"{patch}.proj.bias"]
        x = x + torch.cat([self.position_table(rows, columns) for rows, columns in grids])
        turns = torch.cat([self.vision_turns(rows, columns) for rows, columns in grids])
        image = torch.cat([torch.full((rows * columns,), i) for i, (rows, columns) in enumerate(grids)])
        for n in range(self.vision["num_hidden_layers"]):
            block = f"vision_tower.encoder.blocks.{n}"
            x = x + self.vision_attention(self.layer_norm(x, f"{block}.norm0"), block, turns, image)
            inner = self.linear(self.layer_norm(x, f"{block}.norm1"), f"{block}.mlp.fc0")
            gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            x = x + self.linear(gelu, f"{block}.mlp.fc1")
        x = self.layer_norm(x, "vision_tower.encoder.final_layernorm")
        merged, start = [], 0
        for rows, columns in grids:
            for top in range(0, rows, 2):
                for left in range(0, columns, 2):
                    square = [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)]
                    merged.append(x[[start + row * columns + column for row, column in square]])
            start += rows * columns
        normed = self.layer_norm(torch.stack(merged), "multi_modal_projector.pre_norm").flatten(1)
        inner = self.linear(normed, "multi_modal_projector.linear_1")
        gelu = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        return self.linear(gelu, "multi_modal_projector.linear_2")

    def position_table(self, rows: int, columns: int) -> Tensor:
        """The learned table resampled with Keys' cubic kernel (a = -0.75), pixel centres at one half, edges repeated."""
        table = self["vision_tower.patch_embed.pos_emb.weight"]
        down, across = _cubic(table.shape[0], rows), _cubic(table.shape[1], columns)
        return torch.einsum("ra,abh,cb->rch", down, table, across).flatten(0, 1)

    def vision_turns(self, rows: int, columns: int) -> Tensor:
        """exp(i angle) [rows * columns, head / 2]: even places turn with the column, odd ones with the row."""
        size = self.vision["hidden_size"] // self.vision["num_attention_heads"]
        speed = 10000.0 ** (-torch.arange(0, size, 4).double() / size)
        row, column = (t.flatten().double() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        angle = torch.stack([column[:, None] * speed, row[:, None] * speed], -1).flatten(1)
        return torch.polar(torch.ones_like(angle), angle)

    def vision_attention(self, x: Tensor, block: str, turns: Tensor, image: Tensor) -> Tensor:
        heads = self.vision["num_attention_heads"]
        query, key, value = self.linear(x, f"{block}.wqkv").view(len(x), 3, heads, -1).unbind(1)
        query, key = _turned(query, turns[:, None]), _turned(key, turns[:, None])
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(image[:, None] != image[None], -math.inf)
        return self.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1), f"{block}.wo")

    # -- text -----------------------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int], features: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """[S, V] of the tokens after those in `cache`, which is extended."""
        placeholder = self.config["media_placeholder_token_id"]
        x = self["language_model.model.embed_tokens.weight"][torch.tensor(ids)]
        if features is not None:
            x[torch.tensor(ids) == placeholder] = features
        cache = [] if cache is None else cache
        past = len(cache[0][0]) if cache else 0
        eps = self.text["rms_norm_eps"]
        for n in range(self.text["num_hidden_layers"]):
            layer = f"language_model.model.layers.{n}"
            if len(cache) == n:
                cache.append((x.new_zeros(0, self.text["kv_lora_rank"]), x.new_zeros(0, self.text["qk_rope_head_dim"])))
            normed = self.rms_norm(x, f"{layer}.input_layernorm", eps)
            x = x + self.attention(normed, f"{layer}.self_attn", cache, n, past)
            normed = self.rms_norm(x, f"{layer}.post_attention_layernorm", eps)
            dense = n < self.text["first_k_dense_replace"]
            x = x + (self.gated(normed, f"{layer}.mlp") if dense else self.experts(normed, f"{layer}.mlp", ids))
        return self.linear(self.rms_norm(x, "language_model.model.norm", eps), "language_model.lm_head")

    def attention(self, x: Tensor, name: str, cache: Cache, n: int, past: int) -> Tensor:
        """Multi-head latent attention: what is kept is a latent and one key for the positions, shared by all heads."""
        heads, rank = self.text["num_attention_heads"], self.text["kv_lora_rank"]
        plain, rope, size = (self.text[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        turns = self.text_turns(torch.arange(past, past + len(x)))
        query = self.linear(x, f"{name}.q_proj").view(len(x), heads, plain + rope)
        latent, shared = self.linear(x, f"{name}.kv_a_proj_with_mqa").split([rank, rope], -1)
        latent = self.rms_norm(latent, f"{name}.kv_a_layernorm", 1e-6)
        latent, shared = torch.cat([cache[n][0], latent]), torch.cat([cache[n][1], _turned(shared, turns)])
        cache[n] = (latent, shared)
        key, value = self.linear(latent, f"{name}.kv_b_proj").view(len(latent), heads, plain + size).split([plain, size], -1)
        scores = torch.einsum("qhd,khd->hqk", query[..., :plain], key)
        scores = scores + torch.einsum("qhd,kd->hqk", _turned(query[..., plain:], turns[:, None]), shared)
        scores = scores / math.sqrt(plain + rope)
        later = torch.arange(len(latent))[None] > torch.arange(past, past + len(x))[:, None]
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        return self.linear(torch.einsum("hqk,khd->qhd", weights, value).flatten(1), f"{name}.o_proj")

    def text_turns(self, positions: Tensor) -> Tensor:
        size = self.text["qk_rope_head_dim"]
        angle = positions.double()[:, None] * self.text["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
        return torch.polar(torch.ones_like(angle), angle)

    def gated(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def experts(self, x: Tensor, name: str, ids: Sequence[int]) -> Tensor:
        """Chosen by corrected sigmoid scores, weighted by the scores themselves; the shared experts see every token."""
        out = self.gated(x, f"{name}.shared_experts")
        for token, hidden in enumerate(x):
            scores = torch.sigmoid(self[f"{name}.gate.weight"] @ hidden)
            corrected = scores + self[f"{name}.gate.e_score_correction_bias"]
            chosen = corrected.topk(self.text["num_experts_per_tok"]).indices
            weights = self.text["routed_scaling_factor"] * scores[chosen] / (scores[chosen].sum() + 1e-20)
            kept = torch.ones_like(chosen) if self.keep is None else self.keep(ids[token], weights / weights.sum())
            for slot in kept.nonzero().flatten():
                out[token] += weights[slot] * self.gated(hidden, f"{name}.experts.{int(chosen[slot])}")
        return out


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring values as complex numbers, times exp(i angle)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def _cubic(source: int, target: int) -> Tensor:
    """[target, source]: the weights of one axis."""
    a, out = -0.75, torch.zeros(target, source, dtype=torch.float64)
    for index in range(target):
        place = (index + 0.5) * source / target - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            out[index, min(max(tap, 0), source - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return out
