"""From one row of a table (a dict) to one sample: which columns, which types, what is refused."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from modes_cli.data.images import MAX_IMAGE_BYTES, Unusable, decode_image
from modes_cli.data.sample import DataSpec, Sample
from modes_cli.errors import BadData

IMAGE_COLUMNS = ("image", "images", "file_name", "image_path")
QUESTION_COLUMNS = ("question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "answers", "label")
TASK_COLUMNS = ("task", "question_type", "category")
ID_COLUMNS = ("question_id", "id")
MAX_IMAGES = 256  # per sample
MAX_PIXELS = 1 << 30  # of all images of a sample, which are in memory together; 256 frames of 1080p are half of it

Row = dict[str, Any]
Reader = Callable[[str], bytes]  # the bytes of an image that a row names; raises Unusable


@dataclass(frozen=True)
class RawSample:
    """A sample whose images are still encoded. `index` is where its source finds it again."""

    id: str
    images: tuple[bytes, ...]
    question: str
    answer: str
    task: str
    index: int = 0

    def decode(self) -> Sample:
        """Raises Unusable, naming the image where there is more than one."""
        images, pixels = [], 0
        for number, data in enumerate(self.images, 1):
            try:
                images.append(decode_image(data))
            except Unusable as error:
                name = "the image" if len(self.images) == 1 else f"image {number} of {len(self.images)}"
                raise Unusable(f"{name} {error}", hint=error.hint) from error
            pixels += images[-1].width * images[-1].height
            if pixels > MAX_PIXELS:
                reached = f"the first {number} of {len(self.images)} images"
                raise Unusable(f"{reached} have {pixels} pixels, the limit is {MAX_PIXELS}", hint="make them smaller")
        return Sample(self.id, tuple(images), self.question, self.answer, self.task)


@dataclass(frozen=True)
class Layout:
    """Which columns hold what. `image` None: no images are read. `question` None: the template is the whole question."""

    image: str | None
    question: str | None
    answer: str
    task: str | None = None
    id: str | None = None
    template: str = "{question}"

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        names = (self.image, self.question, self.answer, self.task, self.id)
        return list(dict.fromkeys(name for name in names if name is not None))


def find_layout(name: str, available: Collection[str], spec: DataSpec, *, text_only: bool) -> Layout:
    """The user's columns, otherwise the first usual name that is there.

    Args:
        name: the data set, for the message.
        available: the columns that exist.

    Raises:
        BadData: a column is missing; lists those that exist.
    """
    missing: list[str] = []

    def find(what: str, asked: str | None, usual: tuple[str, ...]) -> str:
        found = asked if asked is not None else next((column for column in usual if column in available), None)
        if found in available and found is not None:
            return found
        missing.append(f"{what} column `{found}`" if found else f"{what} column")
        return ""

    image = None if text_only else find("image", spec.image_column, IMAGE_COLUMNS)
    question = find("question", spec.question_column, QUESTION_COLUMNS)
    answer = find("answer", spec.answer_column, ANSWER_COLUMNS)
    if missing:
        columns = ", ".join(f"`{column}`" for column in list(available)[:40]) or "none"
        options = " ".join(f"--{item.split()[0]}-column NAME" for item in missing)
        without = "; a model without vision needs `--text-only`" if image == "" else ""
        raise BadData(
            f"`{name}` has no {' and no '.join(missing)}; its columns are {columns}", hint=f"name it with `{options}`{without}"
        )
    task = next((column for column in TASK_COLUMNS if column in available), None)
    return Layout(image, question, answer, task, next((column for column in ID_COLUMNS if column in available), None))


def build(row: Row, name: str, layout: Layout, read: Reader, *, task: str, index: int = 0) -> RawSample:
    """Check one row.

    Args:
        name: the sample's id.
        task: what to call the task where the row does not say.

    Raises:
        Unusable: an empty or wrongly typed field, no image, an image that cannot be read.
    """
    question = layout.template
    if layout.question is not None:
        question = question.replace("{question}", _text(row, layout.question))
    answer = row.get(layout.answer)
    if isinstance(answer, list):  # several accepted answers: the first is the reference
        answer = answer[0] if answer else ""
    answer = _text({layout.answer: answer}, layout.answer)
    images = () if layout.image is None else _images(row.get(layout.image), layout.image, read)
    said = row.get(layout.task) if layout.task is not None else None
    return RawSample(name, images, question, answer, said if isinstance(said, str) and _clean(said) else task, index)


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None or value == "":
        raise Unusable(f"`{column}` is empty")
    if not isinstance(value, str):
        raise Unusable(f"`{column}` is of type {type(value).__name__}, not text")
    if not value.strip():
        raise Unusable(f"`{column}` is empty")
    if not _clean(value):
        raise Unusable(f"`{column}` is not valid Unicode")
    return value


def _clean(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    return bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)


def _images(value: Any, column: str, read: Reader) -> tuple[bytes, ...]:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_IMAGES:
        raise Unusable(f"`{column}` lists {len(items)} images, the limit is {MAX_IMAGES}")
    images = tuple(image_bytes(item, column, read) for item in items if item is not None)
    if not images or len(images) < len(items):
        raise Unusable(
            f"has no image in `{column}`", hint="name another column with `--image-column`, or leave such samples out"
        )
    return images


def image_bytes(item: Any, column: str, read: Reader) -> bytes:
    """One image, given as its bytes, its path, or the Hugging Face struct of both.

    Raises:
        Unusable: none of these, or unreadable.
    """
    if isinstance(item, dict) and item.keys() <= {"bytes", "path"}:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, str) and _clean(item):
        return read(item)
    if isinstance(item, bytes) and item:
        if len(item) > MAX_IMAGE_BYTES:
            raise Unusable(f"`{column}` has {len(item)} bytes, the limit is {MAX_IMAGE_BYTES}")
        return item
    if item in (None, "", b""):
        raise Unusable(
            f"has no image in `{column}`", hint="name another column with `--image-column`, or leave such samples out"
        )
    raise Unusable(
        f"`{column}` is of type {type(item).__name__}, not an image", hint="images are paths, bytes, or lists of them"
    )
