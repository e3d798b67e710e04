"""`--data gqa|coco|video-mmmu`: data sets of the Hub whose configurations, splits, columns and prompts are known.

Default splits for calibration and evaluation never share an image or a video: tuned on what is scored, results look better
than they are. `video-mmmu:N` takes N frames of each video.
"""

from collections.abc import Callable
from dataclasses import dataclass

from modes_cli.data import Use, hub, joined, video_mmmu
from modes_cli.data.checked import CheckedSource
from modes_cli.data.digits import refuse_columns
from modes_cli.data.rows import Layout, Row
from modes_cli.data.sample import DataSpec
from modes_cli.errors import BadOption


@dataclass(frozen=True)
class Part:
    """One split as users name it.

    `images`: the configuration with the images, where questions and images are apart.
    `half`: only rows whose id, or video, falls into this half (0 or 1); None: all.
    """

    split: str
    config: str | None = None
    images: str | None = None
    half: int | None = None


@dataclass(frozen=True)
class Preset:
    """How one data set of the Hub is read. `videos`: it is Video-MMMU, whose samples are frames."""

    dataset: str
    parts: dict[str, Part]
    calibrate: str
    evaluate: str
    layout: Layout
    join: str | None = None  # the question's column that holds its image's id
    videos: bool = False


# The line that lmms-eval adds, so that numbers can be compared.
_SHORT = "{question}\nAnswer the question using a single word or phrase."

PRESETS: dict[str, Preset] = {
    # Questions and images are separate configurations. Only these three splits have answers; `testdev` is what is scored.
    "gqa": Preset(
        "lmms-lab/GQA",
        {name: Part(name, f"{name}_balanced_instructions", f"{name}_balanced_images") for name in ("train", "val", "testdev")},
        calibrate="train",
        evaluate="testdev",
        layout=Layout("image", "question", "answer", task="types", id="id", template=_SHORT),
        join="imageId",
    ),
    # Only `val` has captions, so it is divided; `val` itself is all of it, to compare with published numbers.
    "coco": Preset(
        "lmms-lab/COCO-Caption",
        {"calibration": Part("val", half=0), "evaluation": Part("val", half=1), "val": Part("val")},
        calibrate="calibration",
        evaluate="evaluation",
        layout=Layout(
            "image", None, "answer", id="question_id", template="Provide a one-sentence caption for the provided image."
        ),
    ),
    # The tracks ask about the same 300 videos, so each is divided by video; a track's own name is all of it.
    "video-mmmu": Preset(
        "lmms-lab/VideoMMMU",
        {
            f"{name.lower()}{part}": Part("test", name, half=half)
            for name in ("Perception", "Comprehension", "Adaptation")
            for part, half in (("", None), ("-calibration", 0), ("-evaluation", 1))
        },
        calibrate="perception-calibration",
        evaluate="adaptation-evaluation",
        layout=video_mmmu.LAYOUT,
        videos=True,
    ),
}


def claims(source: str) -> bool:
    preset = PRESETS.get(source.partition(":")[0])
    return preset is not None and (preset.videos or ":" not in source)


def default_split(source: str, use: Use) -> str | None:
    preset = PRESETS[source.partition(":")[0]]
    return preset.calibrate if use == "calibrate" else preset.evaluate


def open_samples(spec: DataSpec, *, text_only: bool) -> CheckedSource:
    """Raises BadOption for an unknown split, column options, and videos without PyAV; BadData as `hub` does."""
    return open_preset(PRESETS[spec.source.partition(":")[0]], spec, text_only=text_only)


def open_preset(preset: Preset, spec: DataSpec, *, text_only: bool) -> CheckedSource:
    """As open_samples, for any preset."""
    refuse_columns(spec)
    name = spec.split or preset.calibrate
    part = preset.parts.get(name)
    if part is None:
        raise BadOption(
            f"`{spec.source}` has no split `{name}`", hint=f"use {', '.join(f'`{known}`' for known in preset.parts)}"
        )
    layout = preset.layout
    if text_only:
        layout = Layout(None, layout.question, layout.answer, layout.task, layout.id, layout.template)
    prefix = f"{spec.source}/{name}"
    if preset.videos:
        return video_mmmu.take_track(spec, preset.dataset, part.config, part.split, part.half, prefix, text_only=text_only)
    rows = hub.stream(preset.dataset, part.config, part.split)
    if part.images is not None and preset.join is not None and not text_only:
        images = hub.stream(preset.dataset, part.images, part.split)
        return joined.take_joined(
            spec, preset.dataset, rows, images, layout, prefix, by=preset.join, task=task_of(spec, layout)
        )
    rows = hub.shuffled(hub.select(rows, layout.columns), spec)
    half = part.half
    wanted = None if half is None else lambda row: hub.half_of(row.get(layout.id or "")) == half
    return hub.take(spec, preset.dataset, rows, layout, prefix, task=task_of(spec, layout), wanted=wanted)


def task_of(spec: DataSpec, layout: Layout) -> Callable[[Row], str]:
    """A function from a row to its task. GQA's `types` is a struct, of which `structural` (query, verify, logical, choose,
    compare) is the usual one to report by."""

    def task(row: Row) -> str:
        types = row.get(layout.task) if layout.task is not None else None
        said = types.get("structural") if isinstance(types, dict) else None
        return said if isinstance(said, str) and said.strip() else spec.source

    return task
