"""Bundles that are truncated, altered or hostile, from the command line: refused by name and place, and never run.

What each attack does to a bundle's loader is in tests/attacks; here is what a user sees of it.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.process import Commands, content
from tests.export.bundles import relist, shared_bundle

SHARD = "model-00001-of-00001.safetensors"
Damage = Callable[[Path], object]


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shared_bundle(tmp_path_factory.getbasetemp()), tmp_path / "bundle"))


def truncated(name: str, by: int = 1) -> Damage:
    return lambda bundle: os.truncate(bundle / name, (bundle / name).stat().st_size - by)


def altered(name: str, at: float = 0.5) -> Damage:
    def damage(bundle: Path) -> None:
        raw = bytearray((bundle / name).read_bytes())
        raw[int(at * len(raw))] ^= 1
        (bundle / name).write_bytes(raw)

    return damage


def listed(name: str, damage: Damage) -> Damage:
    """By somebody who corrects bundle.json as well."""

    def both(bundle: Path) -> None:
        damage(bundle)
        relist(bundle, name)

    return both


def edited(change: Callable[[dict[str, object]], object]) -> Damage:
    def damage(bundle: Path) -> None:
        tree = json.loads((bundle / "bundle.json").read_text())
        change(tree)
        (bundle / "bundle.json").write_text(json.dumps(tree))

    return damage


def header_without_end(bundle: Path) -> None:
    raw = (bundle / SHARD).read_bytes()
    (bundle / SHARD).write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f" + raw[8:])


def linked(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to("/etc/passwd")


DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "bundle.json truncated": (truncated("bundle.json", 100), "bundle.json", "line "),
    "bundle.json with an unknown field": (edited(lambda tree: tree.update(run="rm")), "bundle.json", "field `run`"),
    "bundle.json with a path": (
        edited(lambda tree: tree["files"][0].update(path="../../etc/passwd")),  # type: ignore[index]
        "bundle.json",
        "field `files.0.path`",
    ),
    "bundle.json with a threshold that is none": (
        edited(lambda tree: tree["tau"].update(text=float("nan"))),  # type: ignore[attr-defined]
        "bundle.json",
        "`NaN`",
    ),
    "weights truncated": (truncated(SHARD), SHARD, "size "),
    "weights without an end": (listed(SHARD, header_without_end), SHARD, "offset 0"),
    "a graph truncated": (truncated("decoder.onnx"), "decoder.onnx", "size "),
    "a graph altered": (altered("decoder.onnx"), "decoder.onnx", "SHA-256"),
    "a graph of garbage": (
        listed("vision.onnx", lambda bundle: (bundle / "vision.onnx").write_bytes(b"\xff" * 5000)),
        "vision.onnx",
        "",
    ),
    "thresholds altered": (altered("thresholds.safetensors"), "thresholds.safetensors", "SHA-256"),
    "kernels altered": (altered("libmodes_cpu.so"), "libmodes_cpu.so", "SHA-256"),
    "a file that is missing": (lambda bundle: (bundle / "embedding.onnx").unlink(), "embedding.onnx", "missing"),
    "a file elsewhere": (linked, "tokenizer.json", "link"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_verify(command: Commands, bundle: Path, kind: str) -> None:
    damage, name, words = DAMAGES[kind]
    damage(bundle)
    ended = command("verify", bundle, "--json")
    ended.refused("bad_artifact", name, words, hint="do not use this one")
    assert ended.json["ok"] is False
    assert not any(check["name"] == "session" for check in ended.json["checks"])


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if "weights" in kind or "graph" in kind or "bundle.json" in kind])
def test_generate(command: Commands, bundle: Path, kind: str) -> None:
    damage, name, words = DAMAGES[kind]
    damage(bundle)
    command("generate", bundle, "--prompt", "What?", "--json").refused("bad_artifact", name, words)


@pytest.mark.parametrize("kind", ["bundle.json truncated", "weights truncated", "a graph altered"])
def test_generate_in_pytorch(command: Commands, bundle: Path, kind: str) -> None:
    damage, name, words = DAMAGES[kind]
    damage(bundle)
    command("generate", bundle, "--prompt", "What?", "--runtime", "torch", "--json").refused("bad_artifact", name, words)


@pytest.mark.parametrize("kind", ["bundle.json truncated", "weights truncated", "a graph altered", "thresholds altered"])
def test_evaluate(command: Commands, bundle: Path, folder: Path, kind: str) -> None:
    damage, name, words = DAMAGES[kind]
    damage(bundle)
    before = content(folder)
    ended = command("evaluate", "--bundle", bundle, "--data", "digits", "--samples", 2, "--run", folder, "--json")
    ended.refused("bad_artifact", name, words)
    assert content(folder) == before


def test_one_bit_of_the_weights(command: Commands, bundle: Path) -> None:
    """Of these only `modes verify` compares the digest: it takes minutes where they have 60 GB."""
    altered(SHARD, 0.9)(bundle)
    command("verify", bundle, "--json").refused("bad_artifact", SHARD, "SHA-256")


def test_bench(command: Commands, bundle: Path, folder: Path) -> None:
    truncated("decoder.onnx")(bundle)
    options = ("--data", "digits", "--samples", 1, "--batch", 1, "--repeats", 1)
    ended = command("bench", "--bundle", bundle, *options, "--run", folder, "--json")
    ended.refused("bad_artifact", "decoder.onnx", "size ")
    assert not (folder / "bench.json").exists()


def test_verify_as_it_is_typed(command: Commands, bundle: Path) -> None:
    truncated("decoder.onnx")(bundle)
    ended = command.cold("verify", bundle)
    assert (ended.code, "Traceback" in ended.err) == (1, False)
    assert "WRONG  files" in ended.out
    assert "decoder.onnx" in ended.err


@pytest.mark.parametrize("step", ["verify", "generate", "evaluate", "bench"])
def test_a_folder_that_is_no_bundle(command: Commands, folder: Path, step: str) -> None:
    where = (
        ("--bundle", folder) if step in ("evaluate", "bench") else (folder, *(("--prompt", "x") if step == "generate" else ()))
    )
    ended = command(step, *where, "--json")
    ended.refused("missing_artifact", f"`{folder}/bundle.json`", hint=f"`modes export --output {folder}`")


@pytest.mark.parametrize("kind", ["things", "a bundle with more", "a file"])
def test_export_replaces_nothing_but_bundles(command: Commands, folder: Path, bundle: Path, tmp_path: Path, kind: str) -> None:
    where = {"things": folder, "a bundle with more": bundle, "a file": tmp_path / "file"}[kind]
    (bundle / "thesis.txt").write_text("three years")
    (tmp_path / "file").write_text("four years")
    before = content(tmp_path)
    ended = command("export", "--output", where, "--run", folder, "--fresh", "--json")
    ended.refused("bad_option", f"`{where}`", hint="choose another `--output`")
    assert content(tmp_path) == before
