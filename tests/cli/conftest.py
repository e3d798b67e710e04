"""A command line whose core is replaced: what commands do is tested here, what the core does elsewhere.

`command` is the exception: the real command, as a process of its own, on a run folder of a tiny model.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from modes_cli import app
from modes_cli.requests import Check, Exported, Generated, Outcome
from tests import examples
from tests.cli.process import Commands
from tests.once import once

# Options of the steps that made the folder `prepared`.
DATA = ("--data", "digits", "--samples", 4, "--batch-size", 2)
SEARCH = ("--target", 0.3, "--target", 0.5, "--policy", "modes")


@dataclass
class Core:
    """Stands in for every core function; keeps the requests it got, answers with the example artifacts."""

    run: Path
    requests: dict[str, Any] = field(default_factory=dict)
    raises: BaseException | None = None
    checks: list[Check] = field(default_factory=lambda: [Check("digests", True, "6 files"), Check("graphs", True, "3 load")])

    def outcome(self, name: str) -> Callable[[Any], Any]:
        def answer(request: Any) -> Any:
            self.requests[name] = request
            print("a library prints on stdout")
            request.progress.start("a stage", 10)
            request.progress.advance()
            if self.raises is not None:
                raise self.raises
            return Outcome(examples.artifact(name), self.run / f"{name}.json")

        return answer

    def export(self, request: Any) -> Exported:
        self.requests["export"] = request
        return Exported(examples.artifact("bundle"), self.run / "bundle", 123_000_000)

    def verify(self, bundle: Path) -> list[Check]:
        return self.checks

    def generate(self, request: Any) -> Generated:
        self.requests["generate"] = request
        return Generated("fünf", 4, {"all": 0.75, "text": 0.6, "vision": 0.9}, 0.01, 0.02)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Core:
    """The replaced core, and a run folder with the example artifacts in it."""
    made = Core(examples.fill_run(tmp_path / "run"))
    functions = {
        "modes_cli.models.profiling": {"profile_model": made.outcome("profile")},
        "modes_cli.calibration": {"calibrate": made.outcome("calibration")},
        "modes_cli.search": {"find_thresholds": made.outcome("thresholds")},
        "modes_cli.export": {"export_bundle": made.export},
        "modes_cli.export.verify": {"verify_bundle": made.verify},
        "modes_cli.runtime.generate": {"generate": made.generate},
        "modes_cli.evaluation": {"evaluate": made.outcome("evaluation")},
        "modes_cli.benchmark": {"bench": made.outcome("bench")},
    }
    for name, members in functions.items():
        module = ModuleType(name)
        module.__path__ = []
        for member, function in members.items():
            setattr(module, member, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("MODES_RUN", str(made.run))
    return made


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; fails when there is anything else."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


@pytest.fixture
def modes(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run one command line in this process."""

    def run(*arguments: object) -> Ended:
        code = app.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Run the real command as a process."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def prepared(command: Commands, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny model, profiled, calibrated and searched once. Tests change a copy, `folder`."""

    def make(run: Path) -> None:
        for step in ("profile", "calibrate"):
            command(step, tiny_checkpoint, *DATA, "--run", run).ok()
        command("search", *SEARCH, "--run", run).ok()

    return once(tmp_path_factory.getbasetemp(), "prepared-run", make)


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))
