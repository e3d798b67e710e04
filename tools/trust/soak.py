"""One ONNX Runtime session of a bundle under many threads: whether it leaks, and whether any answer changes.

    python -m tools.trust [--long] soak

The bundle is made of `digits`. A request is a prefill of one to four prompts, with or without images, at one of several
thresholds, and returns logits, counts of kept pairs and the whole cache. Every answer is compared bit for bit with one that a
session with a single thread gave before. One request in sixteen is refused (a tau of another length), each time. Memory is what
is in use after all threads have stopped for a moment: what malloc has handed out, and what the process has resident. It is
measured in a process of its own, whose malloc has one heap and keeps nothing back for single threads, after ONNX Runtime's
arena has given back what no answer is in: what is freed is then seen to be. (The arena grows by 64 MB at a time, whenever more
answers than before happen to be in the making.)
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from modes_cli.calibration import calibrate
from modes_cli.data import open_source
from modes_cli.data.sample import DataSpec
from modes_cli.export import export_bundle
from modes_cli.requests import CalibrateRequest, ExportRequest, ModelSpec, SearchRequest
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.session import session
from modes_cli.search import find_thresholds
from tools.trust.memory import MALLOC, Look, growth, in_use, leaked, resident

THREADS = 32
SECONDS = {True: 600.0, False: 10.0}
CYCLES = {True: 60, False: 6}
PAUSES = {True: 60, False: 6}  # how often memory is looked at; a pause waits for the slowest thread's request
SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")  # at the end of a request with this option
PROMPTS = 24
TAUS = (0.0, 0.02, 0.05, 0.1, 10.0)  # of text and vision; the last skips every expert of the two
REFUSED = 16  # one request in so many has a tau of another length
RESULT = "soak.json"
ROOT = Path(__file__).parents[2]
INSIDE = "--inside"

Feeds = dict[str, NDArray[Any]]
Answer = list[NDArray[Any]]


@dataclass(frozen=True)
class Request:
    feeds: Feeds
    expected: Answer | None  # None: it is refused


@dataclass
class Tally:
    """Of one thread."""

    requests: int = 0
    changed: int = 0
    refused: int = 0
    wrongly: int = 0  # refused and should not be, or the other way round


def make_bundle(folder: Path) -> Path:
    """A bundle of `digits` at a target of 0.5, calibrated on 16 samples: quick, and it skips."""
    run = folder / "run"
    data = DataSpec("digits", "validation", 16, 0)
    calibrate(CalibrateRequest(ModelSpec("digits", device="cpu"), data, run))
    find_thresholds(SearchRequest((0.5,), run, policy="modes", device="cpu", passes=6, frontier=False))
    export_bundle(ExportRequest(run))
    return run / "bundle"


def make_requests(bundle: Path) -> list[Request]:
    """Every batch at every threshold, with the answers of a session of one thread."""
    alone = OrtModel(bundle, device="cpu", threads=1)
    samples = list(open_source(DataSpec("digits", "validation", PROMPTS, 1), text_only=False))
    outputs = [output.name for output in alone.decoder.get_outputs()]
    pasts = [name.replace("present.", "past_key_values.") for name in outputs if name.startswith("present.")]
    batches, first = [], 0
    for number in range(PROMPTS):
        size = 1 + number % 4
        batches.append([samples[(first + n) % PROMPTS] for n in range(size)])
        first += size
    requests = []
    for number, batch in enumerate(batches):
        images = [sample.images if number % 3 else () for sample in batch]  # a third of the batches without images
        prompts = alone.prompts(images, [sample.question for sample in batch])
        features = alone.image_features(prompts.pixel_values, prompts.grids)
        positions, _ = alone.positions(prompts)
        embeds = alone.embedding.run(None, {"input_ids": prompts.input_ids, "image_features": features})[0]
        known = {
            "inputs_embeds": embeds,
            "attention_mask": prompts.attention_mask,
            "position_ids": np.ascontiguousarray(positions),
            "input_ids": prompts.input_ids,
            "logits_to_keep": np.zeros(1, np.int64),
        }
        past = alone.empty_state(len(batch)).past
        known |= {name: value.numpy() for name, value in zip(pasts, past, strict=True)}
        for tau in TAUS:
            feeds = known | {"tau": alone.tau({"text": tau, "vision": tau})}
            requests.append(Request(feeds, alone.decoder.run(None, feeds)))
    wrong = requests[0].feeds | {"tau": np.zeros(len(alone.bundle.groups) + 1, np.float32)}
    return requests + [Request(wrong, None)] * (len(requests) // (REFUSED - 1))


def same(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> bool:
    """Bit for bit: a NaN equals itself, and 0.0 is not -0.0."""
    return len(found) == len(expected) and all(
        a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))
        for a, b in zip(found, expected, strict=True)
    )


def ask(shared: ort.InferenceSession, request: Request, tally: Tally, quiet: ort.RunOptions) -> None:
    tally.requests += 1
    try:
        found = shared.run(None, request.feeds, quiet)
    except Exception as error:  # ONNX Runtime's classes are not public
        tally.refused += 1
        tally.wrongly += request.expected is not None or "tau" not in str(error)
        return
    if request.expected is None:
        tally.wrongly += 1
    elif not same(found, request.expected):
        tally.changed += 1


def under_threads(shared: ort.InferenceSession, requests: list[Request], seconds: float, pauses: int) -> dict[str, Any]:
    """All threads ask in orders of their own until the time is over; at each pause they all wait, and memory is read."""
    largest = max(
        (request for request in requests if request.expected), key=lambda request: request.feeds["inputs_embeds"].size
    )
    tallies = [Tally() for _ in range(THREADS)]
    samples: list[Look] = []
    started = time.monotonic()

    shrinking = ort.RunOptions()
    shrinking.add_run_config_entry(*SHRINK)

    def look() -> None:
        shared.run(None, largest.feeds, shrinking)
        gc.collect()
        samples.append((sum(tally.requests for tally in tallies), in_use(), resident()))

    barrier = threading.Barrier(THREADS, action=look)

    def work(number: int) -> None:
        rng, quiet = np.random.default_rng(number), ort.RunOptions()
        quiet.log_severity_level = 4  # refusals are meant: they need not be logged as well
        try:
            for _ in range(pauses):
                until = time.monotonic() + seconds / pauses
                while True:
                    ask(shared, requests[int(rng.integers(len(requests)))], tallies[number], quiet)
                    if time.monotonic() >= until:
                        break
                barrier.wait()
        except BaseException:
            barrier.abort()  # the others must not wait for ever
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(samples) != pauses:
        raise RuntimeError(f"a thread ended early: {len(samples)} of {pauses} slices")
    total = samples[-1][0]
    return {
        "threads": THREADS,
        "seconds": time.monotonic() - started,
        "requests": total,
        "distinct_requests": len(requests),
        "answers_compared": total - sum(tally.refused for tally in tallies),
        "answers_changed": sum(tally.changed for tally in tallies),
        "refused_as_they_should": sum(tally.refused for tally in tallies),
        "refused_or_taken_wrongly": sum(tally.wrongly for tally in tallies),
        "bytes_per_1000_requests": growth(samples),
        "samples": [{"requests": n, "in_use": used, "resident": rss} for n, used, rss in samples],
    }


def open_and_close(bundle: Path, request: Request, cycles: int) -> dict[str, Any]:
    """Sessions made, asked once and dropped, one after the other."""
    samples, changed = [], 0
    assert request.expected is not None
    for number in range(cycles):
        opened = session(bundle)
        changed += not same(opened.run(None, request.feeds), request.expected)
        del opened
        gc.collect()
        samples.append((number + 1, in_use(), resident()))
    return {
        "sessions": cycles,
        "answers_changed": changed,
        "bytes_per_1000_sessions": growth(samples),
        "samples": [{"sessions": n, "in_use": used, "resident": rss} for n, used, rss in samples],
    }


def measure_here(folder: Path, long: bool) -> dict[str, Any]:
    bundle = make_bundle(folder)
    requests = make_requests(bundle)
    shared = session(bundle)
    found = under_threads(shared, requests, SECONDS[long], PAUSES[long])
    del shared
    return {**found, "opened_and_closed": open_and_close(bundle, requests[0], CYCLES[long])}


def measure(long: bool) -> dict[str, Any]:
    """Ten minutes, or ten seconds, of requests; then sessions opened and closed."""
    with tempfile.TemporaryDirectory(prefix="modes-soak-") as name:
        words = [sys.executable, "-m", "tools.trust.soak", INSIDE, name, *(["--long"] if long else [])]
        subprocess.run(words, cwd=ROOT, env={**os.environ, **MALLOC}, check=True, stdout=subprocess.DEVNULL)
        return dict(json.loads((Path(name) / RESULT).read_text("utf-8")))


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """For a table: what was measured, and what came out."""
    opened = result["opened_and_closed"]
    return [
        ("threads on one session", f"{result['threads']}"),
        ("seconds", f"{result['seconds']:.0f}"),
        ("answers compared bit for bit", f"{result['answers_compared']:,}"),
        ("answers changed", f"{result['answers_changed'] + opened['answers_changed']}"),
        ("bad requests refused, all others answered", f"{result['refused_as_they_should']:,}"),
        ("refused or taken wrongly", f"{result['refused_or_taken_wrongly']}"),
        ("leak per 1,000 requests", leaked(result["bytes_per_1000_requests"])),
        ("resident memory over the second half", f"{result['bytes_per_1000_requests']['resident_second_half']:+.2%}"),
        ("sessions opened and closed", f"{opened['sessions']}"),
        ("leak per 1,000 sessions", leaked(opened["bytes_per_1000_sessions"])),
    ]


def is_sound(result: dict[str, Any]) -> bool:
    """Whether answers were compared and none changed, and nothing leaked where it was measured long enough to tell."""
    opened = result["opened_and_closed"]
    wrong = result["answers_changed"] + result["refused_or_taken_wrongly"] + opened["answers_changed"]
    told = result["seconds"] >= SECONDS[True]  # ten seconds say little of leaks
    leak = result["bytes_per_1000_requests"]["leak"] or opened["bytes_per_1000_sessions"]["leak"]
    return bool(result["answers_compared"]) and not wrong and not (told and leak)


if __name__ == "__main__":  # the process of its own, and its folder
    assert sys.argv[1:2] == [INSIDE], "python -m tools.trust soak"
    (Path(sys.argv[2]) / RESULT).write_text(json.dumps(measure_here(Path(sys.argv[2]), "--long" in sys.argv)), "utf-8")
