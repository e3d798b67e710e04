"""The first contact: `modes --help` is fast, imports nothing heavy, and names every command."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

COMMANDS = ("profile", "calibrate", "search", "export", "verify", "generate", "evaluate", "bench", "report", "demo", "doctor")
ALLOWED_SECONDS = 0.6  # of processor time, since tests share their cores; it takes 0.3


def test_help_is_fast() -> None:
    def seconds() -> float:
        began = os.times()
        subprocess.run([sys.executable, "-m", "modes_cli", "--help"], check=True, capture_output=True)
        ended = os.times()
        return ended.children_user + ended.children_system - began.children_user - began.children_system

    assert min(seconds() for _ in range(5)) < ALLOWED_SECONDS


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom modes_cli import app\napp.run(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'onnxruntime', 'datasets', 'PIL', 'matplotlib'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_command(modes: Callable[..., Any], arguments: list[str]) -> None:
    ended = modes(*arguments)
    assert ended.code == 0
    for command in COMMANDS:
        assert f" {command} " in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_the_common_options(modes: Callable[..., Any], command: str) -> None:
    ended = modes(command, "-h")
    assert ended.code == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in ended.out


def test_version(modes: Callable[..., Any]) -> None:
    ended = modes("--version")
    assert ended.code == 0
    assert ended.out.startswith("modes 0.")


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "modes_cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("modes ")
