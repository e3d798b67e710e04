"""`--data digits`: the built-in DigitsVQA samples. Nothing is read or downloaded but the bundled scans."""

from collections.abc import Iterator, Sequence
from itertools import islice

from PIL import Image

from modes_cli.data import Use
from modes_cli.data.checked import SampleDigest
from modes_cli.data.digits_vqa import SPLITS
from modes_cli.data.digits_vqa import samples as draw
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.errors import BadOption

DEFAULT_SAMPLES = 88  # eight of each of the eleven kinds


def claims(source: str) -> bool:
    return source == "digits"


def default_split(source: str, use: Use) -> str | None:
    return "validation" if use == "calibrate" else "test"


def open_samples(spec: DataSpec, *, text_only: bool) -> "DigitsSource":
    """Raises BadOption for a split that does not exist, and for column options."""
    split = spec.split or "validation"
    if split not in SPLITS:
        raise BadOption(f"`digits` has no split `{split}`", hint=f"use {', '.join(f'`{name}`' for name in SPLITS)}")
    refuse_columns(spec)
    return DigitsSource(spec, split, text_only=text_only)


def refuse_columns(spec: DataSpec) -> None:
    """Column options have no effect on built-in data sets; saying nothing would hide a mistake."""
    given = {
        "--image-column": spec.image_column,
        "--question-column": spec.question_column,
        "--answer-column": spec.answer_column,
    }
    for option, value in given.items():
        if value is not None:
            raise BadOption(
                f"`{option} {value}` does not apply to `{spec.source}`, whose columns are fixed", hint="leave it out"
            )


class DigitsSource:
    """The first samples of the endless stream of one split and seed; drawn again each time they are iterated."""

    def __init__(self, spec: DataSpec, split: str, *, text_only: bool) -> None:
        self.spec = spec
        self._split, self._text_only = split, text_only
        self._count = DEFAULT_SAMPLES if spec.samples is None else spec.samples
        digest = SampleDigest()
        for sample in self:
            digest.add(sample)
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        stream = islice(draw(self._split, self.spec.seed), self._count)
        for index, (scene, question) in enumerate(stream):
            images = () if self._text_only else (Image.fromarray(scene.canvas),)
            yield Sample(
                f"digits/{self._split}/{self.spec.seed}/{index}", images, question.text, question.answer, question.kind
            )

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def bad(self) -> Sequence[str]:
        return ()
