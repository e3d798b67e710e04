"""PhotoTiles: questions about 3x3 canvases of photograph crops, some with a letter drawn on them. The second real task.

Crops are 16x16 pixels of the two photographs that scikit-learn bundles (china.jpg, flower.jpg), untouched, from areas that
show one thing each. The photographs are cut into blocks of 24x24 pixels; every block belongs to one of the splits train,
validation and test, and a crop lies in one block, so no pixel is in two splits. Letters are drawn with Pillow's bundled
font, at sizes and places that also belong to one split each.

Everything is drawn from `random.Random(seed).random()`, whose stream Python guarantees across versions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

from modes_cli.data.digits_vqa import CELL, CELLS, COLUMNS, GRID, ROWS, SIDE, SPLITS, Question, pick

T = TypeVar("T")

BLOCK = 24  # pixels per side of what is given to a split as a whole
SHARES = {"validation": 0.12, "test": 0.2}  # of a material's blocks; the rest is for training
# For each material: the photograph, and boxes (left, top, right, bottom) in which nothing else is seen.
AREAS = {
    "sky": ("china", ((330, 4, 640, 124), (4, 4, 96, 124), (330, 124, 540, 172))),
    "lake": ("china", ((356, 236, 524, 294),)),
    "roof": ("china", ((130, 100, 300, 128), (100, 168, 316, 184), (80, 254, 330, 282), (212, 360, 300, 388))),
    "wall": ("china", ((108, 194, 316, 232), (88, 288, 326, 338), (124, 136, 292, 158))),
    "tree": ("china", ((572, 180, 636, 423), (360, 336, 564, 423), (4, 364, 200, 423), (4, 196, 60, 236))),
    "petal": ("flower", ((200, 130, 272, 310), (356, 130, 424, 310), (272, 270, 356, 340), (250, 104, 390, 170))),
    "leaf": ("flower", ((4, 4, 164, 423), (452, 4, 636, 380), (164, 4, 452, 76))),
}
MATERIALS = tuple(AREAS)
PHOTOS = {"china": "temple", "flower": "flower"}  # what a photograph is called in answers
LETTERS = "ACEHKMRSTX"
LETTER_PLACES = tuple(product((11, 12, 13), (-1, 0, 1), (-1, 0, 1)))  # font size, right and down of the cell's middle
BRIGHTER = 25.0  # of 255: cells whose mean brightness differs less are not compared
NAMES = {
    "French": ("ciel", "lac", "toit", "mur", "arbre", "pétale", "feuille"),
    "German": ("Himmel", "See", "Dach", "Wand", "Baum", "Blüte", "Blatt"),
}

# For each material the crops (n, 16, 16, 3) uint8 that may be drawn, and for each letter its (ink, outline) masks
# (n, 2, 16, 16) in 0..1.
Crops = tuple[NDArray[np.uint8], ...]
Letters = tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class Bank:
    crops: Crops
    letters: Letters


@dataclass(frozen=True)
class Scene:
    """One canvas: what its nine cells show, in reading order. A letter is on at most one cell."""

    canvas: NDArray[np.uint8]  # (48, 48, 3)
    materials: tuple[int, ...]  # index into MATERIALS
    letters: tuple[int | None, ...]  # index into LETTERS; None: no letter

    @property
    def lettered(self) -> list[int]:
        """Indices of the cells with a letter."""
        return [cell for cell, letter in enumerate(self.letters) if letter is not None]

    def brightness(self, cell: int) -> float:
        """Mean of the cell's pixels over all channels, 0..255."""
        y, x = cell // GRID * CELL, cell % GRID * CELL
        return float(self.canvas[y : y + CELL, x : x + CELL].mean(dtype=np.float64))


@dataclass(frozen=True)
class Asked(Question):
    """A question, its answer, and the cells (reading order) that show it; none where something is not there."""

    cells: tuple[int, ...]


def shuffled(items: list[T], rng: Random) -> list[T]:
    """A permutation. Not `rng.shuffle`: only `rng.random()` is promised to stay the same across Python versions."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


def share(items: list[T], split: str, rng: Random) -> list[T]:
    """The split's part of the items; the parts of all splits are disjoint, and their union is everything.

    Raises:
        ValueError: `split` is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split `{split}` is not one of {', '.join(SPLITS)}")
    order = shuffled(items, rng)
    first = round(SHARES["validation"] * len(order))
    second = first + round(SHARES["test"] * len(order))
    return {"validation": order[:first], "test": order[first:second], "train": order[second:]}[split]


@cache
def places() -> dict[str, dict[tuple[int, int], list[tuple[int, int]]]]:
    """For each material its blocks (row, column), each with the (top, left) of all crops inside it and an area.

    A block that has crops of two materials is only used for the first of them.
    """
    found: dict[str, dict[tuple[int, int], list[tuple[int, int]]]] = {}
    taken: set[tuple[str, int, int]] = set()
    for material, (photo, boxes) in AREAS.items():
        blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for left, top, right, bottom in boxes:
            for y, x in product(range(top, bottom - CELL + 1), range(left, right - CELL + 1)):
                block = (y // BLOCK, x // BLOCK)
                if block == ((y + CELL - 1) // BLOCK, (x + CELL - 1) // BLOCK) and (photo, *block) not in taken:
                    blocks.setdefault(block, []).append((y, x))
        taken |= {(photo, *block) for block in blocks}
        found[material] = {block: sorted(set(corners)) for block, corners in sorted(blocks.items())}
    return found


def split_places(split: str) -> dict[str, list[tuple[int, int]]]:
    """For each material the (top, left) of the split's crops."""
    return {
        material: [
            corner for block in sorted(share(list(blocks), split, Random(f"blocks:{material}"))) for corner in blocks[block]
        ]
        for material, blocks in places().items()
    }


@cache
def plain_bank(split: str) -> Bank:
    """The split's crops and letters as they are."""
    photos = {name: load_sample_image(f"{name}.jpg") for name in PHOTOS}
    crops = tuple(
        np.stack([photos[AREAS[material][0]][y : y + CELL, x : x + CELL] for y, x in corners])
        for material, corners in split_places(split).items()
    )
    own = sorted(share(list(LETTER_PLACES), split, Random("letters")))
    return Bank(crops, tuple(np.stack([draw_letter(letter, *place) for place in own]) for letter in LETTERS))


def draw_letter(letter: str, size: int, right: int, down: int) -> NDArray[np.float32]:
    """Masks (2, 16, 16) in 0..1: the letter's ink, and the ink with an outline of one pixel."""
    font, middle = ImageFont.load_default(size), (CELL / 2 + right, CELL / 2 + down)
    masks = []
    for outline in (0, 1):
        image = Image.new("L", (CELL, CELL))
        ImageDraw.Draw(image).text(middle, letter, fill=255, font=font, anchor="mm", stroke_width=outline)
        masks.append(np.asarray(image, dtype=np.float32) / 255.0)
    return np.stack(masks)


def draw_scene(bank: Bank, rng: Random) -> Scene:
    """A random canvas: of a few materials or of all, with no letter, a few, or one on every cell."""
    palette = shuffled(list(range(len(MATERIALS))), rng)[: pick(rng, (2, 3, 5, 7, 7))]
    materials = tuple(pick(rng, palette) for _ in CELLS)
    p_letter = pick(rng, (0.3, 0.5, 0.7, 0.9))
    order = iter(shuffled(list(range(len(LETTERS))), rng))
    letters = tuple(next(order) if rng.random() < p_letter else None for _ in CELLS)
    canvas = np.empty((SIDE, SIDE, 3), dtype=np.uint8)
    for cell, (material, letter) in enumerate(zip(materials, letters, strict=True)):
        crops = bank.crops[material]
        tile = crops[int(rng.random() * len(crops))].astype(np.float32)
        if letter is not None:  # white with a black outline, readable on everything
            masks = bank.letters[letter]
            ink, outline = masks[int(rng.random() * len(masks))][..., None]
            tile = tile * (1 - outline) * (1 - ink) + 255 * ink
        y, x = cell // GRID * CELL, cell % GRID * CELL
        canvas[y : y + CELL, x : x + CELL] = tile.round()
    return Scene(canvas, materials, letters)


Made = tuple[str, str, list[int]] | None  # question, answer, and the cells that it follows from


def _two_cells(rng: Random) -> tuple[int, int]:
    first, second = shuffled(list(range(len(CELLS))), rng)[:2]
    return first, second


def _any_cell(rng: Random) -> int:
    return int(rng.random() * len(CELLS))


def _line(rng: Random) -> tuple[str, list[int]]:
    line = int(rng.random() * GRID)
    if rng.random() < 0.5:
        return f"{ROWS[line]} row", list(range(GRID * line, GRID * (line + 1)))
    return f"{COLUMNS[line]} column", list(range(line, len(CELLS), GRID))


def _what(scene: Scene, rng: Random) -> Made:
    cell = _any_cell(rng)
    return f"What is at the {CELLS[cell]}?", MATERIALS[scene.materials[cell]], [cell]


def _letter(scene: Scene, rng: Random) -> Made:
    cell = _any_cell(rng) if rng.random() < 0.3 or not scene.lettered else pick(rng, scene.lettered)
    letter = scene.letters[cell]
    return f"Which letter is at the {CELLS[cell]}?", "none" if letter is None else LETTERS[letter], [cell]


def _photo(scene: Scene, rng: Random) -> Made:
    cell = _any_cell(rng)
    return f"Which photo is the {CELLS[cell]} from?", PHOTOS[AREAS[MATERIALS[scene.materials[cell]]][0]], [cell]


def _brighter(scene: Scene, rng: Random) -> Made:
    a, b = _two_cells(rng)
    difference = scene.brightness(a) - scene.brightness(b)
    if abs(difference) < BRIGHTER:
        return None
    return f"Which is brighter, {CELLS[a]} or {CELLS[b]}?", CELLS[a if difference > 0 else b], [a, b]


def _same(scene: Scene, rng: Random) -> Made:
    wanted, (a, b) = rng.random() < 0.5, _two_cells(rng)
    if (scene.materials[a] == scene.materials[b]) != wanted:
        return None
    return f"Are {CELLS[a]} and {CELLS[b]} the same material?", "yes" if wanted else "no", [a, b]


def _count(scene: Scene, rng: Random) -> Made:
    material = pick(rng, scene.materials) if rng.random() < 0.8 else int(rng.random() * len(MATERIALS))
    cells = [cell for cell, m in enumerate(scene.materials) if m == material]
    return f"How many {MATERIALS[material]} tiles?", str(len(cells)), cells


def _locate(scene: Scene, rng: Random) -> Made:
    absent = [m for m in range(len(MATERIALS)) if m not in scene.materials]
    if absent and rng.random() < 0.2:
        return f"Where is the {MATERIALS[pick(rng, absent)]}?", "nowhere", []
    single = [cell for cell, m in enumerate(scene.materials) if scene.materials.count(m) == 1]
    if not single:
        return None
    cell = pick(rng, single)
    return f"Where is the {MATERIALS[scene.materials[cell]]}?", CELLS[cell], [cell]


def _find(scene: Scene, rng: Random) -> Made:
    if not scene.lettered:
        return None
    cell = pick(rng, scene.lettered)
    return f"Where is the {LETTERS[scene.letters[cell] or 0]}?", CELLS[cell], [cell]


def _behind(scene: Scene, rng: Random) -> Made:
    if not scene.lettered:
        return None
    cell = pick(rng, scene.lettered)
    return f"What is behind the {LETTERS[scene.letters[cell] or 0]}?", MATERIALS[scene.materials[cell]], [cell]


def _row(scene: Scene, rng: Random) -> Made:
    name, cells = _line(rng)
    return f"List the {name}.", " ".join(MATERIALS[scene.materials[cell]] for cell in cells), cells


def _spell(scene: Scene, rng: Random) -> Made:
    name, cells = _line(rng)
    letters = [scene.letters[cell] for cell in cells]
    return f"Spell the {name}.", " ".join("_" if letter is None else LETTERS[letter] for letter in letters), cells


def _name(scene: Scene, rng: Random) -> Made:
    cell, language = _any_cell(rng), pick(rng, tuple(NAMES))
    return f"Name the {CELLS[cell]} in {language}.", NAMES[language][scene.materials[cell]], [cell]


# A question maker returns None where the scene, or this draw, does not allow its question.
_MAKERS: dict[str, Callable[[Scene, Random], Made]] = {
    "what": _what,
    "letter": _letter,
    "photo": _photo,
    "brighter": _brighter,
    "same": _same,
    "count": _count,
    "locate": _locate,
    "find": _find,
    "behind": _behind,
    "row": _row,
    "spell": _spell,
    "name": _name,
}
KINDS = tuple(_MAKERS)
TRAINED = tuple(kind for kind in KINDS if kind not in ("same", "locate", "find"))  # what the second model was taught


def ask(scene: Scene, kind: str, rng: Random) -> Asked | None:
    """A random question of one kind, or None where the scene or the draw does not allow that kind."""
    made = _MAKERS[kind](scene, rng)
    return None if made is None else Asked(kind, made[0], made[1], tuple(made[2]))


def samples(split: str, seed: int, kinds: Sequence[str] = KINDS) -> Iterator[tuple[Scene, Asked]]:
    """An endless stream: one question per canvas, the kinds in turn."""
    bank, rng = plain_bank(split), Random(f"tiles:{split}:{seed}")
    turn = 0
    while True:
        scene = draw_scene(bank, rng)
        question = ask(scene, kinds[turn % len(kinds)], rng)
        if question is not None:
            turn += 1
            yield scene, question
