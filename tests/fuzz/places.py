"""Where the harnesses find real artifacts to begin from, and where they write what they are given.

Both are folders that the environment names: MODES_FUZZ_FILES, filled by `make_files`, and MODES_FUZZ_SCRATCH, in memory.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

FILES, SCRATCH = "MODES_FUZZ_FILES", "MODES_FUZZ_SCRATCH"


def real(*parts: str) -> Path:
    """A file of the real artifacts."""
    return Path(os.environ[FILES]).joinpath(*parts)


@functools.cache
def scratch(name: str) -> Path:
    """A folder of one harness below SCRATCH, which whoever started the process removes."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=os.environ[SCRATCH]))


def make_files(folder: Path, bundle: Path, checkpoint: Path) -> None:
    """Copies of a real bundle and checkpoint. The operator library is left out: it is never loaded, and hashing it takes
    longer than all else. So is the commit, so that another one does not change what is made of this."""
    from tests.export.bundles import relist

    shutil.copytree(bundle, folder / "bundle")
    for library in (folder / "bundle").glob("*.so"):
        library.write_bytes(b"\x7fELF")
        relist(folder / "bundle", library.name)
    listed = folder / "bundle" / "bundle.json"
    tree = json.loads(listed.read_text("utf-8"))
    tree["provenance"]["source"] = {"commit": "0" * 40, "dirty": False}
    listed.write_text(json.dumps(tree), "utf-8")
    shutil.copytree(checkpoint, folder / "checkpoint")
