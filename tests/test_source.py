"""Which commit the tool runs from: of its own checkout, whatever the working directory and the environment say."""

import subprocess
from pathlib import Path

import pytest

from modes_cli.source import source_of


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(("git", *identity, *arguments), cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(params=["", "projects/tool"])
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A project at the root of a repository, or further down in one."""
    root = tmp_path / "repository" / request.param
    (root / "modes_cli").mkdir(parents=True)
    (root / "modes_cli" / "__init__.py").write_text("")
    (root / "pyproject.toml").write_text("")
    (root / ".gitignore").write_text("*.so\n")
    git(tmp_path / "repository", "init", "--quiet")
    git(tmp_path / "repository", "add", ".")
    git(tmp_path / "repository", "commit", "--quiet", "-m", "first")
    return root


def test_commit_and_state(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as inside a hook of another repository
    found = source_of(checkout / "modes_cli")
    assert found is not None
    assert (found.commit, found.dirty) == (commit, False)


@pytest.mark.parametrize(
    ("name", "dirty"),
    [("modes_cli/__init__.py", True), ("modes_cli/new.py", True), ("pyproject.toml", True), ("notes.md", False),
     ("modes_cli/built.so", False)],
)  # fmt: skip
def test_only_code_makes_it_dirty(checkout: Path, name: str, dirty: bool) -> None:
    (checkout / name).write_text("changed")
    found = source_of(checkout / "modes_cli")
    assert found is not None
    assert found.dirty is dirty


def test_a_package_that_only_lies_in_a_repository(checkout: Path) -> None:
    """As a virtual environment does in the user's own project."""
    package = checkout / ".venv" / "modes_cli"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert source_of(package) is None


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert source_of(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert source_of(checkout / "modes_cli") is None  # nobody can tell
