"""Data sets that keep questions and images in two tables, as GQA does: 943,000 questions on 72,000 images of 10 GB.

With `--samples N` images are streamed first, N of them and no more; then the questions, of which each image gets one
(a second round follows where images are fewer). So little is downloaded, and the samples are as different as can be.
Without it, every image is fetched and the questions follow in their order.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, zip_longest
from typing import Any

from modes_cli.data import hub
from modes_cli.data.checked import Candidate, Check, CheckedSource
from modes_cli.data.images import Unusable
from modes_cli.data.rows import Layout, RawSample, Reader, Row, build, image_bytes
from modes_cli.data.sample import DataSpec
from modes_cli.data.spool import Span, Spool

BATCH = 4096  # questions looked at together

# Where each image lies, by id; or why it cannot be used.
Places = dict[str, Span | Unusable]


def take_joined(
    spec: DataSpec,
    dataset: str,
    questions: Any,
    images: Any,
    layout: Layout,
    prefix: str,
    *,
    by: str,
    task: Callable[[Row], str],
) -> CheckedSource:
    """Check and keep the questions together with their images.

    Args:
        questions: a stream of rows as `layout` has them, except for the image.
        images: a stream with the columns `id` and `image`.
        by: the questions' column that holds the id of their image.

    Raises:
        BadData: see open_source.
    """
    check, spool, read = Check(spec.source, spec.samples), Spool(), hub.reader(dataset)
    image = layout.image or "image"

    def load(row: Row, name: str) -> RawSample:
        place = places.get(str(row.get(by)))
        if place is None:
            raise Unusable(f"its image `{row.get(by)}` is not in the data set")
        if isinstance(place, Unusable):
            raise place
        return build({**row, image: spool.get(place)}, name, layout, read, task=task(row))

    def candidates(rows: Iterable[Row]) -> Iterator[Candidate]:
        for index, row in enumerate(rows):
            name = hub.sample_name(prefix, row, layout, index)
            yield Candidate(name, partial(load, row, name))

    with hub.reaching(dataset):
        pictures = hub.shuffled(images.select_columns(["id", "image"]), spec)
        places = fetch(islice(pictures, spec.samples), spool, read)
        questions = hub.select(questions, [*layout.columns, by])
        rows = questions if spec.samples is None else spread(questions, list(places), by, layout.id or by, spec.seed)
        for raw in check.usable(candidates(rows)):
            spool.add(raw)
    return CheckedSource(spec, check, spool.candidates)


def fetch(pictures: Iterable[Row], spool: Spool, read: Reader) -> Places:
    """Keep images by id, undecoded."""
    places: Places = {}
    for row in pictures:
        try:
            places[str(row.get("id"))] = spool.put_once(image_bytes(row.get("image"), "image", read))
        except Unusable as error:
            places[str(row.get("id"))] = error
    return places


def spread(questions: Any, keys: list[str], by: str, name: str, seed: int) -> Iterator[Row]:
    """The questions on some images, in rounds: one of each image in the order of `keys`, then another of each.

    Which of an image's questions comes first is decided by the seed and the question's id alone, not by their order.
    """
    of_image: dict[str, list[Row]] = {key: [] for key in keys}
    for table in questions.with_format("arrow").iter(batch_size=BATCH):
        for at, key in enumerate(table.column(by).to_pylist()):
            if str(key) in of_image:
                of_image[str(key)].append(table.slice(at, 1).to_pylist()[0])
    for rows in of_image.values():
        rows.sort(key=lambda row: (hashlib.sha256(f"{seed}:{row.get(name)}".encode("utf-8", "replace")).digest(), str(row)))
    for turn in zip_longest(*of_image.values()):
        yield from (row for row in turn if row is not None)
