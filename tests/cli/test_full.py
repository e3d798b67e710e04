"""No space, no permission, no memory: a clear message, nothing half-written, and the same command continues."""

import json
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import Commands, content

WRITERS = ("profile", "calibrate", "search", "evaluate", "export", "report")
EXPORT = ("--format", "safetensors")


def step(name: str, checkpoint: Path) -> tuple[object, ...]:
    options: dict[str, tuple[object, ...]] = {"search": SEARCH, "export": EXPORT}
    if name == "evaluate":
        return (name, *DATA, "--max-new-tokens", 2)
    return (name, checkpoint, *DATA) if name in ("profile", "calibrate") else (name, *options.get(name, ()))


@pytest.fixture
def before_step(prepared: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The prepared run folder as it is when the step named by the test runs for the first time."""
    name = request.getfixturevalue("name")
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    first = {"profile": ("profile.json",), "calibrate": ("calibration.json", "calibration.safetensors", "thresholds.json")}
    for made in first.get(name, ("thresholds.json",) if name == "search" else ()):
        (run / made).unlink()
    return run


def assert_undisturbed(run: Path, name: str, prepared: Path) -> None:
    """The step has made what it makes when nothing fails. tools/trust/faults.py looks at the other steps as well."""
    for made in {"calibrate": ("calibration.json", "calibration.safetensors"), "search": ("thresholds.json",)}.get(name, ()):
        assert (run / made).read_bytes() == (prepared / made).read_bytes(), made


@pytest.mark.parametrize("name", WRITERS)
def test_files_may_not_grow(command: Commands, tiny_checkpoint: Path, before_step: Path, prepared: Path, name: str) -> None:
    """A limit stands in for a full disk: it stops the same writes at the same places, and needs no mount."""
    before = content(before_step)
    arguments = (*step(name, tiny_checkpoint), "--run", before_step)
    ended = command(*arguments, "--json", file_bytes=500)
    ended.refused("write_failed", "cannot write `", "File too large", hint="the same command continues")
    assert content(before_step) == before
    command(*arguments).ok()
    assert_undisturbed(before_step, name, prepared)


def test_the_tensors_do_not_fit(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", tiny_checkpoint, *DATA, "--run", tmp_path / "run")
    ended = command(*arguments, "--json", file_bytes=100_000)
    ended.refused("write_failed", "calibration.safetensors`")
    assert content(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "modes-test", disk], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount")
def test_a_full_disk(command: Commands, tiny_checkpoint: Path, small_disk: Path, prepared: Path) -> None:
    arguments = ("calibrate", tiny_checkpoint, *DATA, "--run", small_disk / "run")
    ended = command(*arguments, "--json")
    ended.refused(
        "write_failed", "cannot write `", "No space left on device", hint="free some space; the same command continues"
    )
    assert content(small_disk) == {}
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    command(*arguments).ok()
    ended = command("export", *EXPORT, "--run", small_disk / "run", "--json")
    ended.refused("missing_artifact", "thresholds.json")
    assert_undisturbed(small_disk / "run", "calibrate", prepared)
    command("search", *SEARCH, "--run", small_disk / "run").ok()
    before = content(small_disk)
    ended = command("export", *EXPORT, "--run", small_disk / "run", "--json")  # wants room for graphs too, so does not begin
    ended.refused("write_failed", f"`{small_disk}/run/bundle` needs `", "are free", hint="free some space")
    assert content(small_disk) == before
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    ended = command(*arguments, "--fresh", "--json")
    ended.refused("write_failed", "Read-only file system", hint="choose a folder you may write to")
    command(*arguments).ok()  # what is there can be read
    assert content(small_disk) == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_not_be_written(
    command: Commands, tiny_checkpoint: Path, before_step: Path, prepared: Path, name: str
) -> None:
    """Root may write anywhere but in an immutable folder."""
    if os.geteuid() == 0:
        if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", before_step], capture_output=True).returncode:
            pytest.skip("root may write everywhere, and nothing can be made immutable here")
    else:
        before_step.chmod(0o555)
    try:
        ended = command(*step(name, tiny_checkpoint), "--run", before_step, "--json")
        ended.refused("write_failed", "cannot write `", hint="choose a folder you may write to; the same command continues")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", before_step], check=True)
        before_step.chmod(0o755)
    assert not [name for name in content(before_step) if "part" in name]
    command(*step(name, tiny_checkpoint), "--run", before_step).ok()
    assert_undisturbed(before_step, name, prepared)


@pytest.mark.parametrize("where", ["file", "file/run", "/dev/null", "/proc/run"])
def test_no_folder(command: Commands, tiny_checkpoint: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("a file")
    ended = command("profile", tiny_checkpoint, *DATA, "--run", tmp_path / where, "--json")
    ended.refused("write_failed", "cannot write `", where)


@pytest.mark.parametrize("as_json", [True, False])
def test_stdout_is_full(command: Commands, folder: Path, as_json: bool) -> None:
    """What was made stands; that nobody can read the result is no success."""
    ended = command("report", "--run", folder, *(("--json",) if as_json else ()), out="/dev/full")
    assert (ended.code, ended.out) == (1, "")
    assert "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1, ended.err
    assert "no space left" in ended.err
    assert (folder / "report.html").exists()


def test_stdout_is_full_as_it_is_typed(command: Commands, folder: Path) -> None:
    ended = command.cold("report", "--run", folder, out="/dev/full")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 2, ended.err


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["profile", "calibrate", "evaluate"])
def test_out_of_memory(command: Commands, tiny_checkpoint: Path, before_step: Path, prepared: Path, name: str) -> None:
    before = content(before_step)
    arguments = step(name, tiny_checkpoint)
    large = ("--samples", 512, "--batch-size", 512)
    ended = command(*arguments, *large, "--run", before_step, "--fresh", "--json", more_memory=150 << 20)
    ended.refused("out_of_memory", "out of memory", hint="`--batch-size`")
    assert content(before_step) == before
    command(*arguments, "--run", before_step).ok()
    assert_undisturbed(before_step, name, prepared)


@pytest.fixture
def large_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Half a gigabyte of weights, most of them holes in the file."""
    checkpoint, rows = Path(shutil.copytree(tiny_checkpoint, tmp_path / "large")), 1_000_000
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows
    (checkpoint / "config.json").write_text(json.dumps(config))
    raw, end, header = (checkpoint / "model.safetensors").read_bytes(), 0, {}
    for name, tensor in json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]).items():
        if name != "__metadata__":
            shape = (
                [rows, *tensor["shape"][1:]] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor["shape"]
            )
            begin, end = end, end + 4 * math.prod(shape)
            tensor |= {"shape": shape, "data_offsets": [begin, end]}
        header[name] = tensor
    text = json.dumps(header).encode()
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(checkpoint / "model.safetensors", 8 + len(text) + end)
    return checkpoint


def test_weights_larger_than_memory(command: Commands, large_checkpoint: Path, tmp_path: Path) -> None:
    ended = command("profile", large_checkpoint, *DATA, "--run", tmp_path / "run", "--json", more_memory=300 << 20)
    ended.refused("out_of_memory", "out of memory")
    assert not (tmp_path / "run").exists()
