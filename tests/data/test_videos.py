"""Frames of videos: which ones, how large, and what damaged or hostile files do."""

import io
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from modes_cli.data import videos
from modes_cli.data.images import Unusable
from modes_cli.data.videos import encoded_frames, require_decoder
from modes_cli.errors import BadOption
from tests.data.mp4 import STEP, encode

GREYS = range(10, 250, STEP)  # twelve frames


def greys(frames: Sequence[bytes]) -> list[int]:
    """Which frame of GREYS each is."""
    found = []
    for frame in frames:
        image = Image.open(io.BytesIO(frame))
        assert image.mode == "RGB"
        pixels = np.asarray(image)
        assert np.ptp(pixels) < STEP // 2  # plain, and grey
        found.append(round((pixels.mean() - GREYS[0]) / STEP))
    return found


@pytest.fixture(scope="module")
def film() -> bytes:
    return encode(GREYS)


@pytest.mark.parametrize(
    ("count", "which"), [(2, [0, 11]), (3, [0, 5, 11]), (8, [0, 1, 3, 4, 6, 7, 9, 11]), (12, list(range(12)))]
)
def test_frames_are_the_first_the_last_and_evenly_between(film: bytes, count: int, which: list[int]) -> None:
    assert greys(encoded_frames(io.BytesIO(film), count)) == which


@pytest.mark.parametrize("every", [1, 2, 4, 12])
def test_wherever_key_frames_are(every: int) -> None:
    assert greys(encoded_frames(io.BytesIO(encode(GREYS, every=every)), 12)) == list(range(12))


@pytest.mark.parametrize("codec", ["mpeg4", "libx265"])
def test_other_codecs(codec: str) -> None:
    assert greys(encoded_frames(io.BytesIO(encode(GREYS, codec=codec)), 3)) == [0, 5, 11]


def test_a_short_video_gives_each_frame_once() -> None:
    assert greys(encoded_frames(io.BytesIO(encode(GREYS[:3])), 8)) == [0, 1, 2]
    assert greys(encoded_frames(io.BytesIO(encode(GREYS[:1])), 8)) == [0]


def test_large_frames_are_scaled_down_and_small_ones_left(film: bytes) -> None:
    def size(data: bytes) -> tuple[int, int]:
        return Image.open(io.BytesIO(encoded_frames(io.BytesIO(data), 2)[0])).size

    assert size(film) == (64, 48)
    assert size(encode([99], (1920, 1080))) == (1024, 576)
    assert size(encode([99], (64, 2048))) == (32, 1024)


def test_the_same_bytes_each_time(film: bytes) -> None:
    assert encoded_frames(io.BytesIO(film), 5) == encoded_frames(io.BytesIO(film), 5)


@pytest.mark.parametrize("front", [False, True])
def test_a_truncated_file_is_refused_wherever_it_ends(front: bool) -> None:
    whole = encode(GREYS, front=front)
    frames = whole.index(b"mdat") + int.from_bytes(whole[whole.index(b"mdat") - 4 : whole.index(b"mdat")], "big") - 4
    needed = frames if front else whole.rindex(b"udta") - 4  # what comes after says only who encoded it
    for size in [0, 1, 40, *range(100, needed, 150), needed - 1]:
        with pytest.raises(Unusable):
            encoded_frames(io.BytesIO(whole[:size]), 8)


def test_bytes_changed_anywhere_are_refused_or_give_frames_of_the_same_size(film: bytes) -> None:
    for at in range(0, len(film), 97):
        damaged = bytearray(film)
        damaged[at : at + 4] = b"\xff\x00\xff\x7f"
        try:
            frames = encoded_frames(io.BytesIO(bytes(damaged)), 4)
        except Unusable as error:
            assert "\n" not in str(error)  # noqa: PT017 - most are refused, some only look different
            continue
        assert 1 <= len(frames) <= 4


def test_only_mp4_is_opened(film: bytes) -> None:
    """FFmpeg's playlists name other files; so does one that calls itself a video."""
    for data in (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile '/etc/passwd'\n", b"GIF89a", b""):
        with pytest.raises(Unusable):
            encoded_frames(io.BytesIO(data), 2)


def test_sizes_and_work_are_bounded(film: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MAX_PIXELS", 64 * 48 - 1)
        with pytest.raises(Unusable, match="too large: 64 x 48 pixels, the limit is 3071"):
            encoded_frames(io.BytesIO(film), 2)
    with monkeypatch.context() as patch:
        patch.setattr(videos, "MAX_PACKETS", 11)
        with pytest.raises(Unusable, match="more than 11 frames"):
            encoded_frames(io.BytesIO(film), 2)
    far = encode(GREYS, every=12)
    monkeypatch.setattr(videos, "MAX_DECODED", 11)
    with pytest.raises(Unusable, match="needs more than 11 frames decoded"):
        encoded_frames(io.BytesIO(far), 2)
    assert len(encoded_frames(io.BytesIO(film), 2)) == 2  # from the key frame before it, the last one is near


def test_without_pyav_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadOption, match="`video-mmmu` consists of videos, which need the package `av`") as caught:
        require_decoder("video-mmmu")
    assert caught.value.hint == "`pip install 'modes[video]'`"
    assert caught.value.exit_code == 1
