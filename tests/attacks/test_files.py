"""Files of a bundle that are truncated, altered, missing, or not what they seem.

An attacker may rewrite bundle.json as well, so some attacks list the changed file with its new size and digest.
"""

import os
import socket
from pathlib import Path

import pytest

from modes_cli.errors import MissingArtifact
from modes_cli.export.integrity import check_for_loading
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.session import session
from tests.attacks.bundles import SHARD, THRESHOLDS, assert_refused, assert_verify_fails, edit, in_pytorch


@pytest.mark.parametrize("name", [SHARD, THRESHOLDS, "decoder.onnx", "config.json", "libmodes_cpu.so"])
def test_truncated(bundle: Path, name: str) -> None:
    path = bundle / name
    os.truncate(path, path.stat().st_size - 1)
    assert_refused(bundle, name, "size")


@pytest.mark.parametrize("name", [THRESHOLDS, "decoder.onnx", "vision.onnx", "tokenizer.json", "libmodes_cpu.so"])
def test_one_bit_altered(bundle: Path, name: str) -> None:
    """Of everything but the weights, loading compares digests."""
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    assert_refused(bundle, name, "SHA-256")


def test_one_bit_of_the_weights_altered(bundle: Path) -> None:
    with (bundle / SHARD).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x55")
    assert_verify_fails(bundle, SHARD, "SHA-256")


@pytest.mark.parametrize("name", [SHARD, "decoder.onnx", "tokenizer.json", "config.json"])
def test_missing(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert_refused(bundle, name, "missing")


def test_without_bundle_json(bundle: Path) -> None:
    """To PyTorch that is a checkpoint like any other, which needs a run folder with its thresholds."""
    (bundle / "bundle.json").unlink()
    assert_refused(bundle, "bundle.json", "missing", ways=(check_for_loading, session, OrtModel))
    with pytest.raises(MissingArtifact):
        in_pytorch(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "extra.py",
        "onnx/extra.bin",
        ".hidden",
        "adapter_config.json",
        "Decoder.onnx",
        "decoder.onnx\u200b",
        "de\u0301coder.onnx",
    ],
)
def test_a_file_that_is_not_listed(bundle: Path, name: str) -> None:
    """transformers would take an adapter's configuration that merely lies there."""
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{}")
    assert_refused(bundle, Path(name).parts[0], "not listed")


def test_an_empty_folder(bundle: Path) -> None:
    (bundle / "cache").mkdir()
    assert_refused(bundle, "cache", "not listed")


def test_symlinks(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes((bundle / "tokenizer.json").read_bytes())
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    assert_refused(bundle, "tokenizer.json", "link")


def test_a_linked_shard(bundle: Path, tmp_path: Path) -> None:
    """Weights outside the folder, with the right bytes."""
    (bundle / SHARD).rename(tmp_path / SHARD)
    (bundle / SHARD).symlink_to(tmp_path / SHARD)
    assert_refused(bundle, SHARD, "link")


def test_a_folder_that_is_a_link(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (bundle / "tokenizer.json").rename(outside / "tokenizer.json")
    (bundle / "parts").symlink_to(outside)
    edit(
        bundle,
        lambda tree: [file.update(path="parts/tokenizer.json") for file in tree["files"] if file["path"] == "tokenizer.json"],
    )
    assert_refused(bundle, "parts", "link")


@pytest.mark.parametrize("name", [SHARD, "decoder.onnx", "tokenizer.json", "libmodes_cpu.so", "bundle.json"])
def test_a_file_with_another_name(bundle: Path, tmp_path: Path, name: str) -> None:
    """Through which it can be changed after it was checked."""
    os.link(bundle / name, tmp_path / "another")
    assert_refused(bundle, name, "hard links")


def test_linked_bundle_json(bundle: Path, tmp_path: Path) -> None:
    (bundle / "bundle.json").rename(tmp_path / "elsewhere.json")
    (bundle / "bundle.json").symlink_to(tmp_path / "elsewhere.json")
    assert_refused(bundle, "bundle.json", "link")


@pytest.mark.parametrize("name", ["vision.onnx", SHARD, "tokenizer.json", "libmodes_cpu.so", "bundle.json"])
def test_a_pipe_does_not_block(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert_refused(bundle, name, "regular")


def test_a_socket(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "vision.onnx").unlink()
    monkeypatch.chdir(bundle)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("vision.onnx")
        assert_refused(bundle, "vision.onnx", "regular")


def test_a_device(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    (bundle / "vision.onnx").symlink_to("/dev/zero")
    assert_refused(bundle, "vision.onnx", "link")


def test_a_file_that_may_not_be_read(bundle: Path) -> None:
    (bundle / "tokenizer.json").chmod(0)
    if os.access(bundle / "tokenizer.json", os.R_OK):
        pytest.skip("this user may read everything")
    assert_refused(bundle, "tokenizer.json", "Permission denied")
