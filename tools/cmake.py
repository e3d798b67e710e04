"""The CMake to build the kernels with: this Python environment's, else the system's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cmake() -> str | None:
    """Its path if it is 3.24 or newer; None where there is none."""
    for name in (str(Path(sys.executable).parent / "cmake"), shutil.which("cmake")):
        if not name or not Path(name).exists():
            continue
        version = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
        if (match := re.search(r"(\d+)\.(\d+)", version)) and (int(match[1]), int(match[2])) >= (3, 24):
            return name
    return None
