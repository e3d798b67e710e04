"""What the MoonViT towers of Kimi's models derive from the grids, by plain arithmetic over the indices of packed patches.

Patches lie frame by frame in rows and columns. N patches, M merged tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modes_cli.errors import UnknownLayout

_A = -0.75  # of the cubic kernel, as torch.nn.functional.interpolate has it


@dataclass(frozen=True)
class Places:
    """Where each packed patch lies: [N] each, int64."""

    rows: Tensor
    cols: Tensor
    heights: Tensor  # rows of its image
    widths: Tensor
    frames: Tensor  # of its image; 1 for a picture
    frame: Tensor
    image: Tensor


def square(sides: Sequence[int]) -> int:
    """The side of the squares of patches that become one token.

    Raises:
        UnknownLayout: they are no squares.
    """
    rows, columns = sides
    if rows != columns:
        raise UnknownLayout(f"patches are merged `{rows}` x `{columns}`; only squares of them can be exported")
    return int(rows)


def embedded(proj: nn.Conv2d, pixel_values: Tensor) -> Tensor:
    """[N, D]: the kernel covers a patch [3, side, side] exactly, so the convolution is one matrix product."""
    return F.linear(pixel_values.flatten(1), proj.weight.reshape(proj.out_channels, -1), proj.bias)


def places(grid: Tensor, patches: int) -> Places:
    """`grid` [images, 3] int64: frames, rows, columns; `patches`: their sum."""
    frames, height, width = grid.unbind(1)
    end = (frames * height * width).cumsum(0)
    index = torch.arange(patches, device=grid.device)
    image = (index[:, None] >= end[None]).sum(1)  # a sum of comparisons instead of repeat_interleave: no shape depends on data
    frames, height, width, start = (of_image[image] for of_image in (frames, height, width, end - frames * height * width))
    within = index - start
    frame = torch.div(within, height * width, rounding_mode="floor")
    within = within - frame * height * width
    row = torch.div(within, width, rounding_mode="floor")
    return Places(row, within - row * width, height, width, frames, frame, image)


def resampled(table: Tensor, where: Places) -> Tensor:
    """[N, D]: a table [rows, columns, D] resampled bicubically to each image's size, corners not aligned."""
    rows, columns, width = table.shape
    flat = table.reshape(rows * columns, width)
    row_taps, row_weights = _taps(where.rows, where.heights, rows)
    col_taps, col_weights = _taps(where.cols, where.widths, columns)
    out = torch.zeros_like(flat[:1])
    for j in range(4):  # one column after the other: all sixteen taps at once would need four times the memory
        weights = row_weights * col_weights[:, j : j + 1]
        out = out + (weights[:, None] @ flat[row_taps * columns + col_taps[:, j : j + 1]])[:, 0]
    return out


def _taps(index: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Four places of an axis and their weights, [N, 4] each; places beyond the ends are the ends."""
    place = (index.to(torch.float32) + 0.5) * side / size - 0.5
    low = torch.floor(place)
    offsets = torch.arange(-1, 3, device=index.device)
    taps = (low.to(torch.int64)[:, None] + offsets).clamp(0, side - 1)
    distance = (place[:, None] - low[:, None] - offsets).abs()
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return taps, torch.where(distance <= 1, near, far)


def merged(grid: Tensor, tokens: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches become which token.

    Args:
        grid: [images, 3].
        tokens: M, the sum of rows x columns / merge².
        merge: side of the squares of patches that become one token.

    Returns:
        [M, merge²] int64: the patches of the first frame; [M, 1]: patches between a frame and the next; [M, 1]: frames.
    """
    frames, height, width = grid.unbind(1)
    squares = torch.div(height * width, merge * merge, rounding_mode="floor")
    end, patch_end = squares.cumsum(0), (frames * height * width).cumsum(0)
    index = torch.arange(tokens, device=grid.device)
    image = (index[:, None] >= end[None]).sum(1)
    within = index - (end - squares)[image]
    across = torch.div(width, merge, rounding_mode="floor")[image]
    row = torch.div(within, across, rounding_mode="floor")
    corner = (patch_end - frames * height * width)[image] + (row * width[image] + within - row * across) * merge
    inside = torch.arange(merge * merge, device=grid.device)
    inside_row = torch.div(inside, merge, rounding_mode="floor")
    patches = corner[:, None] + inside_row[None] * width[image][:, None] + (inside - inside_row * merge)[None]
    return patches, (height * width)[image][:, None], frames[image][:, None]
