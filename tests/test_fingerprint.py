"""What unfinished work depends on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modes_cli import fingerprint as prints
from modes_cli.fingerprint import fingerprint, model_files
from modes_cli.models.checkpoint import checkpoint_digest


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_a_copy_is_the_same_and_other_weights_are_not(checkpoint: Path, tiny_checkpoint: Path) -> None:
    before = model_files(tiny_checkpoint)
    assert model_files(checkpoint) == before
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last] + 1e-6  # one tensor of the same shape: an artifact's identity does not see that
    save_file(tensors, weights, {"format": "pt"})
    assert checkpoint_digest(checkpoint) == checkpoint_digest(tiny_checkpoint)
    assert model_files(checkpoint) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "processor_config.json", "new.py"])
def test_every_small_file_counts(checkpoint: Path, name: str) -> None:
    before = model_files(checkpoint)
    with (checkpoint / name).open("a") as file:
        file.write(" ")
    changed = model_files(checkpoint)
    assert changed != before
    (checkpoint / name).rename(checkpoint / f"{name}2")
    assert model_files(checkpoint) not in (before, changed)


def test_tools_and_machine_count(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fingerprint({"options.seed": 1}, tiny_checkpoint, "cpu")
    assert found["options.seed"] == 1
    assert found["tools.torch"] == torch.__version__
    assert found["machine.threads"] == torch.get_num_threads()
    assert len(found["tools.code"]) == len(found["model.files"]) == 64
    assert found["tools.libmodes_cpu.so"] is not None
    assert "machine.threads" not in fingerprint({}, tiny_checkpoint)  # of what is copied, not computed
    monkeypatch.setenv("MODES_ISA", "avx2")
    assert fingerprint({"options.seed": 1}, tiny_checkpoint, "cpu") == {**found, "machine.isa": "avx2"}
    monkeypatch.setattr(prints, "PACKAGES", ("torch", "no-such-package"))
    prints._tools.cache_clear()
    other = fingerprint({}, tiny_checkpoint)
    prints._tools.cache_clear()
    assert other["tools.no-such-package"] is None
    assert "tools.numpy" not in other
