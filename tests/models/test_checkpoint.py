"""Finding a checkpoint's files and telling one from another, before anything is loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modes_cli.errors import BadArtifact, BadModel
from modes_cli.models.checkpoint import HUB_PATTERNS, REFERENCE_FOLDER, checkpoint_digest, checkpoint_folder, read_config
from modes_cli.requests import ModelSpec


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_digits_is_the_built_in_model() -> None:
    assert checkpoint_folder(ModelSpec("digits")) == REFERENCE_FOLDER


def test_a_folder_is_taken_as_it_is(copy: Path) -> None:
    assert checkpoint_folder(ModelSpec(str(copy))) == copy


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "~/no-such", "a/b/c", ""])
def test_a_missing_folder_is_not_looked_for_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    with pytest.raises(BadModel, match=f"`{name}` is no folder"):
        checkpoint_folder(ModelSpec(name))


def test_a_folder_without_configuration_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(BadModel, match=r"no config\.json"):
        checkpoint_folder(ModelSpec(str(copy)))


def test_pickled_weights_are_not_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    with pytest.raises(BadModel, match=r"no \.safetensors weights") as caught:
        checkpoint_folder(ModelSpec(str(copy)))
    assert "pickled" in str(caught.value.hint)
    assert checkpoint_folder(ModelSpec(str(copy)), weights=False) == copy


def test_a_hub_id_is_fetched_without_pickles_or_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked[name] = (revision, allow_patterns)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_folder(ModelSpec("some/model", revision="abc")) == copy
    assert asked["some/model"] == ("abc", HUB_PATTERNS)
    checkpoint_folder(ModelSpec("some/model"), weights=False)
    assert "*.safetensors" not in asked["some/model"][1]
    checkpoint_folder(ModelSpec("some/model", trust_remote_code=True))
    assert asked["some/model"][1] == [*HUB_PATTERNS, "*.py"]


def test_a_hub_id_that_cannot_be_fetched_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(BadModel, match=r"^`some/model` is neither a folder nor a model that can be fetched: no route to host$"):
        checkpoint_folder(ModelSpec("some/model"))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "nan,"])
def test_a_configuration_that_is_no_object_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(BadArtifact, match=r"config\.json"):
        read_config(copy)


def test_a_configuration_of_bytes_is_refused(copy: Path) -> None:
    (copy / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BadArtifact, match=r"config\.json"):
        read_config(copy)


def test_equal_checkpoints_have_equal_digests(tiny_checkpoint: Path, copy: Path) -> None:
    assert checkpoint_digest(copy) == checkpoint_digest(tiny_checkpoint)


def test_the_digest_follows_configuration_headers_names_and_sizes(copy: Path) -> None:
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    seen = [checkpoint_digest(copy)]

    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.float16)}, weights)  # another header
    seen.append(checkpoint_digest(copy))
    save_file(tensors, weights, metadata={"format": "pt", "note": "1"})
    seen.append(checkpoint_digest(copy))
    weights.rename(copy / "model-00001-of-00001.safetensors")
    seen.append(checkpoint_digest(copy))
    (copy / "more.safetensors").write_bytes((copy / "model-00001-of-00001.safetensors").read_bytes())
    seen.append(checkpoint_digest(copy))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    seen.append(checkpoint_digest(copy))

    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("start", [b"", b"1234567", (10**15).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"x" * 99])
def test_a_truncated_or_hostile_header_is_refused_unread(copy: Path, start: bytes) -> None:
    (copy / "model.safetensors").write_bytes(start)
    with pytest.raises(BadArtifact, match=r"model\.safetensors`: offset 0"):
        checkpoint_digest(copy)
