"""Position ids: plain ones, and the three rows of M-RoPE (time, row, column) that Qwen-VL models use."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modes_cli.errors import BadData

Ints = NDArray[np.int64]


def text_positions(attention_mask: Ints) -> Ints:
    """[B, S]: each real token's place among the real tokens of its row; 0 at padding."""
    return np.where(attention_mask != 0, attention_mask.cumsum(1) - 1, 0)


def mrope_positions(
    input_ids: Ints, attention_mask: Ints, grids: Ints, vision_ids: Sequence[int], merge: int
) -> tuple[Ints, Ints]:
    """Positions of prompts with images, as transformers' `get_rope_index` gives them.

    Text counts on in all three rows. The tokens of an image share the time at which it begins and count rows and columns
    from there; what follows continues after the larger side.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S], 0 at padding, on either side.
        grids: [images, 3] frames, rows, columns in patches, in the order of the prompts.
        vision_ids: the token ids that image tokens have.
        merge: side of the square of patches that one token stands for.

    Returns:
        positions [3, B, S], 0 at padding; and [B, 1], what to add to the number of real tokens to get the next position.

    Raises:
        BadData: image tokens and images do not match.
    """
    positions = np.zeros((3, *input_ids.shape), dtype=np.int64)
    deltas = np.zeros((input_ids.shape[0], 1), dtype=np.int64)
    image = 0
    for row, (ids, real) in enumerate(zip(input_ids, attention_mask != 0, strict=True)):
        is_vision = np.isin(ids[real], vision_ids)
        columns: list[Ints] = []
        place = at = 0
        while at < len(is_vision):
            if not is_vision[at]:
                length = _run(is_vision, at)
                columns.append(np.broadcast_to(np.arange(place, place + length), (3, length)))
                place += length
            else:
                if image >= len(grids):
                    raise BadData(f"the prompts have more images than the `{len(grids)}` that were given")
                block = _block(grids[image], merge)
                length = block.shape[1]
                if at + length > len(is_vision) or not is_vision[at : at + length].all():
                    raise BadData(f"image {image} takes `{length}` tokens, the prompt has fewer in its place")
                columns.append(block + place)
                place += int(max(grids[image][1:])) // merge
                image += 1
            at += length
        if columns:
            found = np.concatenate(columns, axis=1)
            positions[:, row, real] = found
            deltas[row] = found.max() + 1 - found.shape[1]
    if image != len(grids):
        raise BadData(f"`{len(grids)}` images were given, the prompts show {image}")
    return positions, deltas


def _run(is_vision: NDArray[np.bool_], at: int) -> int:
    ahead = np.flatnonzero(is_vision[at:])
    return int(ahead[0]) if len(ahead) else len(is_vision) - at


def _block(grid: Ints, merge: int) -> Ints:
    """[3, tokens of the image]: frame, row and column of each token."""
    frames, height, width = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    return np.indices((frames, height, width), dtype=np.int64).reshape(3, -1)
