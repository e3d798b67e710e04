"""The questions that skipping made right or wrong, with a small picture of what they are about."""

import base64
import io
from collections.abc import Sequence

from PIL.Image import Image, Resampling

from modes_cli.artifacts.evaluation import ChangedAnswer
from modes_cli.data.sample import SampleSource

KEPT = 24  # questions that the artifact remembers, the first ones
SIZES = (160, 128, 96)  # pixels of the longer side; the first that is short enough is taken
MOST_CHARACTERS = 40_000  # of one image, so that all stay below 1 MB; 96 x 96 pixels fit, whatever they show


def changed_answers(
    source: SampleSource, texts: tuple[Sequence[str], Sequence[str]], right: tuple[Sequence[bool], Sequence[bool]]
) -> list[ChangedAnswer]:
    """The first questions that one of two ways of answering has right and the other has not.

    Args:
        texts: answers to the samples of `source`, in its order: with all experts, and skipping.
        right: which of these are right.
    """
    changed = [index for index, (one, other) in enumerate(zip(*right, strict=True)) if one != other][:KEPT]
    found: list[ChangedAnswer] = []
    for index, sample in enumerate(source):
        if len(found) == len(changed):
            break  # the rest need not be read again
        if index == changed[len(found)]:
            found.append(
                ChangedAnswer(
                    id=sample.id,
                    task=sample.task,
                    question=sample.question,
                    answer=sample.answer,
                    full=texts[0][index],
                    skipped=texts[1][index],
                    image=thumbnail(sample.images[0]) if sample.images else None,
                )
            )
    return found


def thumbnail(image: Image) -> str:
    """An image as PNG, base64: as it is where it is small, else shrunk. The same image gives the same characters."""
    for size in SIZES:
        small = image.convert("RGB").copy()
        small.info.clear()  # colour profiles, comments: only pixels are kept
        if max(small.size) > size:
            small.thumbnail((size, size), Resampling.LANCZOS, reducing_gap=None)
        file = io.BytesIO()
        small.save(file, "PNG", optimize=False)
        text = base64.b64encode(file.getvalue()).decode("ascii")
        if len(text) <= MOST_CHARACTERS:
            break
    return text
