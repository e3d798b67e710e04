"""Small .mp4 files to read back, encoded with PyAV: every frame is of one grey of its own."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

STEP = 20  # between the greys of frames: far more than what coding changes


def encode(
    greys: Sequence[int], size: tuple[int, int] = (64, 48), *, every: int = 5, codec: str = "libx264", front: bool = False
) -> bytes:
    """A video of plain frames, 10 a second, with a key frame at every `every`th and B-frames between.

    Args:
        front: the index goes before the frames, as web sites have it.
    """
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        _write(file.name, greys, size, every, codec, front)
        return Path(file.name).read_bytes()


def _write(path: str, greys: Sequence[int], size: tuple[int, int], every: int, codec: str, front: bool) -> None:
    with av.open(path, "w", options={"movflags": "faststart"} if front else {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = every
        if codec == "libx264":
            stream.options = {"bf": "2", "sc_threshold": "0", "x264-params": "open-gop=1"}
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
