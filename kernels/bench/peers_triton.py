"""A fused MoE layer in Triton: gather, gate and up in one kernel with SwiGLU, then down, then the sum over a token's pairs.

Written as such kernels are written elsewhere (tiles of one expert's rows, a fixed grid, programs without work end at once),
so that there is one to compare with wherever Triton is. Imports triton: only imported where that is installed.
"""

# ruff: noqa: N803, E741 (sizes)
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

from kernels.bench.cases import Layer
from kernels.bench.peers_torch import Sorted, sort_pairs

jit: Any = triton.jit  # untyped

# Rows of a tile by the mean rows of an expert. Triton then picks columns, depth and warps among a few by timing them.
TILE_ROWS = ((16, 16), (64, 64), (1 << 62, 128))
_SHAPES = {
    16: ((64, 128, 4, 4), (128, 64, 4, 4)),
    64: ((128, 64, 4, 3), (128, 64, 8, 3)),
    128: ((128, 64, 8, 3), (64, 64, 8, 4)),
}


class Tiles(NamedTuple):
    """Which rows each program computes; there are more places than tiles.

    Attributes:
        expert: [N] of a tile, E where there is none. first: [N] its first row.
    """

    expert: Tensor
    first: Tensor


def tiles_of(pairs: Sorted, rows: int) -> Tiles:
    """Tiles of `rows` rows, the last of an expert cut off."""
    E, P = len(pairs.ends), len(pairs.order)
    starts = torch.cat([pairs.ends.new_zeros(1), pairs.ends[:-1]])
    last = torch.cumsum((pairs.ends - starts + rows - 1) // rows, 0)  # [E] tiles up to and with each expert
    tile = torch.arange((P + rows - 1) // rows + min(E, P), device=pairs.ends.device)
    expert = torch.searchsorted(last, tile, right=True)
    there = expert.clamp(max=E - 1)
    before = torch.where(there > 0, last[there - 1], 0)
    return Tiles(expert.int(), (starts[there] + (tile - before) * rows).int())


@jit
def _gate_up(
    x,
    weight,
    inner,
    order,
    ends,
    tile_expert,
    tile_first,
    H: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(I, BN)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tile_expert + tile)
    if expert < E:
        row = tl.load(tile_first + tile) + tl.arange(0, BM)
        valid = row < tl.load(ends + expert)
        token = tl.load(order + row, mask=valid, other=0) // K
        column = block * BN + tl.arange(0, BN)
        depth = tl.arange(0, BK)
        a = x + token[:, None] * H + depth[None, :]
        gate = weight + expert.to(tl.int64) * 2 * I * H + column[None, :] * H + depth[:, None]
        there = column[None, :] < I
        gates, ups = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(0, H, BK):
            inside = depth + k < H
            rows = tl.load(a + k, mask=valid[:, None] & inside[None, :], other=0.0)
            weights_inside = there & inside[:, None]
            gates = tl.dot(rows, tl.load(gate + k, mask=weights_inside, other=0.0), gates)
            ups = tl.dot(rows, tl.load(gate + I * H + k, mask=weights_inside, other=0.0), ups)
        out = gates * tl.sigmoid(gates) * ups
        place = inner + row.to(tl.int64)[:, None] * I + column[None, :]
        tl.store(place, out.to(inner.dtype.element_ty), mask=valid[:, None] & there)


@jit
def _down(
    inner,
    weight,
    by_pair,
    order,
    pair_weight,
    ends,
    tile_expert,
    tile_first,
    H: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    blocks = tl.cdiv(H, BN)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.load(tile_expert + tile)
    if expert < E:
        row = tl.load(tile_first + tile) + tl.arange(0, BM)
        valid = row < tl.load(ends + expert)
        pair = tl.load(order + row, mask=valid, other=0)
        column = block * BN + tl.arange(0, BN)
        depth = tl.arange(0, BK)
        a = inner + row.to(tl.int64)[:, None] * I + depth[None, :]
        b = weight + expert.to(tl.int64) * H * I + column[None, :] * I + depth[:, None]
        there = column[None, :] < H
        sums = tl.zeros((BM, BN), tl.float32)
        for k in range(0, I, BK):
            inside = depth + k < I
            rows = tl.load(a + k, mask=valid[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(rows, tl.load(b + k, mask=there & inside[:, None], other=0.0), sums)
        sums *= tl.load(pair_weight + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        place = by_pair + pair[:, None] * H + column[None, :]
        tl.store(place, sums.to(by_pair.dtype.element_ty), mask=valid[:, None] & there)


@jit
def _combine(by_pair, keep, out, H: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    there = column < H
    total = tl.zeros((BN,), tl.float32)
    for slot in range(K):
        kept = tl.load(keep + token * K + slot)
        total += tl.load(by_pair + (token * K + slot) * H + column, mask=there & kept, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, total.to(out.dtype.element_ty), mask=there)


def _tuned(kernel: Any, rows: int) -> Any:
    configs = [triton.Config({"BN": n, "BK": k}, num_warps=warps, num_stages=stages) for n, k, warps, stages in _SHAPES[rows]]
    return triton.autotune(configs, key=["H", "I", "E"])(kernel)


_GATE_UP = {rows: _tuned(_gate_up, rows) for rows in _SHAPES}
_DOWN = {rows: _tuned(_down, rows) for rows in _SHAPES}


def fused_moe(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, tau: Tensor) -> Tensor:
    """[T, H]. Nothing is read by the host."""
    (T, H), k = x.shape, ids.shape[1]
    E, I = layer.down.shape[0], layer.down.shape[2]
    P, mean = T * k, T * k / E
    rows = next(rows for most, rows in TILE_ROWS if mean <= most)
    pairs = sort_pairs(ids, weights, tau, E)
    tiles = tiles_of(pairs, rows)
    places = len(tiles.expert)
    inner = torch.empty(P, I, dtype=x.dtype, device=x.device)
    by_pair = torch.empty(P, H, dtype=x.dtype, device=x.device)
    kept = torch.empty(P, dtype=torch.bool, device=x.device)
    kept[pairs.order] = pairs.expert < E
    out = torch.empty_like(x)
    cdiv: Callable[[int, int], int] = triton.cdiv
    _GATE_UP[rows][lambda meta: (places * cdiv(I, meta["BN"]),)](
        x, layer.gate_up, inner, pairs.order, pairs.ends, *tiles, H, I, E, K=k, BM=rows
    )
    _DOWN[rows][lambda meta: (places * cdiv(H, meta["BN"]),)](
        inner, layer.down, by_pair, pairs.order, weights, pairs.ends, *tiles, H, I, E, BM=rows
    )
    _combine[T, cdiv(H, 1024)](by_pair, kept, out, H, K=k, BN=1024)
    return out
