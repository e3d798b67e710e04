"""A kernel library that was swapped. Where one is installed, a bundle's never runs; where none is, only the listed bytes do."""

import shutil
from pathlib import Path

import pytest

from modes_cli.errors import BadArtifact
from modes_cli.export.provenance import here
from modes_cli.export.verify import verify_bundle
from modes_cli.runtime import libraries, providers
from modes_cli.runtime.session import session
from tests.attacks.bundles import assert_refused, assert_verify_fails, edit
from tests.export.bundles import read, relist

NAME = "libmodes_cpu.so"


def machine(bundle: Path, number: int) -> None:
    """Write another e_machine into the library's ELF header."""
    with (bundle / NAME).open("r+b") as file:
        file.seek(18)
        file.write(number.to_bytes(2, "little"))
    relist(bundle, NAME)


def test_swapped(bundle: Path) -> None:
    (bundle / NAME).write_bytes(b"\x7fELF" + bytes(1000))
    assert_refused(bundle, NAME)


def test_swapped_and_listed(bundle: Path) -> None:
    """Somebody who rewrites bundle.json as well: the installed library is another one, and is what runs."""
    with (bundle / NAME).open("ab") as file:
        file.write(b"more")
    relist(bundle, NAME)
    assert_verify_fails(bundle, NAME, "differs from that of the installed")
    assert session(bundle) is not None


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"#!/bin/sh\n", "no Linux machine"),
        (b"\x7fELF\x01\x01" + bytes(100), "no Linux"),
        (b"\x7fELF\x02\x01" + bytes(100), ""),
    ],
)
def test_no_library_at_all(bundle: Path, data: bytes, word: str) -> None:
    (bundle / NAME).write_bytes(data)
    relist(bundle, NAME)
    assert_verify_fails(bundle, NAME, "is built for", word)


def test_said_to_be_for_another_machine(bundle: Path) -> None:
    """So that nobody compares it with the installed one."""
    edit(bundle, lambda tree: tree["provenance"]["kernels"][0].update(platform="linux-riscv64"))
    assert_verify_fails(bundle, NAME, "linux-riscv64")


def test_of_another_machine(bundle: Path) -> None:
    """A bundle may travel: its library is compared where it can run."""
    number, name = next((number, name) for number, name in libraries.MACHINES.items() if not here().endswith(name))
    machine(bundle, number)
    assert_verify_fails(bundle, NAME, f"built for linux-{name}")
    edit(bundle, lambda tree: tree["provenance"]["kernels"][0].update(platform=f"linux-{name}"))
    checks = {check.name: check for check in verify_bundle(bundle)}
    assert all(check.ok for check in checks.values()), checks
    assert f"the bundle's is for linux-{name}" in checks["kernels"].detail


def test_what_was_digested_is_what_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where none is installed: the library is swapped between the comparison and the loading."""
    monkeypatch.setattr(libraries, "library_path", lambda name=libraries.CPU: None)
    kept = (bundle / NAME).read_bytes()
    path = providers.operator_library(bundle, read(bundle), [providers.CPU])
    (bundle / NAME).write_bytes(b"evil")
    assert path.read_bytes() == kept
    assert libraries.open_library(path, cuda=False).modes_version()
    with pytest.raises(OSError, match="Operation not permitted"):
        path.write_bytes(b"evil")
    shutil.copytree(bundle, tmp_path / "other")
    with pytest.raises(BadArtifact, match=NAME):
        providers.operator_library(tmp_path / "other", read(tmp_path / "other"), [providers.CPU])


def test_a_bundle_runs_where_nothing_is_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "library_path", lambda name=libraries.CPU: None)
    assert session(bundle) is not None
