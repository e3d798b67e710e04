"""Checkpoints whose files are truncated, altered or hostile: the file is named, and nothing is written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import in_shards
from tests.cli.process import Commands, content

DATA = ("--data", "digits", "--samples", 2)
WEIGHTS = "model.safetensors"
Damage = Callable[[Path], object]


def rewrite(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def with_length(length: int) -> Damage:
    return rewrite(lambda raw: struct.pack("<Q", length) + raw[8:])


def with_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        raw = path.read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        tree = json.loads(raw[8:end])
        change(tree)
        header = json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + raw[end:])

    return damage


def first(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(value for name, value in tree.items() if name != "__metadata__")
    return found


def replace(make: Damage) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "a header of 2^63 bytes": (WEIGHTS, with_length(1 << 63), "offset 0"),
    "a header of the whole file": (WEIGHTS, with_length(2_000_000_000), "offset 0"),
    "no header": (WEIGHTS, rewrite(lambda raw: raw[:5]), "offset 0"),
    "empty weights": (WEIGHTS, rewrite(lambda raw: b""), "offset 0"),
    "truncated weights": (WEIGHTS, rewrite(lambda raw: raw[:-1000]), "offset"),
    "a header that is no JSON": (WEIGHTS, rewrite(lambda raw: raw[:20] + b"\xff" + raw[21:]), "offset"),
    "a deep header": (WEIGHTS, rewrite(lambda raw: struct.pack("<Q", 200_000) + b'{"a":' * 40_000), "offset"),
    "a tensor past the end": (WEIGHTS, with_header(lambda t: first(t).update(data_offsets=[0, 1 << 60])), "tensor"),
    "a tensor with holes": (WEIGHTS, with_header(lambda t: first(t).update(shape=[1])), "tensor"),
    "a pipe": (WEIGHTS, replace(lambda path: os.mkfifo(path)), "not a regular file"),
    "a truncated configuration": ("config.json", rewrite(lambda raw: raw[:-20]), "not JSON"),
    "a configuration that is none": ("config.json", rewrite(lambda raw: b"[]"), "not an object"),
    "a deep configuration": ("config.json", rewrite(lambda raw: b'{"a":' * 100_000), "not JSON"),
    "a configuration that is no text": ("config.json", rewrite(lambda raw: b"\xff\xfe" + raw), "byte 0"),
}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged(command: Commands, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    name, damage, words = DAMAGES[kind]
    damage(checkpoint / name)
    ended = command("calibrate", checkpoint, *DATA, "--run", tmp_path / "run", "--json")
    ended.refused("bad_artifact", f"`{checkpoint / name}`", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", ["profile", "calibrate", "search", "evaluate", "export"])
def test_a_truncated_shard(command: Commands, checkpoint: Path, tmp_path: Path, step: str) -> None:
    """Of a checkpoint in several files, before any step; whole again, the same command finishes."""
    in_shards(checkpoint)
    options: dict[str, tuple[object, ...]] = {
        "search": ("--target", 0.3, "--policy", "modes", "--no-frontier"),
        "evaluate": (*DATA, "--max-new-tokens", 1),
        "export": ("--format", "safetensors"),
    }
    arguments = (step, *options.get(step, (checkpoint, *DATA)), "--run", tmp_path / "run")
    if step in options:
        command("calibrate", checkpoint, *DATA, "--run", tmp_path / "run").ok()
    if step in ("evaluate", "export"):
        command("search", *options["search"], "--run", tmp_path / "run").ok()
    shard = checkpoint / "model-00002-of-00002.safetensors"
    data, before = shard.read_bytes(), content(tmp_path / "run")
    shard.write_bytes(data[:-1000])
    command(*arguments, "--json").refused("bad_artifact", f"`{shard}`", "offset")
    assert content(tmp_path / "run") == before
    shard.write_bytes(data)
    command(*arguments).ok()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("generation_config.json", "{"),
        ("config.json", '{"model_type": "qwen3_vl_moe", "vision_config": 3}'),
        ("config.json", '{"model_type": ["qwen3_vl_moe"], "vision_config": {}}'),
        ("config.json", '{"model_type": "qwen3_vl_moe", "vision_config": {}, "text_config": {"hidden_size": -1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'),
        ("processor_config.json", "[]"),
    ],
)
def test_settings_that_make_no_sense(command: Commands, checkpoint: Path, tmp_path: Path, name: str, settings: str) -> None:
    (checkpoint / name).write_text(settings)
    if name.endswith("index.json"):
        (checkpoint / WEIGHTS).rename(checkpoint / "model-1.safetensors")
    ended = command("calibrate", checkpoint, *DATA, "--run", tmp_path / "run", "--json")
    kind = ended.json["error"]["kind"]
    assert kind in ("bad_model", "bad_artifact")
    ended.refused(kind, str(checkpoint))
    assert not (tmp_path / "run").exists()


def test_damaged_weights_as_it_is_typed(command: Commands, checkpoint: Path, tmp_path: Path) -> None:
    DAMAGES["a header of 2^63 bytes"][1](checkpoint / WEIGHTS)
    before = content(tmp_path)
    ended = command.cold("profile", checkpoint, *DATA, "--run", tmp_path / "run")
    ended.refused("bad_artifact", WEIGHTS, "offset 0", f"`{1 << 63}`")
    assert content(tmp_path) == before
