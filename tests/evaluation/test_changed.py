"""Questions whose answer changed, and the small pictures that go with them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image, ImageCms

from modes_cli.data.sample import DataSpec, Sample
from modes_cli.evaluation.changed import KEPT, MOST_CHARACTERS, SIZES, changed_answers, thumbnail


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def opened(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    assert image.format == "PNG"
    image.load()
    return image


def test_a_small_image_keeps_its_pixels() -> None:
    image = noise(56, 28)
    assert np.array_equal(np.asarray(opened(thumbnail(image))), np.asarray(image))


@pytest.mark.parametrize(("width", "height", "wanted"), [(640, 480, (160, 120)), (300, 3000, (16, 160)), (5000, 3, (160, 1))])
def test_a_large_image_is_shrunk_as_it_is_shaped(width: int, height: int, wanted: tuple[int, int]) -> None:
    shrunk = opened(thumbnail(Image.new("RGB", (width, height), (10, 200, 30))))
    assert shrunk.size == wanted
    assert shrunk.getpixel((0, 0)) == (10, 200, 30)


def test_what_hardly_compresses_is_shrunk_further() -> None:
    """Noise at the largest size would be too long; at the smallest, nothing is."""
    text = thumbnail(noise(SIZES[0], SIZES[0]))
    assert len(text) <= MOST_CHARACTERS
    assert max(opened(text).size) < SIZES[0]
    assert len(thumbnail(noise(SIZES[-1], SIZES[-1]))) <= MOST_CHARACTERS
    assert KEPT * MOST_CHARACTERS < 1e6


def test_only_pixels_are_kept_and_always_the_same() -> None:
    image = noise(40, 40)
    plain = thumbnail(image)
    image.info.update(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), comment=b"where it was")
    assert thumbnail(image) == plain
    assert "icc_profile" in image.info  # the sample is not touched
    assert opened(thumbnail(image.convert("L"))).mode == "RGB"


@dataclass
class Source:
    """Samples that count how often they are read."""

    samples: list[Sample]
    spec: DataSpec = field(default_factory=lambda: DataSpec("made", None, None))
    digest: str = ""
    bad: tuple[str, ...] = ()
    read: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.samples:
            self.read += 1
            yield sample


def source(count: int) -> Source:
    return Source([Sample(str(n), (noise(8, 8, n), noise(9, 9)), f"What is {n}?", str(n), "read") for n in range(count)])


def test_those_that_became_right_or_wrong_with_the_first_image() -> None:
    samples = source(5)
    full, skipped = ["0", "1", "x", "y", "z"], ["0", "w", "2", "q", "z"]  # the fourth is wrong in another way
    right = [True, True, False, False, False], [True, False, True, False, False]
    lost, won = changed_answers(samples, (full, skipped), right)
    assert (lost.id, lost.answer, lost.full, lost.skipped) == ("1", "1", "1", "w")
    assert (won.id, won.full, won.skipped) == ("2", "x", "2")
    assert lost.image is not None
    assert np.array_equal(np.asarray(opened(lost.image)), np.asarray(samples.samples[1].images[0]))
    assert samples.read <= 4  # none is read that is not needed


def test_no_more_than_fit() -> None:
    many = source(KEPT + 9)
    texts, right = ["a"] * len(many), ([True] * len(many), [False] * len(many))
    assert [one.id for one in changed_answers(many, (texts, texts), right)] == [str(n) for n in range(KEPT)]
    assert changed_answers(many, (texts, texts), (right[0], right[0])) == []


def test_without_images() -> None:
    text = Source([Sample("a", (), "What?", "b", "read")])
    (one,) = changed_answers(text, (["b"], ["c"]), ([True], [False]))
    assert one.image is None
