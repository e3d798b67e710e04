"""What is left of a run folder after a fault, held against what was there before and what an undisturbed run makes."""

import contextlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modes_cli.artifacts import Calibration, Evaluation, Profile, Thresholds
from modes_cli.errors import BadArtifact
from modes_cli.run_folder import RunFolder
from tests.cli.process import Ended, content

LEFTOVER = re.compile(r"(.*/)?\..+\.\d+\.(part|old)(/.*)?")  # of a process that ended; the next one removes it


@dataclass
class Tally:
    """What was found, by kind of fault."""

    faults: Counter[str] = field(default_factory=Counter)
    compared_files: int = 0
    compared_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)

    def broke(self, kind: str, where: str, ended: Ended, error: str, words: str = "") -> bool:
        """Count a fault that stopped a command; what does not say so clearly is a problem. False: it did not stop it."""
        if ended.code == 0:
            return False
        self.faults[kind] += 1
        try:
            ended.refused(error, words)
        except AssertionError:
            self.problems.append(f"{where}: code {ended.code}, {ended.err[-200:]!r}")
        return True

    def whole(self, where: str, run: Path, before: dict[str, bytes], after: dict[str, bytes]) -> None:
        """Nothing that stood before is lost or altered, nothing new is half-written."""
        found = {name: data for name, data in content(run).items() if not LEFTOVER.fullmatch(name)}
        for name, data in found.items():
            known = [comparable(name, tree[name]) for tree in (before, after) if name in tree]
            if known and comparable(name, data) not in known and not valid(run, name):
                self.problems.append(f"{where}: `{name}` is neither old nor new")
        self.problems += [f"{where}: `{name}` is lost" for name in before if name not in found]

    def same(self, where: str, found: dict[str, bytes], after: dict[str, bytes]) -> None:
        """The second try made the files of an undisturbed run, and left nothing else."""
        for name in sorted(found.keys() | after.keys()):
            if name not in found or name not in after or comparable(name, found[name]) != comparable(name, after[name]):
                self.problems.append(f"{where}: `{name}` differs from an undisturbed run's")
        self.compared_files += len(after)
        self.compared_bytes += sum(map(len, after.values()))


def comparable(name: str, data: bytes) -> Any:
    """A file's bytes; of one that holds measured times, what is left without them."""
    if name in ("profile.json", "evaluation.json") and data:
        with contextlib.suppress(ValueError):
            return json.loads(data, object_hook=lambda tree: {k: v for k, v in tree.items() if not k.endswith("seconds")})
    return data


def valid(run: Path, name: str) -> bool:
    """Whether an artifact stands under its final name that the next command may use."""
    kind = next((kind for kind in (Profile, Calibration, Thresholds, Evaluation) if name == kind.FILE), None)
    if kind is None:
        return False
    try:
        return bool(RunFolder(run).read(kind))
    except BadArtifact:
        return False
