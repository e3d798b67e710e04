"""PhotoTiles: what the canvases show and what is answered, read back from pixels by code that shares nothing with it."""

import importlib
import json
import operator
from collections.abc import Iterator
from functools import cache, reduce
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from modes_cli.data.local import open_samples
from modes_cli.data.sample import DataSpec
from tools import second_task as tiles

CELL_NAMES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
LINES = {f"{row} row": [3 * n, 3 * n + 1, 3 * n + 2] for n, row in enumerate(("top", "middle", "bottom"))} | {
    f"{column} column": [n, n + 3, n + 6] for n, column in enumerate(("left", "center", "right"))
}


@cache
def photo(name: str) -> NDArray[np.int16]:
    return load_sample_image(f"{name}.jpg").astype(np.int16)


def codes_of(pixels: NDArray[np.int16]) -> NDArray[np.int64]:
    """[..., 3] -> [...]: one number for each colour."""
    return pixels.astype(np.int64) @ np.array([65536, 256, 1])


@cache
def by_color(name: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The photograph's colours [H, W], the same sorted, and where each of those is."""
    codes = codes_of(photo(name))
    order = codes.reshape(-1).argsort(kind="stable")
    return codes, codes.reshape(-1)[order], order


@cache
def glyphs() -> list[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    return [(letter, *tiles.draw_letter(letter, *spot)) for letter in tiles.LETTERS for spot in tiles.LETTER_PLACES]


def cells_of(canvas: NDArray[np.uint8]) -> list[NDArray[np.int16]]:
    return [canvas[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].astype(np.int16) for r in range(3) for c in range(3)]


MANY = 12  # places of a crop at which the search ends: it is plain white sky


def places_of(tile: NDArray[np.int16], free: NDArray[np.bool_]) -> list[tuple[str, int, int]]:
    """(photograph, top, left) whose pixels are the tile's where it is `free` of a letter, MANY at most in each."""
    found, pixels, wanted = [], np.argwhere(free), codes_of(tile)[free]
    for name in ("china", "flower"):
        codes, ordered, order = by_color(name)
        low, high = np.searchsorted(ordered, wanted), np.searchsorted(ordered, wanted, side="right")
        rarest = int((high - low).argmin())  # the pixel of the tile whose colour is in the fewest places
        starts = np.stack(np.divmod(order[low[rarest] : high[rarest]], codes.shape[1]), 1) - pixels[rarest]
        starts = starts[(starts >= 0).all(1) & (starts + 16 <= codes.shape).all(1)]
        for (y, x), code in zip(pixels, wanted, strict=True):
            if not len(starts):
                break
            starts = starts[codes[starts[:, 0] + y, starts[:, 1] + x] == code]
        found += [(name, int(top), int(left)) for top, left in starts[:MANY]]
    return found


def material_at(place: tuple[str, int, int]) -> str | None:
    """The one material with a box around all of the crop."""
    name, top, left = place
    found = [
        material
        for material, (source, boxes) in tiles.AREAS.items()
        if source == name and any(a <= left and b <= top and left + 16 <= c and top + 16 <= d for a, b, c, d in boxes)
    ]
    return found[0] if len(found) == 1 else None


def readings(tile: NDArray[np.int16]) -> Iterator[tuple[str | None, tuple[str, int, int]]]:
    """All (letter or None, place of a crop) that give exactly the tile: no letter, or white ink in a black outline."""
    for place in places_of(tile, np.ones((16, 16), dtype=bool)):
        yield None, place
    for letter, ink, outline in glyphs():
        if (tile[ink == 1] < 255).any() or (tile[(outline == 1) & (ink == 0)] > 0).any():
            continue
        for name, top, left in places_of(tile, (ink == 0) & (outline == 0)):
            crop = photo(name)[top : top + 16, left : left + 16]
            if (abs(crop * ((1 - outline) * (1 - ink))[..., None] + 255 * ink[..., None] - tile) < 1).all():
                yield letter, (name, top, left)


def read_back(canvas: NDArray[np.uint8]) -> tuple[list[str], list[str | None], list[set[tuple[str, int, int]]]]:
    """What each cell shows, which letter is on it, and where in the photographs it can be from; asserts that it is clear."""
    materials, letters, places = [], [], []
    for tile in cells_of(canvas):
        found = {(letter, place) for letter, place in readings(tile) if material_at(place) is not None}
        assert len({letter for letter, _ in found}) == 1, found
        assert len({material_at(place) for _, place in found}) == 1, found
        letter, place = next(iter(found))
        materials.append(str(material_at(place)))
        letters.append(letter)
        places.append({place for _, place in found})
    return materials, letters, places


def expected(question: str, canvas: NDArray[np.uint8], materials: list[str], letters: list[str | None]) -> str:
    """The answer to a question, from its words and what the canvas was seen to show."""
    words = question.rstrip("?.").split()
    cells = [CELL_NAMES.index(f"{a} {b}") for a, b in pairwise(words) if f"{a} {b}" in CELL_NAMES]
    line = next((LINES[name] for name in LINES if f" {name}" in question), [])
    match words:
        case ["What", "is", "at", *_]:
            return materials[cells[0]]
        case ["Which", "letter", *_]:
            return letters[cells[0]] or "none"
        case ["Which", "photo", *_]:
            return "flower" if materials[cells[0]] in ("petal", "leaf") else "temple"
        case ["Which", "is", "brighter,", *_]:
            cells = [CELL_NAMES.index(name) for name in question[len("Which is brighter, ") : -1].split(" or ")]
            light = [cells_of(canvas)[cell].mean() for cell in cells]
            assert abs(light[0] - light[1]) >= 25
            return CELL_NAMES[cells[int(np.argmax(light))]]
        case ["Are", *_]:
            return "yes" if materials[cells[0]] == materials[cells[1]] else "no"
        case ["How", "many", material, "tiles"]:
            return str(sum(found == material for found in materials))
        case ["Where", "is", "the", thing]:
            there = [n for n in range(9) if thing in (materials[n], letters[n])]
            assert len(there) < 2
            return CELL_NAMES[there[0]] if there else "nowhere"
        case ["What", "is", "behind", "the", letter]:
            return materials[letters.index(letter)]
        case ["List", *_]:
            return " ".join(materials[cell] for cell in line)
        case ["Spell", *_]:
            return " ".join(letters[cell] or "_" for cell in line)
        case ["Name", *_, language]:
            return tiles.NAMES[language][tiles.MATERIALS.index(materials[cells[0]])]
    raise AssertionError(question)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_answer_follows_from_the_pixels(split: str) -> None:
    seen = set()
    for scene, question in islice(tiles.samples(split, 3), len(tiles.KINDS)):
        materials, letters, _ = read_back(scene.canvas)
        assert expected(question.text, scene.canvas, materials, letters) == question.answer, question
        seen.add(question.kind)
    assert seen == set(tiles.KINDS)


def test_no_pixel_is_in_two_splits_and_crops_come_from_their_own() -> None:
    owner = {name: np.full(photo(name).shape[:2], -1) for name in ("china", "flower")}
    for number, split in enumerate(tiles.SPLITS):
        for material, corners in tiles.split_places(split).items():
            assert corners, (split, material)
            own = owner[tiles.AREAS[material][0]]
            for y, x in corners:
                pixels = own[y : y + 16, x : x + 16]
                assert np.isin(pixels, (-1, number)).all(), (split, material, y, x)
                pixels[:] = number
    scene, _ = next(tiles.samples("test", 0))
    clear = [where for where in read_back(scene.canvas)[2] if len(where) < MANY]
    assert len(clear) > 4
    for where in clear:
        assert any(
            (owner[name][top : top + 16, left : left + 16] == tiles.SPLITS.index("test")).all() for name, top, left in where
        )


def test_letters_are_drawn_elsewhere_in_each_split() -> None:
    drawn = [{glyph.tobytes() for glyphs in tiles.plain_bank(split).letters for glyph in glyphs} for split in tiles.SPLITS]
    assert all(drawn)
    assert not (drawn[0] & drawn[1])
    assert not (drawn[0] & drawn[2])
    assert not (drawn[1] & drawn[2])
    assert len({glyph for glyphs in drawn for glyph in glyphs}) == len(tiles.LETTERS) * len(tiles.LETTER_PLACES)


def test_a_stream_is_decided_by_split_and_seed() -> None:
    def first(split: str, seed: int) -> list[Any]:
        return [(scene.canvas.tobytes(), question) for scene, question in islice(tiles.samples(split, seed), 24)]

    assert first("test", 1) == first("test", 1)
    assert len({repr(first(*key)) for key in (("test", 1), ("test", 2), ("validation", 1))}) == 3
    assert {question.kind for _, question in islice(tiles.samples("test", 1, tiles.TRAINED), 24)} == set(tiles.TRAINED)
    with pytest.raises(ValueError, match="split `dev` is not one of"):
        first("dev", 1)


def test_splitting_covers_everything_once() -> None:
    items = list(range(97))
    parts = [tiles.share(items, split, Random(5)) for split in tiles.SPLITS]
    assert sorted(reduce(operator.iadd, parts, [])) == items
    assert min(map(len, parts)) == len(parts[1]) == 12


def test_answers_cannot_be_told_from_the_question() -> None:
    """The best guess that ignores the image: the most frequent answer to the same words."""
    asked: dict[str, list[str]] = {}
    for _, question in islice(tiles.samples("train", 9), 3000):
        asked.setdefault(question.text, []).append(question.answer)
    guessed = sum(max(map(answers.count, answers)) for answers in asked.values() if len(answers) > 4)
    assert guessed / sum(len(answers) for answers in asked.values() if len(answers) > 4) < 0.45


def test_the_folder_is_what_the_data_option_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(tiles.__file__).parent))
    write_folder = importlib.import_module("second_data").write_folder
    folders = [write_folder(tmp_path / name, "validation", 24, 0) for name in ("one", "again")]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in folders]
    assert files[0] == files[1]
    assert len(files[0]) == 25
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files[0])
    samples = list(open_samples(DataSpec(str(folders[0]), None, None, 0), text_only=False))
    drawn = list(islice(tiles.samples("validation", 0), 24))
    assert [sample.task for sample in samples] == [question.kind for _, question in drawn]
    for sample, (scene, question) in zip(samples, drawn, strict=True):
        assert (sample.question, sample.answer) == (question.text, question.answer)
        assert np.array_equal(np.asarray(sample.images[0]), scene.canvas)
    row = json.loads((folders[0] / "samples.jsonl").read_text("utf-8").splitlines()[0])
    with Image.open(folders[0] / row["image"]) as image:
        assert image.size == (48, 48)
