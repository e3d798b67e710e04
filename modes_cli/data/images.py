"""Reading images that may be truncated, hostile or not images at all."""

import io
import os
import stat
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import PIL.Image
from PIL.Image import Image, Transpose

from modes_cli.errors import BadData

MAX_IMAGE_BYTES = 256 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # raster only; EPS would start Ghostscript
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


class Unusable(Exception):
    """Why one sample cannot be used; the sample is named by whoever catches it. Never reaches the user as it is."""

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


def check_image_file(path: Path) -> Image:
    """An image the user named, decoded in full: upright, RGB.

    Raises:
        BadData: missing, not a file, truncated, larger than PIL.Image.MAX_IMAGE_PIXELS, not an image.
    """
    try:
        return decode_image(read_file(path))
    except Unusable as error:
        raise BadData(f"image `{path}` {error}", hint=error.hint or f"give a readable image ({', '.join(FORMATS)})") from error


def decode_image(data: bytes) -> Image:
    """The whole image, turned upright by its EXIF orientation, as RGB. Of an animation, the first frame.

    Raises:
        Unusable: the reason, to stand after the image's name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of a decompression bomb; here it is an error, two lines down
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image)
                image.load()
                turn = UPRIGHT.get(_orientation(image))
                rgb = _to_rgb(image)
                return rgb if turn is None else rgb.transpose(turn)
    except (Unusable, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise Unusable(f"is too large: {_one_line(error)}", hint="make it smaller") from error
    except PIL.UnidentifiedImageError as error:
        raise Unusable(f"is not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error, ...
        raise Unusable(f"cannot be decoded: {_one_line(error)}") from error


def _check_size(image: Image) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Unusable(f"is too large: {image.width} x {image.height} pixels, the limit is {limit}", hint="make it smaller")


def _orientation(image: Image) -> int:
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not make the pixels unusable
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image) -> Image:
    """A new RGB image. 16-bit grey is scaled: PIL alone would clip nearly all of it to white."""
    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Unusable(f"has pixels of mode `{image.mode}`, whose range is not known", hint="convert it to 8 bits per channel")
    return image.convert("RGB")


def read_inside(folder: Path, name: str) -> bytes:
    """The bytes of a file that a data file refers to, which must lie in the data file's folder.

    Raises:
        Unusable: absolute, leading out of the folder (also through a symbolic link), missing, not a regular file.
    """
    if not name:
        raise Unusable("the path of the image is empty")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise Unusable(f"image `{name}` is an absolute path", hint=f"give paths relative to `{folder}`")
    try:
        root = folder.resolve(strict=True)
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a null byte
        raise Unusable(f"image `{name!r}` is not a usable path: {_one_line(error)}") from error
    if not path.is_relative_to(root):
        raise Unusable(f"image `{name}` leads out of the data folder", hint=f"put the images into `{folder}`")
    try:
        return read_file(path)
    except Unusable as error:
        raise Unusable(f"image `{name}` {error}", hint=error.hint) from error


def read_file(path: Path) -> bytes:
    """All bytes of a regular file of at most MAX_IMAGE_BYTES.

    Raises:
        Unusable: the reason, to stand after the file's name.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not make us wait
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise Unusable("is not a regular file")
            if status.st_size > MAX_IMAGE_BYTES:
                raise Unusable(f"has {status.st_size} bytes, the limit is {MAX_IMAGE_BYTES}")
            with open(handle, "rb", closefd=False) as file:
                return file.read(MAX_IMAGE_BYTES)
        finally:
            os.close(handle)
    except FileNotFoundError as error:
        raise Unusable("does not exist") from error
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot be read: {getattr(error, 'strerror', None) or _one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
