"""Which commit of its own source this tool is running from."""

import functools
import os
import subprocess
from pathlib import Path

import modes_cli
from modes_cli.artifacts.provenance import Source

CODE = ("modes_cli", "kernels", "pyproject.toml")  # what decides results; a changed document makes nothing dirty
_SECONDS = 60


@functools.cache
def source() -> Source | None:
    """Commit and state of the checkout that this process runs from; None where the package is installed without one, or git
    cannot tell. Looked at once: what is running is the code that was there at first.
    """
    return source_of(Path(modes_cli.__file__).resolve().parent)


def source_of(package: Path) -> Source | None:
    """As `source`, of the package in a folder, whatever the working directory.

    None too where the package merely lies in somebody's repository, as a virtual environment does: it has to be one of the
    files that the repository holds.
    """
    if _git(package, "ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return None
    commit, prefix = _git(package, "rev-parse", "--verify", "HEAD"), _git(package, "rev-parse", "--show-prefix")
    if commit is None or prefix is None:
        return None
    root = package if not prefix.strip() else package.parents[len(Path(prefix.strip()).parts) - 1]
    above = Path(prefix.strip()).parent  # where the project lies in its repository
    changed = _git(root, "status", "--porcelain", "--untracked-files=normal", "--", *(str(above / name) for name in CODE))
    return None if changed is None else Source(commit=commit.strip(), dirty=bool(changed.strip()))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints in a folder; None where it fails or there is none. It reads, and runs nothing of the repository's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook, say
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-c", "core.fsmonitor=false", *arguments]
    try:
        ended = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.decode("utf-8", "replace") if ended.returncode == 0 else None
