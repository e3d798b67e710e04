"""Video-MMMU: 300 lecture videos and, of each, a question of three tracks (https://arxiv.org/abs/2501.13826).

On the Hub, tables of the tracks stand beside one zip archive for each discipline; the video of row `id` is the member `id.mp4`.
The last frame of a video shows the adaptation track's question. Prompts are those of lmms-eval's `video_mmmu` tasks, and
a last line that asks for an answer that can be compared exactly.
"""

import re
from functools import partial
from typing import Any

from modes_cli.data import hub
from modes_cli.data.archives import Archives, archives_of
from modes_cli.data.checked import CheckedSource, too_few
from modes_cli.data.images import Unusable
from modes_cli.data.rows import Layout, Row
from modes_cli.data.sample import DataSpec
from modes_cli.data.videos import FRAMES, encoded_frames, require_decoder
from modes_cli.errors import BadData, BadOption

ADAPTATION = "Adaptation"  # the configuration whose questions have an image, and may be open
MOST_FRAMES = 64
MOST_OPTIONS = 26
LINK = "link_selected"  # the video's page
PAGE = re.compile(r"(?:v=|youtu\.be/|/shorts/|/embed/)([\w-]{11})")
COLUMNS = ("id", "question", "options", "answer", "question_type", "image", LINK)
LAYOUT = Layout("image", "question", "answer", task="discipline", id="id")

IGNORE_LAST = "Please ignore the Quiz question in last frame of the video."
APPLY = (
    "You should watch and learn the video content. Then apply what you learned to answer the following {kind} question. "
    "The image for this question is at the end of the video."
)
LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


def frames_of(source: str) -> int:
    """N of `video-mmmu:N`, otherwise FRAMES.

    Raises:
        BadOption: no number, or one that is not from 2 to MOST_FRAMES.
    """
    name, given, number = source.partition(":")
    if not given:
        return FRAMES
    if not re.fullmatch(r"[0-9]{1,4}", number) or not 2 <= int(number) <= MOST_FRAMES:
        raise BadOption(
            f"`{source}` does not say how many frames of each video to take",
            hint=f"`{name}:N` takes N frames, from 2 to {MOST_FRAMES}; `{name}` alone takes {FRAMES}",
        )
    return int(number)


def take_track(
    spec: DataSpec, dataset: str, track: str | None, split: str, half: int | None, prefix: str, *, text_only: bool
) -> CheckedSource:
    """Check and keep the questions with their videos' frames; with adaptation questions, their image after them.

    Args:
        track: the configuration.
        half: only rows whose video falls into this half (0 or 1) of all videos; None: all.
        prefix: what sample ids begin with.

    Raises:
        BadOption: see frames_of; PyAV is not installed.
        BadData: see open_source; no archives, or damaged ones; no column that tells rows of one video.
    """
    count = frames_of(spec.source)
    if not text_only:
        require_decoder(spec.source)
    rows = hub.stream(dataset, track, split)
    columns = hub.column_names(dataset, rows)
    if half is not None and LINK not in columns:
        raise BadData(
            f"`{dataset}` has no column `{LINK}`, which tells rows of one video; its columns are "
            + ", ".join(f"`{name}`" for name in columns[:40]),
            hint="take a whole track with `--split`, for calibration or for evaluation but not for both",
        )

    def wanted(row: Row) -> bool:
        return half is None or hub.half_of(video_of(row)) == half

    with hub.reaching(dataset):
        # A table is small, a video is not: whether there are enough is known before any is fetched.
        there = sum(wanted(row) for row in hub.select(rows, [name for name in ("id", LINK) if name in columns]))
        if spec.samples is not None and spec.samples > there:
            raise too_few(prefix, spec.samples, there)
        archives = None if text_only else archives_of(dataset, ".mp4")
    layout = LAYOUT if archives else Layout(None, LAYOUT.question, LAYOUT.answer, id=LAYOUT.id)
    return hub.take(
        spec,
        dataset,
        hub.shuffled(hub.select(rows, [name for name in COLUMNS if name in columns]), spec),
        layout,
        prefix,
        task=spec.source,
        wanted=wanted,
        complete=partial(complete, track=track or "", archives=archives, count=count),
    )


def complete(row: Row, track: str, archives: Archives | None, count: int) -> Row:
    """A row with its whole prompt, its discipline and its frames.

    Raises:
        Unusable: options that are none, no such video, or one that cannot be decoded.
    """
    row = {**row, "question": prompt(row, track)}
    if archives is None:
        return row
    name = f"{row.get('id')}.mp4"
    try:
        place = archives.place(name)
        with archives.open(name) as file:
            shown: list[Any] = list(encoded_frames(file, count))
    except Unusable as error:
        raise Unusable(f"video `{name}` {error}", hint=error.hint) from error
    image = row.get("image")
    return {**row, "image": shown if image is None else [*shown, image], "discipline": place}


def prompt(row: Row, track: str) -> str:
    """The question as lmms-eval asks it, and how to answer. A question that is not marked `multiple-choice` shows no options in
    the adaptation track.

    Raises:
        Unusable: no question, or options that are no list of text.
    """
    question, options = row.get("question"), row.get("options") or []
    if not isinstance(question, str) or not question.strip():
        raise Unusable("`question` is empty")
    choice = track != ADAPTATION or row.get("question_type") == "multiple-choice"
    if not choice:
        return f"{APPLY.format(kind='open-ended')}\n{question}\n{SHORT}"
    if (
        not isinstance(options, list)
        or not 0 < len(options) <= MOST_OPTIONS
        or not all(isinstance(one, str) for one in options)
    ):
        raise Unusable(f"`options` is no list of 1 to {MOST_OPTIONS} texts")
    asked = f"{question}\n{lettered(options)}"
    if track == ADAPTATION:
        return f"{APPLY.format(kind='multi-choice')}\n{asked}\n{LETTER}"
    return f"{asked}\n{IGNORE_LAST}\n{LETTER}"


def lettered(options: list[str]) -> str:
    """One option a line after its letter, as it is where all have theirs."""
    letters = [f"{chr(ord('A') + index)}." for index in range(len(options))]
    if all(option.startswith(letter) for letter, option in zip(letters, options, strict=True)):
        return "\n".join(options)
    return "\n".join(f"{letter} {option}" for letter, option in zip(letters, options, strict=True))


def video_of(row: Row) -> str:
    """What names a row's video: its id on YouTube, which some rows of other ids share; the row's id where the link has none."""
    found = PAGE.search(str(row.get(LINK)))
    return found[1] if found else str(row.get("id"))
