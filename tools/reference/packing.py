"""Training batches: one image and several independent questions per row, under a block mask.

Each question sees exactly [image, itself], with the positions it would have alone, so a packed row teaches the same
function that a single-question prompt uses, at a fraction of the cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modes_cli.data.digits_vqa import GRID, SIDE, Question

PATCH, MERGE, TEMPORAL = 4, 2, 2
TOKENS_PER_SIDE = SIDE // PATCH // MERGE
VISION_TOKENS = TOKENS_PER_SIDE**2

ImageInputs = Callable[[NDArray[np.uint8]], dict[str, Tensor]]  # canvases [B, 48, 48, 3] -> inputs of the model
Ask = Callable[[Any, str, Random], Question | None]


@dataclass(frozen=True)
class ChatLayout:
    """The text around an image, a question and its answer. `axes`: of the positions, 3 for Qwen's (time, row, column)."""

    before: str
    image: str
    after: str  # one token
    middle: str
    end: str
    axes: int


QWEN = ChatLayout(
    before="<|im_start|>user\n<|vision_start|>",
    image="<|image_pad|>",
    after="<|vision_end|>",
    middle="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    axes=3,
)


@dataclass
class Batch:
    """Inputs of the model's forward, `labels` [B, S] (-100: no loss) and `real` [B, S] (False: padding)."""

    inputs: dict[str, Tensor]
    labels: Tensor
    real: Tensor


class Packer:
    """Turns scenes and questions into token rows, without going through the processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, layout: ChatLayout, image_inputs: ImageInputs) -> None:
        self.tokenizer, self.axes, self.image_inputs = tokenizer, layout.axes, image_inputs
        self._cache: dict[str, list[int]] = {}
        image = tokenizer.convert_tokens_to_ids(layout.image)
        self.prefix = self._ids(layout.before) + [image] * VISION_TOKENS + self._ids(layout.after)
        self.middle = self._ids(layout.middle)
        self.end = self._ids(layout.end)
        self.first_vision = len(self.prefix) - VISION_TOKENS - 1
        n, start, side = len(self.prefix), self.first_vision, TOKENS_PER_SIDE
        positions = np.tile(np.arange(n), (layout.axes, 1))
        self.next_position = n
        if layout.axes == 3:  # text counts up, an image spans its grid, text goes on after the grid's larger side
            positions[0, start : start + VISION_TOKENS] = start
            positions[1, start : start + VISION_TOKENS] = start + np.repeat(np.arange(side), side)
            positions[2, start : start + VISION_TOKENS] = start + np.tile(np.arange(side), side)
            positions[:, -1] = start + side
            self.next_position = start + side + 1
        self.prefix_positions = positions

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def pack(self, rows: list[tuple[Any, list[Question]]]) -> Batch:
        """One row per scene; rows are padded on the right to the longest."""
        packed = [self._row(questions) for _, questions in rows]
        length, count = max(len(ids) for ids, *_ in packed), len(packed)
        ids = np.full((count, length), self.tokenizer.pad_token_id)
        segments, labels = np.full((count, length), -1), np.full((count, length), -100)
        positions = np.zeros((self.axes, count, length), np.int64)
        for i, (row_ids, row_segments, row_labels, row_positions) in enumerate(packed):
            n = len(row_ids)
            ids[i, :n], segments[i, :n], labels[i, :n], positions[:, i, :n] = row_ids, row_segments, row_labels, row_positions
        segment = torch.from_numpy(segments)
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
        mask = causal & ((segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0))
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": mask[:, None],
            "position_ids": torch.from_numpy(positions if self.axes > 1 else positions[0]),
            **self.image_inputs(np.stack([scene.canvas for scene, _ in rows])),
        }
        return Batch(inputs, torch.from_numpy(labels), segment >= 0)

    def _row(self, questions: list[Question]) -> tuple[list[int], list[int], list[int], NDArray[np.int64]]:
        ids, segments, labels = list(self.prefix), [0] * len(self.prefix), [-100] * len(self.prefix)
        positions = [self.prefix_positions]
        for k, question in enumerate(questions):
            prompt, answer = self._ids(question.text) + self.middle, self._ids(question.answer) + self.end
            n = len(prompt) + len(answer)
            ids += prompt + answer
            segments += [k + 1] * n
            labels += [-100] * len(prompt) + answer
            positions.append(np.tile(self.next_position + np.arange(n), (self.axes, 1)))
        return ids, segments, labels, np.concatenate(positions, 1)


def image_inputs(canvases: NDArray[np.uint8]) -> dict[str, Tensor]:
    """[B, 48, 48, 3] -> what Qwen's image processor makes of them."""
    grid = SIDE // PATCH
    return {
        "pixel_values": torch.from_numpy(patchify(canvases)),
        "image_grid_thw": torch.tensor([[1, grid, grid]] * len(canvases)),
    }


def patchify(canvases: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[B, 48, 48, 3] -> [B * 144, 96], what the image processor makes of them (mean = std = 0.5)."""
    x = (canvases.astype(np.float32) / 255.0 - 0.5) / 0.5
    count, side = x.shape[0], SIDE // PATCH
    x = x.transpose(0, 3, 1, 2).reshape(count, 3, side // MERGE, MERGE, PATCH, side // MERGE, MERGE, PATCH)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4, 7)  # batch, block row, block column, row, column, channel, y, x
    x = np.broadcast_to(x[:, :, :, :, :, :, None], (*x.shape[:6], TEMPORAL, *x.shape[6:]))
    return np.ascontiguousarray(x.reshape(count * side * side, -1))


def cell_labels(attributes: list[list[Sequence[int]]]) -> Tensor:
    """[2 + attributes, B, 36]: each attribute, the row and the column of the cell that each vision token lies in.

    Args:
        attributes: for each attribute, for each scene, its value in each of the nine cells.
    """
    line = np.arange(TOKENS_PER_SIDE) // (TOKENS_PER_SIDE // GRID)
    cell = (line[:, None] * GRID + line[None, :]).reshape(-1)
    values = [np.array(attribute)[:, cell] for attribute in attributes]
    row, column = np.broadcast_to(cell // GRID, values[0].shape), np.broadcast_to(cell % GRID, values[0].shape)
    return torch.from_numpy(np.stack([*values, row, column]))


def question_batch(
    scenes: list[Any], per_scene: int, weights: dict[str, float], rng: Random, ask: Ask
) -> list[tuple[Any, list[Question]]]:
    """Each scene with `per_scene` questions, kinds drawn by weight."""
    kinds, rows = list(weights), []
    for scene in scenes:
        questions: list[Question] = []
        while len(questions) < per_scene:
            question = ask(scene, rng.choices(kinds, [weights[k] for k in kinds])[0], rng)
            if question is not None:
                questions.append(question)
        rows.append((scene, questions))
    return rows
