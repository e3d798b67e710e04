"""Video-MMMU on a small copy in the Hub's layout: tables of three tracks, and archives of .mp4 files."""

from __future__ import annotations

import dataclasses
import io
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

from modes_cli import app, options
from modes_cli.artifacts import Calibration
from modes_cli.data import DataSpec, default_split, open_source
from modes_cli.data.hub import half_of
from modes_cli.data.overlap import overlap, sample_digest
from modes_cli.data.presets import PRESETS
from modes_cli.data.sample import Sample, SampleSource
from modes_cli.data.video_mmmu import video_of
from modes_cli.errors import BadData, BadOption
from modes_cli.run_folder import RunFolder
from tests.data.mp4 import encode

if TYPE_CHECKING:
    from modes_cli.models.loading import Loaded

VIDEOS = 8
TRACKS = ("Perception", "Comprehension", "Adaptation")
# Disciplines as the Hub's archives, and how much of a path members have.
PLACES = ("Art", "Business", "Science")
FEATURES = datasets.Features(
    {
        **{name: datasets.Value("string") for name in ("id", "question", "answer", "question_type", "link_selected")},
        "options": datasets.List(datasets.Value("string")),
    }
)


def name(number: int) -> str:
    return f"validation_{('Art_Theory', 'Finance', 'Physics')[number % 3]}_{number}"


def row(track: str, number: int) -> dict[str, Any]:
    """Videos 0 and 1 are the same one on YouTube."""
    return {
        "id": name(number),
        "question": f"{track} {number}: <image 1>?",
        "options": [f"no {number}", "yes"] if number % 2 else [f"A. no {number}", "B. yes"],
        "answer": "B" if track != "Adaptation" or number else "7.5",
        "question_type": "multiple-choice" if track != "Adaptation" or number else "open",
        "link_selected": f"https://www.youtube.com/watch?v=video-{max(number, 1):05}&t=3s",
    }


def grey(number: int, frame: int) -> int:
    return 20 + 25 * number + 3 * frame


def pack(folder: Path, films: dict[str, bytes]) -> None:
    for place, discipline in enumerate(PLACES):
        with zipfile.ZipFile(folder / f"{discipline}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(place, VIDEOS, len(PLACES)):
                archive.writestr(f"{discipline}/{name(number)}.mp4", films[name(number)])
                archive.writestr(f"__MACOSX/{discipline}/._{name(number)}.mp4", b"\x00\x05\x16\x07")
    with zipfile.ZipFile(folder / "question_only.zip", "w") as archive:
        archive.writestr(f"question_only/{name(0)}_image.mp4", films[name(0)])


@pytest.fixture(scope="module")
def films() -> dict[str, bytes]:
    """Ten frames each, of greys that no two videos share."""
    return {name(number): encode([grey(number, frame) for frame in range(10)], (48, 48)) for number in range(VIDEOS)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, films: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.mktemp("VideoMMMU")
    parts = []
    for track in TRACKS:
        features, rows = dict(FEATURES), [row(track, number) for number in range(VIDEOS)]
        if track == "Adaptation":
            features["image"] = datasets.Image()
            rows = [{**one, "image": {"bytes": picture(), "path": f"{one['id']}.png"}} for one in rows]
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        (folder / track).mkdir()
        table.to_parquet(folder / track / "test-00000-of-00001.parquet")
        parts.append(f"- config_name: {track}\n  data_files:\n  - {{split: test, path: {track}/test-*}}")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(parts) + "\n---\n")
    pack(folder, films)
    return folder


def picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def preset(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`video-mmmu` is the small copy."""
    monkeypatch.setitem(PRESETS, "video-mmmu", dataclasses.replace(PRESETS["video-mmmu"], dataset=str(hub)))


def read(split: str | None, source: str = "video-mmmu", *, text_only: bool = False, **more: Any) -> SampleSource:
    return open_source(DataSpec(**{"source": source, "split": split, "samples": None, **more}), text_only=text_only)


def numbers(samples: Any) -> list[int]:
    return [int(sample.id.rpartition("_")[2]) for sample in samples]


def greys(sample: Sample) -> list[float]:
    return [float(np.asarray(image).mean()) for image in sample.images]


@pytest.mark.usefixtures("preset")
def test_every_question_is_shown_its_own_video_in_order() -> None:
    samples = list(read("perception"))
    assert numbers(samples) == list(range(VIDEOS))
    for number, sample in enumerate(samples):
        assert len(sample.images) == 8  # of ten frames: the first, the last and those evenly between
        wanted = [grey(number, frame) for frame in (0, 1, 2, 3, 5, 6, 7, 9)]
        assert np.allclose(greys(sample), wanted, atol=1.6)  # frames are 3 apart, videos 25
        assert sample.task == PLACES[number % 3]
    assert samples[3].id == "video-mmmu/perception/validation_Art_Theory_3"


@pytest.mark.usefixtures("preset")
def test_the_number_of_frames() -> None:
    (sample,) = read("comprehension", "video-mmmu:3", samples=1)
    first = numbers([sample])[0]
    assert np.allclose(greys(sample), [grey(first, frame) for frame in (0, 4, 9)], atol=1.6)
    for source in ("video-mmmu:", "video-mmmu:1", "video-mmmu:65", "video-mmmu:eight", "video-mmmu:-2", "video-mmmu:2.0"):
        with pytest.raises(BadOption, match=f"`{source}` does not say how many frames") as caught:
            read(None, source)
        assert "`video-mmmu:N` takes N frames, from 2 to 64" in str(caught.value.hint)
    assert default_split("video-mmmu:16", "evaluate") == default_split("video-mmmu", "evaluate")
    with pytest.raises(BadData, match="there is no data set `gqa:3`"):
        read(None, "gqa:3")


@pytest.mark.usefixtures("preset")
def test_prompts_of_the_tracks() -> None:
    letter = "Answer with the option's letter from the given choices directly."
    for track in ("Perception", "Comprehension"):
        for number, sample in enumerate(read(track.lower(), text_only=True)):
            assert sample.question == (
                f"{track} {number}: <image 1>?\nA. no {number}\nB. yes\n"
                f"Please ignore the Quiz question in last frame of the video.\n{letter}"
            )
            assert (sample.answer, sample.images) == ("B", ())
    opened, *choices = read("adaptation")
    apply = "You should watch and learn the video content. Then apply what you learned to answer the following"
    at_end = "question. The image for this question is at the end of the video."
    assert choices[0].question == f"{apply} multi-choice {at_end}\nAdaptation 1: <image 1>?\nA. no 1\nB. yes\n{letter}"
    assert opened.question == (
        f"{apply} open-ended {at_end}\nAdaptation 0: <image 1>?\nAnswer the question using a single word or phrase."
    )
    assert opened.answer == "7.5"
    for sample in (opened, *choices):  # the question's own image is the last
        assert len(sample.images) == 9
        assert (sample.images[-1].size, sample.images[-1].getpixel((0, 0))) == ((30, 20), (255, 0, 0))


@pytest.mark.usefixtures("preset")
def test_what_is_calibrated_on_shows_no_video_that_is_scored() -> None:
    both = [[set(numbers(read(f"{track.lower()}-{part}"))) for part in ("calibration", "evaluation")] for track in TRACKS]
    assert both[0] == both[1] == both[2]  # the same videos whichever the track
    calibrated, scored = both[0]
    assert calibrated | scored == set(range(VIDEOS))
    assert calibrated
    assert scored
    assert not calibrated & scored
    assert not {0, 1} & calibrated or {0, 1} <= calibrated  # one video under two ids is on one side
    assert all(half_of(video_of(row("Perception", number))) == 0 for number in calibrated)

    splits = [default_split("video-mmmu", use) for use in ("calibrate", "evaluate")]
    assert splits == ["perception-calibration", "adaptation-evaluation"]
    tuned, asked = ([sample_digest(sample) for sample in read(split)] for split in splits)
    assert overlap(asked, tuned) == 0
    assert overlap([sample_digest(sample) for sample in read("perception")], tuned) == len(tuned)  # frames are the same again


@pytest.mark.usefixtures("preset")
def test_a_seeded_draw_is_the_same_again(films: dict[str, bytes]) -> None:
    few = read("perception", samples=3, seed=5)
    assert few.digest == read("perception", samples=3, seed=5).digest
    assert len({read("perception", samples=3, seed=seed).digest for seed in range(4)}) > 1
    assert few.digest != read("perception", "video-mmmu:4", samples=3, seed=5).digest
    assert [sample.images for sample in few] == [sample.images for sample in few]  # decoded anew


@pytest.mark.usefixtures("preset")
def test_too_few_are_refused_before_a_video_is_read(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modes_cli.data.video_mmmu.archives_of", lambda *_: pytest.fail("archives were opened"))
    with pytest.raises(BadData, match=r"`video-mmmu/perception` has `8` usable samples, not `9`"):
        read("perception", samples=9)


def test_bad_videos_are_named(hub: Path, films: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    copy = shutil.copytree(hub, tmp_path / "copy")
    monkeypatch.setitem(PRESETS, "video-mmmu", dataclasses.replace(PRESETS["video-mmmu"], dataset=str(copy)))
    film = films[name(4)]
    for bad, reason in [(film[: len(film) // 2], "cannot be decoded"), (b"", "cannot be decoded"), (b"MZ" * 99, "cannot be")]:
        pack(copy, {**films, name(4): bad})
        with pytest.raises(BadData, match=rf"`video-mmmu/perception/{name(4)}`: video `{name(4)}.mp4` {reason}"):
            read("perception")
    pack(copy, films)
    (copy / "Business.zip").unlink()
    with pytest.raises(BadData, match=rf"`{name(1)}.mp4` is in none of the archives"):
        read("perception")
    monkeypatch.setattr("modes_cli.data.checked.MOST_BAD", 2)  # as with hundreds of rows: a few are left out
    assert numbers(left := read("perception")) == [0, 2, 3, 5, 6]
    assert len(left.bad) == 3
    assert len(read("perception", text_only=True)) == VIDEOS


def test_without_pyav_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("modes_cli.data.hub.stream", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(BadOption, match="need the package `av`") as caught:
        read(None)
    assert caught.value.hint == "`pip install 'modes[video]'`"


def test_halves_need_the_column_that_tells_videos(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    copy = shutil.copytree(hub, tmp_path / "copy")
    monkeypatch.setitem(PRESETS, "video-mmmu", dataclasses.replace(PRESETS["video-mmmu"], dataset=str(copy)))
    table = copy / "Perception" / "test-00000-of-00001.parquet"
    datasets.Dataset.from_parquet(str(table)).remove_columns("link_selected").to_parquet(table)
    with pytest.raises(BadData, match="no column `link_selected`, which tells rows of one video; its columns are `id`"):
        read("perception-calibration")
    assert len(read("perception")) == VIDEOS


@pytest.mark.usefixtures("preset")
def test_a_batch_for_the_model(digits: Loaded) -> None:
    from modes_cli.models.inputs import measuring_batch

    samples = list(read("adaptation", "video-mmmu:4", samples=2))
    batch = measuring_batch(digits, samples)
    assert batch.inputs["image_grid_thw"].shape == (10, 3)  # four frames and the question's image, twice
    inputs = batch.inputs["input_ids"]
    patches = int(batch.inputs["image_grid_thw"].prod(1).sum())
    assert int((inputs == digits.model.config.image_token_id).sum()) == patches // 4  # 2 x 2 patches a token
    assert digits.model(**batch.inputs).logits.isfinite().all()


@pytest.mark.usefixtures("preset", "one_thread")
def test_calibrate_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def calibrate(run: str) -> int:
        arguments = ["calibrate", "digits", "--data", "video-mmmu:2", "--device", "cpu", "--run", str(tmp_path / run)]
        return app.run([*arguments, "--samples", "2", "--batch-size", "1"])

    assert calibrate("run") == 0
    kept = RunFolder(tmp_path / "run").read(Calibration)
    assert (kept.data.source, kept.data.split, kept.data.samples) == ("video-mmmu:2", "perception-calibration", 2)
    own = [sample_digest(sample) for sample in read("perception-calibration", "video-mmmu:2", samples=2)]
    assert kept.sample_digests == own
    monkeypatch.setitem(sys.modules, "av", None)
    assert calibrate("other") == 1
    assert "pip install 'modes[video]'" in capfd.readouterr().err


def test_default_counts_are_what_there_is() -> None:
    """Halves have about 150 rows, and a video has 45 MB."""
    columns = (None, None, None)
    for source in ("video-mmmu", "video-mmmu:16"):
        assert options.calibration_data("m", source, None, None, 0, columns).samples == 64
        assert options.evaluation_data("m", source, None, None, 0, columns).samples == 100
