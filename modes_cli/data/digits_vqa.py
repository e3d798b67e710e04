"""DigitsVQA: questions about 3x3 canvases of real handwritten digit scans.

The scans are the 1,797 of the UCI "Optical Recognition of Handwritten Digits" test set (8x8, 17 grey levels), the ones
that scikit-learn bundles. Every scan belongs to exactly one of the splits train, validation and test (72 / 8 / 20% of
each digit), so a model never saw the handwriting it is scored on.

Everything is drawn from `random.Random(seed).random()`, whose stream Python guarantees across versions: the same split,
count and seed give the same samples everywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

T = TypeVar("T")

SCANS = Path(__file__).parent / "scans.safetensors"
SPLITS = ("train", "validation", "test")

GRID = 3  # cells per side
CELL = 16  # pixels per cell side
SIDE = GRID * CELL

COLORS = {
    "red": (255, 60, 60),
    "green": (60, 230, 60),
    "blue": (70, 110, 255),
    "yellow": (250, 235, 60),
    "white": (250, 250, 250),
    "pink": (255, 90, 230),
}
COLOR_NAMES = tuple(COLORS)
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
NUMERALS = {
    "English": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "French": ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
    "German": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}


@dataclass(frozen=True)
class Scene:
    """One canvas: what is drawn in each of its nine cells, in reading order."""

    canvas: NDArray[np.uint8]  # (48, 48, 3)
    digits: tuple[int | None, ...]  # None: an empty cell
    colors: tuple[int, ...]  # index into COLOR_NAMES; meaningless where the cell is empty

    @property
    def filled(self) -> list[int]:
        """Indices of the cells that hold a digit."""
        return [cell for cell, digit in enumerate(self.digits) if digit is not None]


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer. `kind` is one of KINDS."""

    kind: str
    text: str
    answer: str


# A bank holds, for each digit 0..9, the glyphs (n, 16, 16) float32 in 0..1 that may be drawn for it.
Bank = tuple[NDArray[np.float32], ...]


def load_scans(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The scans of one split: (n, 8, 8) with values 0..16, and their labels (n,).

    Raises:
        ValueError: `split` is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split `{split}` is not one of {', '.join(SPLITS)}")
    tensors = load_file(SCANS)
    rows = tensors["split"] == SPLITS.index(split)
    return tensors["scans"][rows], tensors["labels"][rows]


@cache
def plain_bank(split: str) -> Bank:
    """The split's scans, enlarged to a cell without any change."""
    scans, labels = load_scans(split)
    glyphs = np.stack([_enlarge(scan) for scan in scans])
    return tuple(glyphs[labels == digit] for digit in range(10))


def _enlarge(scan: NDArray[np.uint8]) -> NDArray[np.float32]:
    image = Image.fromarray((scan * 15.9375).astype(np.uint8)).resize((CELL, CELL), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32) / 255.0


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of the options. Not `rng.choice`: only `rng.random()` is promised to stay the same across Python versions."""
    return options[int(rng.random() * len(options))]


def draw_scene(bank: Bank, rng: Random) -> Scene:
    """A random canvas with at least two digits."""
    p_empty = pick(rng, (0.0, 0.2, 0.4, 0.6))
    digits: list[int | None] = [None if rng.random() < p_empty else int(rng.random() * 10) for _ in CELLS]
    while sum(digit is not None for digit in digits) < 2:
        digits[int(rng.random() * len(CELLS))] = int(rng.random() * 10)
    colors = [int(rng.random() * len(COLOR_NAMES)) for _ in CELLS]
    if rng.random() < 0.3:  # some scenes are mostly of one colour, so that counting by colour is not always one or two
        colors = [colors[0] if rng.random() < 0.6 else color for color in colors]
    canvas = np.zeros((GRID, CELL, GRID, CELL, 3), dtype=np.float32)
    for cell, digit in enumerate(digits):
        if digit is not None:
            glyph = bank[digit][int(rng.random() * len(bank[digit]))]
            canvas[cell // GRID, :, cell % GRID] = glyph[..., None] * np.asarray(COLORS[COLOR_NAMES[colors[cell]]], np.float32)
    return Scene(canvas.reshape(SIDE, SIDE, 3).astype(np.uint8), tuple(digits), tuple(colors))


def _two_cells(scene: Scene, rng: Random) -> tuple[int, int]:
    first = pick(rng, scene.filled)
    return first, pick(rng, [cell for cell in scene.filled if cell != first])


def _any_cell(scene: Scene, rng: Random) -> int:
    return int(rng.random() * len(CELLS)) if rng.random() < 0.3 else pick(rng, scene.filled)


def _read(scene: Scene, rng: Random) -> tuple[str, str]:
    cell = _any_cell(scene, rng)
    digit = scene.digits[cell]
    return f"What is at the {CELLS[cell]}?", "nothing" if digit is None else str(digit)


def _color(scene: Scene, rng: Random) -> tuple[str, str]:
    cell = _any_cell(scene, rng)
    answer = "nothing" if scene.digits[cell] is None else COLOR_NAMES[scene.colors[cell]]
    return f"What color is the {CELLS[cell]}?", answer


def _count(scene: Scene, rng: Random) -> tuple[str, str]:
    return "How many digits?", str(len(scene.filled))


def _count_color(scene: Scene, rng: Random) -> tuple[str, str]:
    colors = [scene.colors[cell] for cell in scene.filled]
    color = pick(rng, colors) if rng.random() < 0.8 else int(rng.random() * len(COLOR_NAMES))
    return f"How many {COLOR_NAMES[color]} digits?", str(colors.count(color))


def _absent(scene: Scene) -> list[int]:
    return [digit for digit in range(10) if digit not in scene.digits]


def _exists(scene: Scene, rng: Random) -> tuple[str, str]:
    absent = _absent(scene)
    yes = rng.random() < 0.5 or not absent
    digit = pick(rng, sorted({d for d in scene.digits if d is not None}) if yes else absent)
    return f"Is there a {digit}?", "yes" if yes else "no"


def _larger(scene: Scene, rng: Random) -> tuple[str, str] | None:
    a, b = _two_cells(scene, rng)
    x, y = scene.digits[a], scene.digits[b]
    if x is None or y is None or x == y:
        return None
    return f"Which is larger, {CELLS[a]} or {CELLS[b]}?", CELLS[a if x > y else b]


def _locate(scene: Scene, rng: Random) -> tuple[str, str] | None:
    absent = _absent(scene)
    if absent and rng.random() < 0.3:
        return f"Where is the {pick(rng, absent)}?", "nowhere"
    unique = [cell for cell in scene.filled if scene.digits.count(scene.digits[cell]) == 1]
    if not unique:
        return None
    cell = pick(rng, unique)
    return f"Where is the {scene.digits[cell]}?", CELLS[cell]


def _row(scene: Scene, rng: Random) -> tuple[str, str]:
    line = int(rng.random() * GRID)
    if rng.random() < 0.5:
        name, values = f"{ROWS[line]} row", scene.digits[GRID * line : GRID * (line + 1)]
    else:
        name, values = f"{COLUMNS[line]} column", scene.digits[line::GRID]
    return f"Read the {name}.", "".join("_" if digit is None else str(digit) for digit in values)


def _add(scene: Scene, rng: Random) -> tuple[str, str]:
    a, b = _two_cells(scene, rng)
    return f"Add {CELLS[a]} and {CELLS[b]}.", str((scene.digits[a] or 0) + (scene.digits[b] or 0))


def _multiply(scene: Scene, rng: Random) -> tuple[str, str]:
    a, b = _two_cells(scene, rng)
    return f"Multiply {CELLS[a]} and {CELLS[b]}.", str((scene.digits[a] or 0) * (scene.digits[b] or 0))


def _name(scene: Scene, rng: Random) -> tuple[str, str]:
    cell, language = pick(rng, scene.filled), pick(rng, tuple(NUMERALS))
    return f"Name the {CELLS[cell]} in {language}.", NUMERALS[language][scene.digits[cell] or 0]


# A question maker returns None where the scene does not allow its question (all digits equal, none unique).
_MAKERS: dict[str, Callable[[Scene, Random], tuple[str, str] | None]] = {
    "read": _read,
    "color": _color,
    "count": _count,
    "count_color": _count_color,
    "exists": _exists,
    "larger": _larger,
    "locate": _locate,
    "row": _row,
    "add": _add,
    "multiply": _multiply,
    "name": _name,
}
KINDS = tuple(_MAKERS)


def ask(scene: Scene, kind: str, rng: Random) -> Question | None:
    """A random question of one kind, or None where the scene does not allow that kind."""
    made = _MAKERS[kind](scene, rng)
    return None if made is None else Question(kind, *made)


def samples(split: str, seed: int) -> Iterator[tuple[Scene, Question]]:
    """An endless stream: one question per canvas, the kinds in turn."""
    bank, rng = plain_bank(split), Random(f"{split}:{seed}")
    turn = 0
    while True:
        scene = draw_scene(bank, rng)
        question = ask(scene, KINDS[turn % len(KINDS)], rng)
        if question is not None:
            turn += 1
            yield scene, question
