"""Training batches: one image and several independent questions per row, under a block mask.

Each question sees exactly [image, itself], with the positions it would have alone, so a packed row teaches the same
function that a single-question prompt uses, at a fraction of the cost.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modes_cli.data import digits_vqa
from modes_cli.data.digits_vqa import CELL, GRID, SIDE, Question, Scene

PATCH, MERGE, TEMPORAL = 4, 2, 2
TOKENS_PER_SIDE = SIDE // PATCH // MERGE
VISION_TOKENS = TOKENS_PER_SIDE**2
EMPTY_DIGIT, EMPTY_COLOR = 10, len(digits_vqa.COLOR_NAMES)


@dataclass
class Batch:
    """Inputs of the model's forward, `labels` [B, S] (-100: no loss) and `real` [B, S] (False: padding)."""

    inputs: dict[str, Tensor]
    labels: Tensor
    real: Tensor


class Packer:
    """Turns scenes and questions into token rows, without going through the processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.prefix = self._ids("<|im_start|>user\n<|vision_start|>") + [image] * VISION_TOKENS + self._ids("<|vision_end|>")
        self.middle = self._ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self._ids("<|im_end|>")
        self.first_vision = len(self.prefix) - VISION_TOKENS - 1
        # Qwen's 3-D positions: text counts up, an image spans its grid, text goes on after the grid's larger side.
        n, start, side = len(self.prefix), self.first_vision, TOKENS_PER_SIDE
        positions = np.tile(np.arange(n), (3, 1))
        positions[0, start : start + VISION_TOKENS] = start
        positions[1, start : start + VISION_TOKENS] = start + np.repeat(np.arange(side), side)
        positions[2, start : start + VISION_TOKENS] = start + np.tile(np.arange(side), side)
        positions[:, -1] = start + side
        self.prefix_positions, self.next_position = positions, start + side + 1

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def pack(self, rows: list[tuple[Scene, list[Question]]]) -> Batch:
        """One row per scene; rows are padded on the right to the longest."""
        packed = [self._row(questions) for _, questions in rows]
        length, count = max(len(ids) for ids, *_ in packed), len(packed)
        ids = np.full((count, length), self.tokenizer.pad_token_id)
        segments, labels = np.full((count, length), -1), np.full((count, length), -100)
        positions = np.zeros((3, count, length), np.int64)
        for i, (row_ids, row_segments, row_labels, row_positions) in enumerate(packed):
            n = len(row_ids)
            ids[i, :n], segments[i, :n], labels[i, :n], positions[:, i, :n] = row_ids, row_segments, row_labels, row_positions
        segment = torch.from_numpy(segments)
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
        mask = causal & ((segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0))
        grid = SIDE // PATCH
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": mask[:, None],
            "position_ids": torch.from_numpy(positions),
            "pixel_values": torch.from_numpy(patchify(np.stack([scene.canvas for scene, _ in rows]))),
            "image_grid_thw": torch.tensor([[1, grid, grid]] * count),
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
            positions.append(np.tile(self.next_position + np.arange(n), (3, 1)))
        return ids, segments, labels, np.concatenate(positions, 1)


def patchify(canvases: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[B, 48, 48, 3] -> [B * 144, 96], what the image processor makes of them (mean = std = 0.5)."""
    x = (canvases.astype(np.float32) / 255.0 - 0.5) / 0.5
    count, side = x.shape[0], SIDE // PATCH
    x = x.transpose(0, 3, 1, 2).reshape(count, 3, side // MERGE, MERGE, PATCH, side // MERGE, MERGE, PATCH)
    x = x.transpose(0, 2, 5, 3, 6, 1, 4, 7)  # batch, block row, block column, row, column, channel, y, x
    x = np.broadcast_to(x[:, :, :, :, :, :, None], (*x.shape[:6], TEMPORAL, *x.shape[6:]))
    return np.ascontiguousarray(x.reshape(count * side * side, -1))


def dense_labels(scenes: list[Scene]) -> Tensor:
    """[4, B, 36]: digit, colour, row and column of the cell that each vision token lies in."""
    line = np.arange(TOKENS_PER_SIDE) // (TOKENS_PER_SIDE // GRID)
    cell = (line[:, None] * GRID + line[None, :]).reshape(-1)
    digit = np.array([[EMPTY_DIGIT if d is None else d for d in s.digits] for s in scenes])[:, cell]
    color = np.array([[EMPTY_COLOR if d is None else c for d, c in zip(s.digits, s.colors, strict=True)] for s in scenes])[
        :, cell
    ]
    row, column = np.broadcast_to(cell // GRID, digit.shape), np.broadcast_to(cell % GRID, digit.shape)
    return torch.from_numpy(np.stack([digit, color, row, column]))


def augmented_bank(copies: int, seed: int) -> digits_vqa.Bank:
    """The training scans, each also `copies` times slightly rotated, scaled, sheared, moved and dimmed."""
    scans, labels = digits_vqa.load_scans("train")
    rng = np.random.default_rng(seed)
    plain = digits_vqa.plain_bank("train")
    return tuple(
        np.concatenate([plain[d], np.stack([_augment(s, rng) for _ in range(copies) for s in scans[labels == d]])])
        for d in range(10)
    )


def _augment(scan: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    image = Image.fromarray((scan * 15.9375).astype(np.uint8)).resize((2 * CELL, 2 * CELL), Image.Resampling.BICUBIC)
    angle, scale, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.85, 1.12), rng.uniform(-0.12, 0.12)
    dx, dy = rng.uniform(-3, 3, 2)
    a, b = np.cos(angle) / scale, (np.sin(angle) + shear) / scale
    c, d = -np.sin(angle) / scale, np.cos(angle) / scale
    mid = CELL - 0.5
    move = (a, b, mid - a * (mid + dx) - b * (mid + dy), c, d, mid - c * (mid + dx) - d * (mid + dy))
    image = image.transform((2 * CELL, 2 * CELL), Image.Transform.AFFINE, move, resample=Image.Resampling.BILINEAR)
    glyph = np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX), dtype=np.float32) / 255.0
    return np.clip(glyph * np.float32(rng.uniform(0.8, 1.1)), 0, 1)


def question_batch(
    scenes: list[Scene], per_scene: int, weights: dict[str, float], rng: Random
) -> list[tuple[Scene, list[Question]]]:
    """Each scene with `per_scene` questions, kinds drawn by weight."""
    kinds, rows = list(weights), []
    for scene in scenes:
        questions: list[Question] = []
        while len(questions) < per_scene:
            question = digits_vqa.ask(scene, rng.choices(kinds, [weights[k] for k in kinds])[0], rng)
            if question is not None:
                questions.append(question)
        rows.append((scene, questions))
    return rows
