"""Evenly spaced frames of .mp4 files that may be truncated, hostile or not videos at all.

Frames become images, in order, and not a processor's video input: video processors need torchvision, which nothing else here
does, and several of lmms-eval's models show frames as images too. Every family that takes images can so be shown a video.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator
from itertools import groupby
from typing import IO, TYPE_CHECKING, NamedTuple

import PIL.Image
from PIL.Image import Image, Resampling

from modes_cli.data.images import Unusable
from modes_cli.errors import BadOption, first_line

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

FRAMES = 8  # of each video, where nothing else is asked for
LONGEST_SIDE = 1024  # pixels of a frame: what qwen-vl-utils allows of a 16:9 frame (768 x 28 x 28 pixels), nearly
MAX_PIXELS = 8192 * 4320
MAX_PACKETS = 500_000  # coded frames: four hours at 30 per second
MAX_DECODED = 30_000  # frames decoded to reach those wanted


class Packet(NamedTuple):
    """One coded frame: when it is shown and decoded, in the stream's time base."""

    pts: int
    dts: int
    key: bool


def require_decoder(source: str) -> None:
    """Raises BadOption when PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise BadOption(
            f"`{source}` consists of videos, which need the package `av`: {first_line(error)}",
            hint="`pip install 'modes[video]'`",
        ) from error


def encoded_frames(file: IO[bytes], count: int = FRAMES) -> tuple[bytes, ...]:
    """`count` frames of a video as PNG, RGB, in order, of at most LONGEST_SIDE pixels a side: the first, the last and those
    evenly between them by number, `floor(i (n - 1) / (count - 1))` of n frames, as `np.linspace(0, n - 1, count, dtype=int)`
    of lmms-eval's readers has them. A video of fewer frames gives each once.

    Args:
        file: an .mp4, seekable. No other format is tried: some of FFmpeg's name further files to open.
        count: at least two.

    Raises:
        Unusable: the reason, to stand after the video's name.
    """
    import av

    try:
        with av.open(file, "r", format="mp4") as container:
            return tuple(_png(frame) for frame in _frames(container, count))
    except (Unusable, MemoryError):
        raise
    # FFmpeg's errors derive from ValueError, OSError, EOFError and more.
    except (av.FFmpegError, ValueError, OSError, EOFError, OverflowError) as error:
        raise Unusable(f"cannot be decoded: {first_line(error)}") from error


def _frames(container: "InputContainer", count: int) -> Iterator[Image]:
    from av.stream import Disposition

    # A cover is a stream too.
    stream = next((one for one in container.streams.video if Disposition.attached_pic not in one.disposition), None)
    if stream is None or stream.codec_context is None:  # the second where the codec is not known
        raise Unusable("has no video stream that can be read")
    _check_size(stream.codec_context.width, stream.codec_context.height)
    # One thread: with several, what FFmpeg makes up for damaged parts may depend on their number.
    stream.codec_context.thread_count = 1
    packets = _packets(container, stream)
    shown = sorted(packet.pts for packet in packets)
    last = len(shown) - 1
    wanted = sorted({shown[i * last // (count - 1)] for i in range(count)})
    # Decoding starts at the last key frame that is shown at the wanted one or before it.
    keys = sorted(packet for packet in packets if packet.key)
    times = [packet.pts for packet in keys]
    decoded = 0
    for key, group in groupby(wanted, lambda pts: keys[bisect_right(times, pts) - 1]):
        missing = set(group)
        container.seek(key.dts, stream=stream, backward=True)
        for frame in container.decode(stream):
            decoded += 1
            if decoded > MAX_DECODED:
                raise Unusable(f"needs more than {MAX_DECODED} frames decoded: its key frames are too far apart")
            if frame.pts not in missing:
                continue
            if frame.is_corrupt:
                raise Unusable(f"is damaged at {frame.time:.3f} s")
            _check_size(frame.width, frame.height)
            yield _scaled(PIL.Image.fromarray(frame.to_ndarray(format="rgb24")))
            missing.remove(frame.pts)
            if not missing:
                break
        if missing:
            raise Unusable(f"has no frame at {float(min(missing) * (stream.time_base or 0)):.3f} s, where its index names one")


def _packets(container: "InputContainer", stream: "VideoStream") -> list[Packet]:
    """Every coded frame that is shown, from the first key frame on, in decoding order. Nothing is decoded."""
    packets: list[Packet] = []
    read = 0
    for packet in container.demux(stream):
        if packet.size == 0:  # the one that marks the end
            continue
        read += 1
        if read > MAX_PACKETS:
            raise Unusable(f"has more than {MAX_PACKETS} frames")
        if packet.is_corrupt:
            raise Unusable(f"is truncated or damaged at frame {read}")
        if packet.pts is None or packet.dts is None:
            raise Unusable(f"has a frame without a time, number {read}")
        if not packet.is_discard and (packets or packet.is_keyframe):
            packets.append(Packet(packet.pts, packet.dts, packet.is_keyframe))
    if read < stream.frames:
        raise Unusable(f"is truncated: {read} of its {stream.frames} frames are there")
    # What is shown before the first key frame refers to frames that are not there.
    packets = [packet for packet in packets if packet.pts >= packets[0].pts]
    if not packets:
        raise Unusable("has no frames")
    return packets


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Unusable(f"has frames of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise Unusable(f"is too large: {width} x {height} pixels, the limit is {MAX_PIXELS}", hint="make it smaller")


def _scaled(image: Image) -> Image:
    longest = max(image.size)
    if longest <= LONGEST_SIDE:
        return image
    width, height = (max(1, round(side * LONGEST_SIDE / longest)) for side in image.size)
    return image.resize((width, height), Resampling.BICUBIC)


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
