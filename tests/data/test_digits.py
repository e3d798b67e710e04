"""The built-in samples: the same everywhere, balanced, from scans of their own split, with right answers."""

from collections import Counter

import numpy as np
import pytest

from modes_cli.data import DataSpec, batches, default_split, open_source
from modes_cli.data.digits_vqa import CELLS, COLOR_NAMES, KINDS, SPLITS, Scene, load_scans, samples
from modes_cli.errors import BadOption


def digits(**options: object) -> DataSpec:
    return DataSpec(**{"source": "digits", "split": None, "samples": None, **options})  # type: ignore[arg-type]


def test_default_is_88_validation_samples_with_every_kind_eight_times() -> None:
    source = open_source(digits())
    read = list(source)
    assert len(source) == len(read) == 88
    assert Counter(sample.task for sample in read) == dict.fromkeys(KINDS, 8)
    assert read[17].id == "digits/validation/0/17"
    assert {(image.mode, image.size) for sample in read for image in sample.images} == {("RGB", (48, 48))}
    assert list(source.bad) == []


def test_same_spec_same_samples_and_another_seed_or_split_or_count_others() -> None:
    first = open_source(digits(samples=22))
    assert list(first) == list(first)  # PIL images compare by their pixels
    assert first.digest == open_source(digits(samples=22)).digest
    others = [digits(samples=22, seed=1), digits(samples=22, split="test"), digits(samples=23)]
    assert len({open_source(spec).digest for spec in others} | {first.digest}) == 4
    assert [s.question for s in open_source(digits(samples=44))][:22] == [s.question for s in first]


def test_digest_is_the_one_of_every_other_machine() -> None:
    assert open_source(digits(samples=11)).digest == "9137104581a565ef5c32f145fabc7578c97b210a46e3f14788cb085c9f185fd4"


def test_splits_share_no_scan() -> None:
    of_split = {split: {scan.tobytes() for scan in load_scans(split)[0]} for split in SPLITS}
    assert sum(len(load_scans(split)[0]) for split in SPLITS) == 1797
    assert not of_split["train"] & of_split["test"]
    assert not of_split["validation"] & (of_split["train"] | of_split["test"])
    with pytest.raises(ValueError, match="`dev`"):
        load_scans("dev")


def answer(scene: Scene, kind: str, text: str) -> str | None:
    """The answer worked out again from the scene; None for the kinds that are not recomputed here."""
    cells = [CELLS.index(cell) for cell in sorted(CELLS, key=text.find) if cell in text]
    values = [scene.digits[cell] for cell in cells]
    shown = Counter(COLOR_NAMES[scene.colors[cell]] for cell in range(9) if scene.digits[cell] is not None)
    match kind:
        case "count":
            return str(sum(digit is not None for digit in scene.digits))
        case "count_color":
            return str(shown[text.split()[2]])
        case "exists":
            return "yes" if int(text.split()[-1][:-1]) in scene.digits else "no"
        case "read":
            return "nothing" if values[0] is None else str(values[0])
        case "color":
            return "nothing" if values[0] is None else COLOR_NAMES[scene.colors[cells[0]]]
        case "add":
            return str(sum(value or 0 for value in values if len(values) == 2))
        case "multiply":
            return str(int(np.prod([value or 0 for value in values])))
        case "larger":
            return CELLS[cells[int(np.argmax([value or 0 for value in values]))]]
    return None


def test_answers_follow_from_the_scene() -> None:
    checked: Counter[str] = Counter()
    stream = samples("train", 3)
    for _ in range(440):
        scene, question = next(stream)
        expected = answer(scene, question.kind, question.text)
        if expected is not None:
            assert question.answer == expected, question
            checked[question.kind] += 1
        shown = scene.canvas.reshape(3, 16, 3, 16, 3).max((1, 3, 4)).ravel() > 0  # a cell is dark where it is empty
        assert shown.tolist() == [digit is not None for digit in scene.digits]
    assert set(checked.values()) == {40}
    assert len(checked) == 8


def test_batches_keep_order_and_the_rest() -> None:
    source = open_source(digits(samples=10))
    found = list(batches(source, 4))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert [sample.id for batch in found for sample in batch] == [sample.id for sample in source]
    with pytest.raises(BadOption, match="`--batch-size 0`"):
        batches(source, 0)


def test_text_only_has_no_images() -> None:
    source = open_source(digits(samples=5), text_only=True)
    assert all(sample.images == () for sample in source)
    assert source.digest != open_source(digits(samples=5)).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "no split `dev`"),
        ({"image_column": "x"}, "`--image-column x` does not apply"),
        ({"samples": 0}, "`--samples 0`"),
        ({"seed": -1}, "`--seed -1`"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadOption, match=message) as caught:
        open_source(digits(**options))
    assert caught.value.hint


def test_evaluation_never_scores_what_calibration_saw() -> None:
    for source in ("digits", "gqa", "coco", "video-mmmu"):
        assert default_split(source, "calibrate") != default_split(source, "evaluate")
    assert default_split("digits", "calibrate") == "validation"
    assert default_split("owner/name", "evaluate") is None
