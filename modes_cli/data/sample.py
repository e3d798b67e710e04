"""What a data set gives to the rest of the tool: samples with an image, a question and an answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One question about one or more images.

    Attributes:
        id: stable name within its data set, shown when something is wrong with the sample.
        images: RGB images, in the order the prompt shows them; empty only with `--text-only`.
        question: the user's text.
        answer: the reference answer, never empty.
        task: what kind of question it is; accuracy is reported per task.
    """

    id: str
    images: tuple[Image, ...]
    question: str
    answer: str
    task: str


@dataclass(frozen=True)
class DataSpec:
    """Which samples: everything that decides them, so that two equal specs give equal samples.

    `source` is `digits`, a preset, a Hugging Face data set id, or a path. `samples` None means all (not for `digits`,
    whose stream has no end).
    """

    source: str
    split: str | None
    samples: int | None
    seed: int = 0
    image_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None


class SampleSource(Protocol):
    """A sequence of samples that can be read more than once, with a digest of what it read."""

    spec: DataSpec

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...

    @property
    def digest(self) -> str:
        """SHA-256 over ids, image pixels, questions and answers, hex."""
        ...

    @property
    def bad(self) -> Sequence[str]:
        """One line for each sample that was left out because it is unusable, naming it and saying why."""
        ...
