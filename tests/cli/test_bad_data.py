"""Samples without an image, with an unreadable one, with an empty answer: named, and no more than 1% of them borne."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.process import Commands, content

SIDE = 16


def png() -> bytes:
    made = io.BytesIO()
    Image.effect_noise((SIDE, SIDE), 80).convert("RGB").save(made, "PNG")
    return made.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder for a data set, with images good and bad."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.png").write_bytes(png())
    (folder / "truncated.png").write_bytes(png()[:-200])
    (folder / "text.png").write_text("this is no image")
    (tmp_path / "outside.png").write_bytes(png())
    return folder


def write(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(**other: Any) -> dict[str, Any]:
    return {"image": "good.png", "question": "How many?", "answer": "two", **other}


BAD: dict[str, tuple[dict[str, Any] | str, str]] = {
    "no image": (row(image=None), "has no image"),
    "an empty list of images": (row(image=[]), "has no image"),
    "a truncated image": (row(image="truncated.png"), "cannot be decoded"),
    "not an image": (row(image="text.png"), "is not an image"),
    "a missing file": (row(image="none.png"), "does not exist"),
    "a folder": (row(image="."), "not a regular file"),
    "an image elsewhere": (row(image="../outside.png"), "leads out of the data folder"),
    "an image anywhere": (row(image="/etc/hostname"), "absolute path"),
    "an empty answer": (row(answer=""), "`answer` is empty"),
    "a blank answer": (row(answer="  "), "`answer` is empty"),
    "no answer": (row(answer=None), "`answer` is empty"),
    "a number": (row(answer=2), "not text"),
    "an empty question": (row(question=""), "`question` is empty"),
    "no JSON": ('{"image": "good.png", ', "not JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named(command: Commands, tiny_checkpoint: Path, data: Path, tmp_path: Path, kind: str) -> None:
    bad, reason = BAD[kind]
    path = write(data, row(), bad, row())
    ended = command("profile", tiny_checkpoint, "--data", path, "--samples", 3, "--run", tmp_path / "run", "--json")
    ended.refused("bad_data", "`data.jsonl:2`", reason, "more than 1%")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", ["profile", "calibrate", "evaluate"])
def test_no_image_anywhere(command: Commands, tiny_checkpoint: Path, folder: Path, data: Path, step: str) -> None:
    path = write(data, *({"question": "How many?", "answer": "two"} for _ in range(4)))
    before = content(folder)
    model = [] if step == "evaluate" else [tiny_checkpoint]
    ended = command(step, *model, "--data", path, "--samples", 4, "--run", folder, "--json")
    ended.refused("bad_data", "no image column", "`question`, `answer`", hint="`--image-column NAME`")
    assert content(folder) == before


def test_up_to_1_percent_are_left_out_and_named(command: Commands, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    path = write(data, *(row() for _ in range(60)), row(image="truncated.png"), *(row() for _ in range(39)))
    arguments = ("profile", tiny_checkpoint, "--data", path, "--samples", 99, "--run", tmp_path / "run", "--batch-size", 33)
    ended = command(*arguments).ok()
    assert "left out `data.jsonl:61`: the image cannot be decoded" in ended.err
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["data"]["samples"] == 99
    assert command(*arguments, "--quiet").ok().err == ""


def test_more_than_1_percent_are_not(command: Commands, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    path = write(data, row(answer=""), *(row() for _ in range(110)), row(image="truncated.png"))
    ended = command("profile", tiny_checkpoint, "--data", path, "--samples", 110, "--run", tmp_path / "run", "--json")
    ended.refused("bad_data", "`2` of the", "more than 1%", "`data.jsonl:1`", "`answer` is empty")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data/none.jsonl", ["does not exist"]),
        ("data", ["0 data files"]),
        ("data/text.png", ["kind that cannot be read"]),
        ("nothing-of-this-name", ["there is no data set `nothing-of-this-name`"]),
    ],
)
def test_no_data(command: Commands, tiny_checkpoint: Path, data: Path, tmp_path: Path, source: str, words: list[str]) -> None:
    where = data.parent / source if source.startswith("data") else source
    ended = command("calibrate", tiny_checkpoint, "--data", where, "--samples", 1, "--run", tmp_path / "run", "--json")
    ended.refused("bad_data", *words)
    assert not (tmp_path / "run").exists()


def test_fewer_samples_than_asked_for(command: Commands, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    path = write(data, row(), row())
    ended = command("calibrate", tiny_checkpoint, "--data", path, "--samples", 3, "--run", tmp_path / "run", "--json")
    ended.refused("bad_data", "`2` usable samples, not `3`", hint="`--samples 2`")


def test_data_that_changes_while_it_is_used(command: Commands, tiny_checkpoint: Path, folder: Path, data: Path) -> None:
    """Between two commands; that is a stale calibration, not a wrong one."""
    path = write(data, row(), row(answer="three"))
    options = ("--run", folder, "--json")
    command("calibrate", tiny_checkpoint, "--data", path, "--samples", 2, "--fresh", *options).ok()
    shutil.copy(data / "truncated.png", data / "good.png")
    before = content(folder)
    command("search", "--target", 0.3, "--fresh", *options).refused("bad_data", "`data.jsonl:1`", "cannot be decoded")
    assert content(folder) == before


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("truncated.png", "bad_data", ["truncated.png"]),
        ("text.png", "bad_data", ["text.png"]),
        ("none.png", "bad_data", ["none.png", "is not a file"]),
    ],
)
def test_generate_with_an_unreadable_image(
    command: Commands, folder: Path, data: Path, name: str, kind: str, words: list[str]
) -> None:
    (folder / "bundle").mkdir()
    (folder / "bundle" / "bundle.json").write_text("{}")  # images are looked at first
    ended = command("generate", folder / "bundle", "--prompt", "What?", "--image", data / name, "--json")
    ended.refused(kind, *words)
