"""Artifacts of a run folder that are truncated, altered or hostile: the file and the place in it are named."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from modes_cli import files, run_folder
from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import Commands, content

Damage = Callable[[Path], object]


def rewrite(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def edit(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return damage


def replace(make: Damage) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def first_layer(tree: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = next(iter(tree["importance"].values()))
    return layer


ANY_JSON: dict[str, tuple[Damage, str]] = {
    "truncated": (rewrite(lambda raw: raw[: len(raw) // 2]), "line "),
    "empty": (rewrite(lambda raw: b""), "line 1 column 1"),
    "a byte too many": (rewrite(lambda raw: raw + b"}"), "Extra data"),
    "not text": (rewrite(lambda raw: raw[:40] + b"\xff" + raw[41:]), "byte 40"),
    "an unknown field": (edit(lambda tree: tree.update(extra=1)), "field `extra`"),
    "a missing field": (edit(lambda tree: tree.pop("versions")), "field `versions`"),
    "another schema": (edit(lambda tree: tree.update(schema_version=2)), "field `schema_version`"),
    "not a number": (edit(lambda tree: tree["data"].update(seed=float("nan"))), "`NaN`"),
    "infinite": (rewrite(lambda raw: raw.replace(b'"seed": 0', b'"seed": -Infinity')), "`-Infinity`"),
    "a number without end": (rewrite(lambda raw: raw.replace(b'"seed": 0', b'"seed": ' + b"9" * 5000)), "number"),
    "deep": (rewrite(lambda raw: b'{"model":' * 100_000), "nesting"),
    "large": (lambda path: os.truncate(path, run_folder.JSON_LIMIT + 1), "size 67108865"),
    "half a character": (edit(lambda tree: tree["model"].update(id="\ud800")), r"`\ud800`"),
    "a folder": (replace(lambda path: path.mkdir()), "not a regular file"),
    "a pipe": (replace(lambda path: os.mkfifo(path)), "not a regular file"),
    "a link to itself": (replace(lambda path: path.symlink_to(path)), "symbolic links"),
    "a device": (replace(lambda path: path.symlink_to("/dev/zero")), "not a regular file"),
    "words for the terminal": (
        edit(lambda tree: tree.update({"\x1b]0;title\x07\nhint: run `rm`\n": 1})),
        r"field `\x1b]0;title\x07\nhint: run `rm`\n`",
    ),
}
CALIBRATION: dict[str, tuple[Damage, str]] = {
    "shares": (edit(lambda tree: first_layer(tree).update(all=0.9)), "sums to"),
    "negative": (edit(lambda tree: first_layer(tree).update(kl_text=-1)), "kl_text"),
    "a layer less": (edit(lambda tree: tree["importance"].popitem()), "importance"),
    "tensors elsewhere": (edit(lambda tree: tree["tensors"].update(file="../../etc/passwd")), "field `tensors.file`"),
    "tensors anywhere": (edit(lambda tree: tree["tensors"].update(file="/dev/zero")), "field `tensors.file`"),
    "no options": (edit(lambda tree: tree.update(options={})), "options"),
    "a strange option": (edit(lambda tree: tree["options"].update(batch_size="many")), "batch_size"),
    "other layers": (
        edit(lambda tree: tree.update(importance={f"{k}7": v for k, v in tree["importance"].items()})),
        "importance",
    ),
}
THRESHOLDS: dict[str, tuple[Damage, str]] = {
    "negative": (edit(lambda tree: tree["results"][0]["tau"].update(text=-0.1)), "field `results.0.tau.text`"),
    "overflow": (rewrite(lambda raw: raw.replace(b'"text": 0.', b'"text": 1e999, "x": 0.', 1)), "results.0.tau"),
    "too little": (edit(lambda tree: tree["results"][0].update(skip_ratio=0.1)), "below its target"),
    "another order": (edit(lambda tree: tree["results"].reverse()), "rising order"),
    "a group that is none": (edit(lambda tree: tree["results"][1]["tau"].update(special=0.5)), "special"),
    "a policy that is none": (edit(lambda tree: tree["results"][1].update(policy="../policy")), "`../policy`"),
    "parameters that are missing": (edit(lambda tree: tree["results"][1].update(policy="tempered")), "tempered"),
    "parameters that are none": (
        edit(lambda tree: tree["results"][1].update(policy="tempered", parameters={"seed": 1})),
        "seed",
    ),
}


def assert_refused(command: Commands, folder: Path, name: str, words: str, *step: object) -> None:
    regular = [path for path in folder.iterdir() if path.is_file()]
    before = {path.name: files.sha256(path) for path in regular if path.stat().st_size < 1 << 26 and path.name != name}
    ended = command(*step, "--run", folder, "--json")
    ended.refused("bad_artifact", name, words, hint="make it again")
    stages = [line for line in ended.err.splitlines()[:-2] if line != "search"]  # which says what it loads first
    assert stages == [], ended.err
    assert {path.name: files.sha256(path) for path in regular if path.name in before} == before


@pytest.mark.parametrize("kind", ANY_JSON)
def test_any_artifact(command: Commands, folder: Path, kind: str) -> None:
    damage, words = ANY_JSON[kind]
    damage(folder / "calibration.json")
    assert_refused(command, folder, "calibration.json", words, "search", "--target", 0.4, "--policy", "modes")


@pytest.mark.parametrize("step", ["profile", "calibrate", "search", "export", "evaluate", "report"])
def test_every_command_that_reads_one(command: Commands, tiny_checkpoint: Path, folder: Path, step: str) -> None:
    name = {"profile": "profile.json", "calibrate": "calibration.json", "report": "profile.json"}.get(step, "thresholds.json")
    damage, words = ANY_JSON["truncated"]
    damage(folder / name)
    options: dict[str, tuple[object, ...]] = {"search": SEARCH, "evaluate": DATA}
    model = (tiny_checkpoint, *DATA) if step in ("profile", "calibrate") else options.get(step, ())
    assert_refused(command, folder, name, words, step, *model)


@pytest.mark.parametrize("kind", CALIBRATION)
def test_a_calibration(command: Commands, folder: Path, kind: str) -> None:
    damage, words = CALIBRATION[kind]
    damage(folder / "calibration.json")
    assert_refused(command, folder, "calibration.json", words, "search", "--target", 0.4, "--policy", "modes", "--fresh")


@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("step", ["export", "evaluate"])
def test_thresholds(command: Commands, folder: Path, kind: str, step: str) -> None:
    damage, words = THRESHOLDS[kind]
    damage(folder / "thresholds.json")
    assert_refused(command, folder, "thresholds.json", words, step, *(DATA if step == "evaluate" else ()))


def test_as_it_is_typed(command: Commands, folder: Path) -> None:
    rewrite(lambda raw: raw[:-10])(folder / "calibration.json")
    ended = command.cold("search", "--target", 0.4, "--run", folder)
    ended.refused("bad_artifact", "calibration.json", "line ", hint=f"`modes calibrate MODEL --run {folder} --fresh`")
    assert ended.out == ""


# -- calibration.safetensors ------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


TENSORS: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "size "),
    "one bit": (flip, "SHA-256"),
    "missing": (lambda path: path.unlink(), "missing"),
    "a folder": (replace(lambda path: path.mkdir()), "not a file"),
    "a pipe": (replace(lambda path: os.mkfifo(path)), "not a file"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("step", ["search", "calibrate"])
def test_tensors(command: Commands, tiny_checkpoint: Path, folder: Path, kind: str, step: str) -> None:
    damage, words = TENSORS[kind]
    damage(folder / "calibration.safetensors")
    arguments = ("--target", 0.4, "--policy", "modes") if step == "search" else (tiny_checkpoint, *DATA)
    assert_refused(command, folder, "calibration.safetensors", words, step, *arguments)


def spoil(name: str, change: Callable[[Any], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        tensors[name] = change(tensors[name])
        save_file(tensors, path)

    return damage


COUNTS, REFERENCE = "score_histogram", "reference_log_probabilities"
# By somebody who gives calibration.json the new size and digest.
LISTED: dict[str, tuple[Damage, str]] = {
    "garbage": (lambda path: path.write_bytes(b"\xff" * 100), "content"),
    "a header without end": (rewrite(lambda raw: b"\xff" * 8 + raw[8:]), "content"),
    "a layer less": (spoil(COUNTS, lambda counts: counts[1:].contiguous()), COUNTS),
    "negative": (spoil(COUNTS, lambda counts: counts - 1), COUNTS),
    "more tokens": (spoil(COUNTS, lambda counts: counts * 2), COUNTS),
    "not a number": (spoil(REFERENCE, lambda reference: reference * float("nan")), REFERENCE),
    "another vocabulary": (spoil(REFERENCE, lambda reference: reference[:, 1:].contiguous()), REFERENCE),
}


@pytest.mark.parametrize("kind", LISTED)
def test_tensors_that_are_listed(command: Commands, folder: Path, kind: str) -> None:
    damage, words = LISTED[kind]
    path = folder / "calibration.safetensors"
    damage(path)
    listed = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
    edit(lambda tree: tree["tensors"].update(listed))(folder / "calibration.json")
    (folder / "thresholds.json").unlink()
    before = content(folder)
    ended = command("search", "--target", 0.4, "--policy", "modes", "--run", folder, "--json")
    ended.refused("bad_artifact", "calibration.safetensors", words)
    assert content(folder) == before
