"""What takes long to make is made once for a run of the tests, however many processes pytest-xdist has."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def shared_base(base: Path) -> Path:
    """The temporary folder of all processes, from that of this one; the same one where there is only one."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return base.parent if worker and base.name == f"popen-{worker}" else base


def once(base: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` that `make(folder)` filled in the first process to ask; the others wait for it. Not to be changed.

    It is made under its final name, since run folders and bundles tell the paths of what they were made from. It counts as
    whole when the mark beside it is there; what a failed `make` left is removed first.

    Args:
        base: this process's temporary folder, `tmp_path_factory.getbasetemp()`.
    """
    base = shared_base(base)
    folder, whole = base / name, base / f".{name}.whole"
    with FileLock(base / f".{name}.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            whole.touch()
    return folder
