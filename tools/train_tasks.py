"""The tasks that tools/train_reference.py trains on, each with its recipe: what to draw, to ask, and to help with."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import second_task as tiles
import torch
from numpy.typing import NDArray
from PIL import Image
from reference.packing import cell_labels
from torch import Tensor

from modes_cli.data import digits_vqa
from modes_cli.data.digits_vqa import CELL, Question


@dataclass(frozen=True)
class Recipe:
    """Defaults of the script's options, and what has none."""

    images: int  # canvases to train on
    second_stage: int  # canvases after which the summary heads join
    polish: tuple[int, ...]  # canvases of each short stage at the end
    first_weights: dict[str, float] = field(default_factory=dict)  # of kinds, before validation says more; others: 0.8
    flat: float = 0.0  # weight of the loss that keeps a token's top-k weights comparable
    flatter: tuple[float, ...] = (1, 1, 1)  # times that: before the last stages, in the first, in the second
    probes: int = 30  # times that validation accuracy is logged
    watch: bool = True  # whether the log also says how much experts matter
    adapt_from: float = 0.3  # accuracy from which on questions are drawn by what validation says is not known yet
    warm_up: int = 300  # steps, in each stage
    batches: tuple[tuple[float, int], ...] = ((0.4, 8), (0.75, 16), (1.0, 32))  # until this share of the run, canvases a step
    evidence: float = 0.0  # weight of the loss that says where to look
    helped: float = 0.7  # share of the run by which that loss, and that of the heads on vision tokens, have faded out
    drop: float = 0.1  # share of rows that lose the first routed layer's experts


class Task(ABC):
    """Questions about canvases [48, 48, 3] of nine cells."""

    name: str
    kinds: tuple[str, ...]  # that are trained and probed
    text_kinds: tuple[str, ...]  # that the tokenizer knows
    whole_words: tuple[str, ...]  # kinds whose answers become single tokens; others stay in pieces, to take several steps
    words: tuple[str, ...]  # further words of the vocabulary
    cell_classes: tuple[int, ...]  # of the attributes of a cell, then of its row and column
    present: int  # things that a summary says are there or not
    groups: int  # things that it counts
    recipe: Recipe

    @abstractmethod
    def bank(self, seed: int) -> Any:
        """What training scenes are drawn from, augmented."""

    @abstractmethod
    def draw(self, bank: Any, rng: Random) -> Any: ...

    @abstractmethod
    def ask(self, scene: Any, kind: str, rng: Random) -> Question | None: ...

    @abstractmethod
    def samples(self, split: str, seed: int) -> Iterator[tuple[Any, Question]]: ...

    @abstractmethod
    def text_samples(self) -> Iterator[tuple[Any, Question]]:
        """Of validation, whose canvases are asked all `text_kinds` to get text for the tokenizer."""

    @abstractmethod
    def cell_labels(self, scenes: list[Any]) -> Tensor:
        """[len(cell_classes), B, 36]."""

    @abstractmethod
    def summary_labels(self, scenes: list[Any]) -> tuple[Tensor, Tensor]:
        """Present [B, present] float32, counts [B, groups] int64 of 0..9."""

    def corpus(self) -> list[str]:
        """Questions about validation canvases, to train a tokenizer on; the same every time."""
        rng = Random("tokenizer")
        corpus = list(self.words) * 50
        for scene, _ in islice(self.text_samples(), 300):
            for kind in self.text_kinds * 2:
                question = self.ask(scene, kind, rng)
                if question is not None:
                    corpus.append(question.text)
                    if kind in self.whole_words:
                        corpus.append(question.answer)
        return corpus


class Digits(Task):
    """DigitsVQA, of which the built-in model was made."""

    name = "digits"
    kinds = text_kinds = digits_vqa.KINDS
    whole_words = ("color", "exists", "larger", "locate")
    words = ("user", "assistant", "system", "nothing", "nowhere", "yes", "no")
    cell_classes = (11, 7, 3, 3)
    present = 10
    groups = len(digits_vqa.COLOR_NAMES)
    recipe = Recipe(
        images=72_000,
        second_stage=21_600,
        polish=(12_000, 6_000),
        first_weights={
            "read": 3.0, "row": 3.0, "color": 2.0, "name": 1.5, "exists": 1.5, "locate": 2.0, "count_color": 1.5,
        },
        flat=0.003,
        flatter=(1, 10, 60),
    )  # fmt: skip

    def bank(self, seed: int) -> digits_vqa.Bank:
        """The training scans, each also 40 times slightly rotated, scaled, sheared, moved and dimmed."""
        scans, labels = digits_vqa.load_scans("train")
        rng = np.random.default_rng(seed)
        plain = digits_vqa.plain_bank("train")
        return tuple(
            np.concatenate([plain[d], np.stack([_augment(s, rng) for _ in range(40) for s in scans[labels == d]])])
            for d in range(10)
        )

    def draw(self, bank: digits_vqa.Bank, rng: Random) -> digits_vqa.Scene:
        return digits_vqa.draw_scene(bank, rng)

    def ask(self, scene: digits_vqa.Scene, kind: str, rng: Random) -> Question | None:
        return digits_vqa.ask(scene, kind, rng)

    def samples(self, split: str, seed: int) -> Iterator[tuple[digits_vqa.Scene, Question]]:
        return digits_vqa.samples(split, seed)

    def text_samples(self) -> Iterator[tuple[digits_vqa.Scene, Question]]:
        return digits_vqa.samples("validation", 5)

    def cell_labels(self, scenes: list[digits_vqa.Scene]) -> Tensor:
        no_color = len(digits_vqa.COLOR_NAMES)
        digits = [[10 if d is None else d for d in s.digits] for s in scenes]
        colors = [[no_color if d is None else c for d, c in zip(s.digits, s.colors, strict=True)] for s in scenes]
        return cell_labels([digits, colors])

    def summary_labels(self, scenes: list[digits_vqa.Scene]) -> tuple[Tensor, Tensor]:
        present = torch.tensor([[float(d in s.digits) for d in range(10)] for s in scenes])
        filled = [[s.colors[cell] for cell in s.filled] for s in scenes]
        return present, torch.tensor([[colors.count(c) for c in range(self.groups)] for colors in filled])


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


class Tiles(Task):
    """PhotoTiles, for the second model."""

    name = "tiles"
    kinds = tiles.TRAINED
    text_kinds = tiles.KINDS
    whole_words = ("what", "photo", "brighter", "same", "locate", "find", "behind")
    words = ("user", "assistant", "system", "image", "none", "nowhere", "yes", "no")
    cell_classes = (len(tiles.MATERIALS), len(tiles.LETTERS) + 1, 3, 3)
    present = len(tiles.LETTERS)
    groups = len(tiles.MATERIALS)
    recipe = Recipe(
        images=28_000,
        second_stage=0,
        polish=(),
        warm_up=100,
        batches=((0.7, 8), (1.0, 16)),
        probes=10,
        watch=False,
        first_weights={
            "what": 2.0, "letter": 4.0, "photo": 0.6, "row": 1.5, "spell": 2.0, "name": 1.0,
        },
        adapt_from=0.4,
        evidence=0.5,
        helped=0.95,
    )  # fmt: skip

    def bank(self, seed: int) -> tiles.Bank:
        """The training crops, up to 2,000 a material, each also mirrored and made darker or lighter; letters as they are."""
        plain, rng = tiles.plain_bank("train"), np.random.default_rng(seed)
        crops = []
        for own in plain.crops:
            some = own[rng.permutation(len(own))[:2000]]
            gains = rng.uniform(0.85, 1.1, (len(some), 1, 1, 1))
            changed = np.clip(some[:, :, ::-1] * gains, 0, 255).round().astype(np.uint8)
            crops.append(np.concatenate([some, changed]))
        return tiles.Bank(tuple(crops), plain.letters)

    def draw(self, bank: tiles.Bank, rng: Random) -> tiles.Scene:
        return tiles.draw_scene(bank, rng)

    def ask(self, scene: tiles.Scene, kind: str, rng: Random) -> Question | None:
        return tiles.ask(scene, kind, rng)

    def samples(self, split: str, seed: int) -> Iterator[tuple[tiles.Scene, Question]]:
        return tiles.samples(split, seed, self.kinds)

    def text_samples(self) -> Iterator[tuple[tiles.Scene, Question]]:
        return tiles.samples("validation", 5)

    def cell_labels(self, scenes: list[tiles.Scene]) -> Tensor:
        none = len(tiles.LETTERS)
        letters = [[none if letter is None else letter for letter in s.letters] for s in scenes]
        return cell_labels([[s.materials for s in scenes], letters])

    def summary_labels(self, scenes: list[tiles.Scene]) -> tuple[Tensor, Tensor]:
        present = torch.tensor([[float(letter in s.letters) for letter in range(self.present)] for s in scenes])
        return present, torch.tensor([[s.materials.count(m) for m in range(self.groups)] for s in scenes])


TASKS: dict[str, Task] = {task.name: task for task in (Digits(), Tiles())}
