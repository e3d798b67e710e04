"""Images that a user or a data set names."""

import io

import numpy as np
from PIL import Image

from modes_cli.data.images import check_image_file
from tests.fuzz.mutate import any_bytes as mutate
from tests.fuzz.places import scratch

__all__ = ["mutate", "one", "seeds"]


def seeds() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        found.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    return [*found, buffer.getvalue()]


def one(data: bytes) -> None:
    path = scratch("image") / "image"
    path.write_bytes(data)
    found = check_image_file(path)
    assert found.mode == "RGB", found.mode
    assert found.width * found.height <= (Image.MAX_IMAGE_PIXELS or 0), "larger than the limit"
