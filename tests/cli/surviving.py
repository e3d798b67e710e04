"""What must hold after a command was killed: used by the tests and by `tools.trust.kills`."""

import json
import re
from pathlib import Path
from typing import Any

from modes_cli.artifacts import Artifact, Calibration, Evaluation, Profile, Thresholds
from modes_cli.errors import ModesError
from modes_cli.export.verify import verify_bundle
from modes_cli.run_folder import RunFolder
from tests.cli.conftest import DATA, SEARCH
from tests.cli.process import content

KINDS: tuple[type[Artifact], ...] = (Profile, Calibration, Thresholds, Evaluation)
STEPS = ("profile", "calibrate", "search", "evaluate", "export")
# Temporary files, what is unfinished, and locks: none is left by a command that ends.
LEFTOVER = re.compile(r"(^|/)(\..+\.(\d+\.(part|old)|unfinished|lock)(/|$)|\.modes\.lock|[^/]+\.unfinished\.safetensors)")


def command_line(step: str, checkpoint: Path) -> tuple[Any, ...]:
    """As it is typed."""
    options: dict[str, tuple[Any, ...]] = {
        "profile": (checkpoint, *DATA),
        "calibrate": (checkpoint, *DATA),
        "search": SEARCH,
        "evaluate": (*DATA, "--max-new-tokens", 2),
        "export": ("--format", "safetensors"),
    }
    return (step, *options[step])


def invalid(folder: Path) -> list[str]:
    """What stands under its final name and is not valid."""
    run, found = RunFolder(folder), list[str]()
    for kind in KINDS:
        try:
            if run.exists(kind):
                run.read(kind)
            if kind is Calibration and run.exists(kind):
                run.check_tensors(run.read(Calibration).tensors, Calibration)
        except ModesError as error:
            found.append(str(error))
    if (folder / "bundle").exists():
        found += [f"bundle: {check.name}: {check.detail}" for check in verify_bundle(folder / "bundle") if not check.ok]
    return found


def comparable(folder: Path) -> dict[str, bytes]:
    """Bytes of everything, without the measured times of these two, which no two runs share."""
    found = content(folder)
    for name in ("profile.json", "evaluation.json"):
        if name in found:
            tree = json.loads(found[name], object_hook=lambda o: {k: v for k, v in o.items() if not k.endswith("seconds")})
            found[name] = json.dumps(tree).encode()
    return found


def differences(folder: Path, expected: dict[str, bytes]) -> list[str]:
    """The files in which a run folder differs from an undisturbed one, and what should not be there."""
    found = comparable(folder)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
