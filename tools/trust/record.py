"""The file of a section: what was found, with the command, the machine and the versions that it was found with."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from modes_cli import files
from modes_cli.doctor import diagnose

FOLDER = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
KEYS = {"command", "machine", "versions", "result"}
PARSERS = ("atheris", "pillow", "pyarrow", "tokenizers")  # and what looks for defects in them: `diagnose` does not name these


def path(name: str, folder: Path = FOLDER) -> Path:
    return folder / f"trust-{name}.json"


def machine() -> dict[str, Any]:
    """CPU, cores that may be used, bytes of memory, operating system. No host name."""
    (cpu,) = (device for device in diagnose()["devices"] if device["device"] == "cpu")
    cores = len(os.sched_getaffinity(0))
    found = {"cpu": cpu["detail"].rpartition(", ")[0], "cores": cores, "memory": cpu["memory"]}
    return found | {"system": f"{platform.system()} {platform.release().partition('-')[0]}"}


def write(name: str, how: str, result: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Keep a section's result; all or nothing."""
    versions = {package: version for package, version in diagnose()["versions"].items() if version is not None}
    for package in PARSERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    tree = {"command": how, "machine": machine(), "versions": versions, "result": result}
    files.write_bytes(path(name, folder), files.canonical_json(tree).encode())
    return path(name, folder)


def read(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """What `write` kept, or None where it is missing.

    Raises:
        ValueError: a file that holds something else.
    """
    if not path(name, folder).exists():
        return None
    tree = json.loads(path(name, folder).read_text("utf-8"))
    if not isinstance(tree, dict) or not tree.keys() >= KEYS:
        raise ValueError(f"{path(name, folder)} does not hold {', '.join(sorted(KEYS))}")
    return tree


def rows(name: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    """The section's own words for its result. Its module is imported here, so that others can be missing."""
    found: list[tuple[str, str]] = importlib.import_module(f"tools.trust.{name}").rows(result)
    return found


def command(name: str, long: bool) -> str:
    return f"python -m tools.trust{' --long' * long} {name}"


def is_sound(name: str, result: dict[str, Any]) -> bool:
    """The section's own word on whether its result is as it should be."""
    return bool(importlib.import_module(f"tools.trust.{name}").is_sound(result))
