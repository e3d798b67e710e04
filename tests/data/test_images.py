"""Images that are fine in unusual ways, and images that are not."""

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from modes_cli.data import check_image_file
from modes_cli.data.images import MAX_IMAGE_BYTES, Unusable, decode_image, read_inside
from modes_cli.errors import BadData


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(kind: str, png: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(png("white", (7, 3), kind))
    image = check_image_file(path)
    assert (image.mode, image.size) == ("RGB", (7, 3))


def saved(image: PIL.Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def test_is_turned_upright_by_its_exif_orientation() -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0, 0] = 255
    image = PIL.Image.fromarray(pixels)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    upright = np.asarray(decode_image(saved(image, exif=exif)))
    assert upright.shape == (4, 2, 3)
    assert upright[0, 1].tolist() == [255, 255, 255]


def test_modes() -> None:
    grey = PIL.Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert np.asarray(decode_image(saved(grey))).tolist() == [[[128] * 3] * 2] * 2  # not clipped to white
    for mode in ("1", "L", "LA", "P", "RGBA"):
        assert decode_image(saved(PIL.Image.new(mode, (2, 2)))).mode == "RGB"
    file = io.BytesIO()
    PIL.Image.new("F", (2, 2)).save(file, "TIFF")
    with pytest.raises(Unusable, match="mode `F`"):
        decode_image(file.getvalue())


def test_every_truncation_is_noticed(png: Callable[..., bytes]) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        noise.save(file, kind)
        data = file.getvalue()
        for size in range(0, len(data) - 16, 29):
            with pytest.raises(Unusable, match=r"cannot be decoded|is not an image"):
                decode_image(data[:size])


def test_decompression_bombs_are_refused_before_they_unfold(png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    data = png("red", (40, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (1199, 599):  # PIL warns of the first, and raises for the second
            monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(Unusable, match="is too large"):
                decode_image(data)
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1200)
        assert decode_image(data).size == (40, 30)


def test_postscript_is_not_run() -> None:
    with pytest.raises(Unusable, match="is not an image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_paths_stay_inside_the_folder(tmp_path: Path, png: Callable[..., bytes]) -> None:
    folder, outside = tmp_path / "data", tmp_path / "secret.png"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes(png())
    (folder / "in.png").write_bytes(png())
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "fine.png").symlink_to("in.png")
    assert read_inside(folder, "in.png") == read_inside(folder, "fine.png") == read_inside(folder, "sub/../in.png") == png()
    for name, reason in [
        ("../secret.png", "leads out"),
        ("sub/../../secret.png", "leads out"),
        ("link.png", "leads out"),
        ("up/secret.png", "leads out"),
        (str(outside), "absolute"),
        (str(folder / "in.png"), "absolute"),
        ("C:\\secret.png", "absolute"),
        ("missing.png", "does not exist"),
        ("loop", "not a usable path"),
        ("sub", "not a regular file"),
        ("", "empty"),
        ("a\0b", "not a usable path"),
        ("x" * 5000, "not a usable path|cannot be read"),
    ]:
        with pytest.raises(Unusable, match=reason):
            read_inside(folder, name)


def test_files_users_name(tmp_path: Path, png: Callable[..., bytes]) -> None:
    os.mkfifo(tmp_path / "pipe")  # must not wait for a writer
    (tmp_path / "text").write_text("hello")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    for name, reason in [
        ("none", "does not exist"),
        ("pipe", "regular file"),
        ("text", "not an image"),
        ("huge", "bytes"),
        (".", "regular file"),
    ]:
        with pytest.raises(BadData, match=reason) as caught:
            check_image_file(tmp_path / name)
        assert f"`{tmp_path / name}`" in str(caught.value)
        assert caught.value.hint


def test_the_package_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, modes_cli.data; sys.exit(any(name in sys.modules for name in ('torch', 'datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
