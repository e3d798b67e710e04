"""Block-wise symmetric quantisation of expert weights: what `--quantize` does to them, and back.

The elements of a row that follow one another along the input dimension share a scale, `BLOCK` at a time. 32 for both schemes:
a block is two AVX-512 vectors or one load of 16 bytes, and finer scales cost little (int8 8.5 bits a weight, int4 4.5). Scales
are float16 and rounded up, never down: so no weight is clipped, and the error is at most half a scale. A stored number times
its scale has at most 19 significant bits, so that it is exact in float32 whoever computes it. The layout is that of
`kernels/include/modes.h`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modes_cli.errors import BadModel
from modes_cli.models.blocks import MoEBlock

BLOCK = 32  # elements that share a scale
GROUP = 32  # elements that are stored together; rows are filled up with zeros to a multiple
SUFFIX = "_scales"  # of the name of a tensor's scales
WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Scheme:
    """`most`: the largest stored number; the smallest is its negative. `dtype`: of the stored tensor."""

    name: str
    bits: int
    most: int
    dtype: torch.dtype

    def stored(self, depth: int) -> int:
        """How many elements of `dtype` a row of `depth` weights becomes."""
        return -(-depth // GROUP) * GROUP * self.bits // 8


SCHEMES = {scheme.name: scheme for scheme in (Scheme("int8", 8, 127, torch.int8), Scheme("int4", 4, 7, torch.uint8))}


def blocks_of(depth: int, block: int = BLOCK) -> int:
    """How many scales a row of `depth` weights has."""
    return -(-depth // block)


def quantise(weights: Tensor, scheme: Scheme, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Stored numbers [..., N, scheme.stored(D)] of the scheme's dtype, and scales [..., N, blocks_of(D)] float16.

    Args:
        weights: [..., N, D] float32, float16 or bfloat16, D along the input dimension.
        block: elements that share a scale, a multiple of 32.

    Raises:
        ValueError: a weight that is not finite, or too large for a float16 scale.
    """
    depth = weights.shape[-1]
    count = blocks_of(depth, block)
    wide = torch.nn.functional.pad(weights.float(), (0, count * block - depth)).unflatten(-1, (count, block))
    largest = wide.abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError("a weight is not finite")
    scales = _rounded_up(largest, scheme.most)
    if not scales.isfinite().all():
        raise ValueError(f"a weight of `{float(largest.max()):g}` is too large for a float16 scale")
    divisor = torch.where(scales == 0, 1.0, scales.float())[..., None]
    numbers = (wide / divisor).round_().clamp_(-scheme.most, scheme.most).to(torch.int8).flatten(-2)
    return _stored(numbers[..., : -(-depth // GROUP) * GROUP], scheme), scales


def dequantise(stored: Tensor, scales: Tensor, scheme: Scheme, depth: int, block: int = BLOCK) -> Tensor:
    """[..., N, D] float32, exactly what the kernels multiply with, from what `quantise` gave."""
    numbers = stored if scheme.bits == 8 else _unpacked(stored)
    each = scales.float().repeat_interleave(block, -1)
    return numbers[..., :depth].float() * each[..., :depth]


def quantise_experts(blocks: Sequence[MoEBlock], scheme: Scheme) -> None:
    """Give a loaded model the expert weights that it has after quantisation, in its own dtype, in place.

    Raises:
        BadModel: weights that cannot be quantised, or are not in memory.
    """
    for block in (one for layer in blocks for one in layer.sets):
        for name in WEIGHTS:
            weights = getattr(block.experts, name)
            if weights.is_meta:
                raise BadModel(f"`{block.name}.{name}` is not in memory", hint="leave out `--quantize`, or `--device-map`")
            for expert in weights.data:
                matrix = expert.T if block.transposed else expert
                try:
                    found = dequantise(*quantise(matrix, scheme), scheme, matrix.shape[-1])
                except ValueError as error:
                    raise BadModel(f"`{block.name}.{name}` cannot be quantised: {error}") from error
                matrix.copy_(found)


def _rounded_up(largest: Tensor, most: int) -> Tensor:
    """The smallest float16 that is at least largest / most, and not 0 where `largest` is not: in steps of bits, which are in
    the order of what they mean."""
    needed = largest.double() / most
    scales = needed.to(torch.float16)
    return (scales.view(torch.int16) + (scales.double() < needed).to(torch.int16)).view(torch.float16)


def _stored(numbers: Tensor, scheme: Scheme) -> Tensor:
    """int8 [..., n] as the scheme stores it."""
    if scheme.bits == 8:
        return numbers.contiguous()
    low, high = (numbers & 15).to(torch.uint8).unflatten(-1, (-1, 2, GROUP // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def _unpacked(stored: Tensor) -> Tensor:
    """int8 [..., 2n] of bytes [..., n]."""
    halves = torch.stack([stored & 15, stored >> 4], -1).unflatten(-2, (-1, GROUP // 2)).transpose(-1, -2).flatten(-3)
    return ((halves ^ 8).to(torch.int8) - 8).contiguous()
