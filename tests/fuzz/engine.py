"""Running one harness over many inputs: libFuzzer's loop with coverage (atheris), or a plain one of our own.

Only a ModesError may come out of a harness. Anything else is a defect: another exception, an input that takes more than
CPU_SECONDS, one that asks for more than MEMORY bytes, and the end of the process (which whoever started it sees).
Defects are told apart by exception and line, so that one of them does not hide the rest; a run goes on after each.
"""

from __future__ import annotations

import importlib
import json
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from modes_cli.errors import LONGEST_ERROR, ModesError

TARGETS = (
    "artifact_json", "safetensors_header", "weights_index", "onnx_graph", "bundle_json", "thresholds_rule", "unfinished",
    "zip_archive", "jsonl_rows", "parquet_table", "image_file", "checkpoint_config", "genai_config", "kernel_arguments",
)  # fmt: skip
CPU_SECONDS = 10.0  # of one input
MEMORY = 3 << 30  # bytes more than the process has when it begins
ENDLESS = 1 << 60  # executions
CORPUS = 256  # inputs that the plain loop keeps to change further


class TooSlow(BaseException):
    """Not an Exception: parsers that catch all of those must not catch it."""


@dataclass
class Report:
    """What is written when a run ends. `defects`: exception and line -> an input, in hexadecimal, and the last lines."""

    target: str
    engine: str
    executions: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0  # CPU seconds of one input
    defects: dict[str, dict[str, str]] = field(default_factory=dict)


class Watched:
    """A harness that counts, and notes defects instead of raising them. Every input is in `last` before it is tried."""

    def __init__(self, target: str, engine: str, last: Path) -> None:
        self.module: Any = importlib.import_module(f"tests.fuzz.harness.{target}")
        self.report, self.last = Report(target, engine), last

    def __call__(self, data: bytes) -> bool:
        """Whether the input was accepted."""
        self.last.write_bytes(data)
        self.report.executions += 1
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            self.module.one(data)
        except ModesError as error:
            self.report.refused += 1
            if len(str(error)) > LONGEST_ERROR:
                self._note(AssertionError(f"{type(error).__name__} of {len(str(error))} characters"), data, error)
            return False
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._note(error, data, error)
            return False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.report.slowest = max(self.report.slowest, time.process_time() - started)
        self.report.accepted += 1
        return True

    def _note(self, error: BaseException, data: bytes, raised: BaseException) -> None:
        frames = [frame for frame in traceback.extract_tb(raised.__traceback__) if "/modes_cli/" in frame.filename]
        frames = frames or traceback.extract_tb(raised.__traceback__)
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        text = "".join(traceback.format_exception(raised))[-2000:]
        self.report.defects.setdefault(
            f"{type(error).__name__} at {place}: {str(error)[:200]}" if isinstance(error, AssertionError) else
            f"{type(error).__name__} at {place}", {"input": data[:4096].hex(), "traceback": text}
        )  # fmt: skip


def prepare() -> None:
    """Limits of this process: memory, and what happens when an input is too slow."""

    def slow(*_: object) -> NoReturn:
        raise TooSlow(f"more than {CPU_SECONDS:g} seconds")

    signal.signal(signal.SIGPROF, slow)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def plain(watched: Watched, executions: int, seconds: float, seed: int) -> None:
    """Inputs changed at random, from the seeds and from what was accepted; so many, or until the time is over.

    With a number of executions the inputs are the same each time.
    """
    rng, mutate = Random(f"{watched.report.target} {seed}"), watched.module.mutate
    corpus: list[bytes] = list(watched.module.seeds())
    for data in corpus:
        watched(data)
    until = time.monotonic() + seconds
    while watched.report.executions < executions and time.monotonic() < until:
        data = mutate(rng.choice(corpus), rng)
        if watched(data) and len(corpus) < CORPUS:
            corpus.append(data)


def with_atheris(
    watched: Watched, executions: int, seconds: float, seed: int, corpus: Path, done: Callable[[], None]
) -> NoReturn:
    """libFuzzer, with our mutators beside its own. It ends the process, so the report is written by `done` before.

    With a number of executions and a corpus that is empty at first the inputs are the same each time.
    """
    import atheris

    corpus.mkdir(parents=True, exist_ok=True)
    seeds = watched.module.seeds()
    for number, data in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    until = time.monotonic() + seconds

    def one(data: bytes) -> None:
        watched(data)
        if watched.report.executions >= executions or time.monotonic() > until:
            done()

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = Random(number)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, most))[:most]
        if rng.random() < 0.4:  # most of what has new coverage is refused early: begin from what is whole again
            data = rng.choice(seeds)
        return bytes(watched.module.mutate(data, rng))[:most]

    settings = {"seed": seed + 1, "artifact_prefix": f"{corpus.parent}/", "max_len": 1 << 20, "len_control": 0, "reload": 0}
    if executions < ENDLESS:
        # What was compared, and how often, depends on the names of temporary folders, which are others each time.
        settings |= {"use_cmp": 0, "entropic": 0, "use_counters": 0}
    ours = {"rss_limit_mb": 0, "timeout": 3600, "verbosity": 0, "print_final_stats": 0}  # limits are those of `prepare`
    words = [sys.argv[0], str(corpus), *(f"-{name}={value}" for name, value in (settings | ours).items())]
    atheris.Setup(words, one, custom_mutator=mutate)
    atheris.Fuzz()
    raise AssertionError("libFuzzer came back")


def write(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report.__dict__), "utf-8")
