"""Jobs of a GitHub Actions or GitLab file, run here: what is between the actions is done, actions are done by hand.

Each job has a folder of its own, as on a fresh machine; what it uploads is all that the next one gets. Not run are the
steps that install; the programs are expected on PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
PIPELINE = ROOT / "docs" / "pipeline"
INSTALLS = re.compile(r"\s*(make setup|pip install |export PATH=)")
ACTION = re.compile(r"actions/(checkout|setup-python|upload-artifact|download-artifact)@[0-9a-f]{40}")


@dataclass(frozen=True)
class Ended:
    """How a job ended, with what its commands said; `folder` is where it ran."""

    code: int
    said: str
    folder: Path


def parse(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PIPELINE / name).read_text("utf-8"))
    return found


class Runner:
    """Runs jobs; `environment` wins over what the file sets, as variables of the CI system's project do."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._store = folder / "store"

    def github(self, job: str) -> Ended:
        tree = parse("github.yml")
        environment = {name: value.replace("${{ github.workflow_ref }}", "w") for name, value in tree["env"].items()}
        folder, said = self._checkout(job), ""
        for step in tree["jobs"][job]["steps"]:
            if "uses" in step:
                action = ACTION.fullmatch(step["uses"])
                assert action is not None, step
                path, name = folder / step["with"].get("path", ""), step["with"].get("name", "")
                if action[1] == "upload-artifact":
                    keep(path, self._store / name)
                elif action[1] == "download-artifact":
                    shutil.copytree(self._store / name, path)
            elif not INSTALLS.match(step["run"]):
                done = self._bash(step["run"], folder, environment)
                said += done.stdout + done.stderr
                if done.returncode:
                    return Ended(done.returncode, said, folder)
        return Ended(0, said, folder)

    def gitlab(self, job: str) -> Ended:
        tree = parse("gitlab.yml")
        folder, said = self._checkout(job), ""
        for needed in tree[job].get("needs", []):
            shutil.copytree(self._store / needed, folder, dirs_exist_ok=True)
        for line in tree[job]["script"]:
            if not INSTALLS.match(line):
                done = self._bash(line, folder, tree["variables"])
                said += done.stdout + done.stderr
                if done.returncode:
                    return Ended(done.returncode, said, folder)
        for path in tree[job]["artifacts"]["paths"]:
            target = self._store / job / path
            (shutil.copytree if (folder / path).is_dir() else keep)(folder / path, target)
        return Ended(0, said, folder)

    def _checkout(self, job: str) -> Path:
        folder = self._folder / job
        if not folder.exists():  # else the job goes on where it was stopped, on a disk that outlasts it
            shutil.copytree(PIPELINE, folder / "docs" / "pipeline")
        return folder

    def _bash(self, command: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        variables = os.environ | {name: str(value) for name, value in environment.items()} | self._environment
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command], cwd=folder, env=variables, text=True, capture_output=True
        )


def keep(path: Path, target: Path) -> None:
    """As actions/upload-artifact does: of a folder its content; a lone file keeps its name. Fails where there is nothing."""
    if path.is_dir():
        shutil.copytree(path, target)
    elif target.suffix:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    else:
        target.mkdir(parents=True)
        shutil.copy(path, target / path.name)
