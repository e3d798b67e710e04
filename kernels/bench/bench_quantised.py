"""Times the CPU operator with quantised expert weights beside the same layer in float32 and bfloat16.

    python kernels/bench/bench_quantised.py --out docs/benchmarks/cpu-quantised.json

About a minute. All kinds of weights take turns, call by call, on inputs that keep the weights out of the cache (measure.py).
"""

import json as jsonlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, its folder is there instead

import torch
import typer
from torch import Tensor

from kernels.bench.bench_cpu import _last_cache, _versions, _without_paths
from kernels.bench.cases import (
    Layer,
    Routed,
    Shape,
    layers_needed,
    random_layers,
    random_routings,
    reference,
    relative_error,
)
from modes_cli.doctor import diagnose
from modes_cli.models.quantization import SCHEMES, quantise
from modes_cli.runtime import kernels

SHAPES = ["1024x384x64x8", "2048x768x48x8"]
TOKENS = [1, 2, 8]
RATIOS = [0.0, 0.5, 0.75]
# What rounding the weights does to a layer's output, relative to its largest element: above it something is wrong.
LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 2e-2, "int4": 3e-1}


class Kind:
    """Layers whose weights are stored in one way. `bytes`: of one expert."""

    def __init__(self, name: str, layers: list[Layer]) -> None:
        self.name, self.dtype = name, torch.bfloat16 if name == "bfloat16" else torch.float32
        self._weights: list[Tensor] = []  # the experts hold pointers only
        self._experts = [self._prepared(layer) for layer in layers]
        self.bytes = sum(tensor.nbytes for tensor in self._weights) / len(layers) / len(layers[0].down)

    def _prepared(self, layer: Layer) -> kernels.Experts:
        stored, options = [layer.gate_up, layer.down], {}
        if self.name in SCHEMES:
            pairs = [quantise(weights, SCHEMES[self.name]) for weights in stored]
            stored, scales = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            options = {"gate_up_scales": scales[0], "down_scales": scales[1], "block": 32}
            self._weights += scales
        elif self.dtype == torch.bfloat16:
            stored = [weights.bfloat16() for weights in stored]
        self._weights += stored
        made: Any = kernels.Experts
        prepared: kernels.Experts = made(*stored, **options)
        return prepared

    def work(self, routed: Routed, ratio: float, threads: int) -> Callable[[], Tensor]:
        x, weights = routed.x.to(self.dtype), routed.weights.to(self.dtype)
        score = routed.keep[ratio].float()  # the same pairs, whatever the dtype does to a routing probability
        inputs = (x, routed.ids, weights, routed.group, torch.full((1,), 0.5), routed.scale)
        return partial(self._experts[routed.layer], *inputs, score=score, threads=threads)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="HxIxExK; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a call; repeatable.")] = None,
    skip_ratio: Annotated[list[float] | None, typer.Option(min=0, max=0.999, help="Repeatable.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed calls of every row.")] = 41,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here, too.")] = None,
) -> None:
    """Time the CPU operator with quantised expert weights beside float32 and bfloat16."""
    cache, ratios = _last_cache(), sorted(set(skip_ratio or RATIOS))
    rows: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    for size in map(Shape.parse, shape or SHAPES):
        layers = random_layers(size, torch.float32, layers_needed(size, torch.float32, cache))
        kinds = [Kind(name, layers) for name in LARGEST_ERROR]
        for count in sorted(set(tokens or TOKENS)):
            routings = random_routings(size, torch.float32, count, ratios, len(layers))
            errors += [_error(size, kind, layers, routings[0], ratios[0]) for kind in kinds]
            for ratio in ratios:
                rows += _case(size, kinds, count, routings, ratio, threads, repetitions)
            print(f"{size}, {count} tokens", file=sys.stderr, flush=True)
    machine = diagnose()
    record = {
        "command": " ".join(["kernels/bench/bench_quantised.py", *_without_paths(sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": machine["devices"][0]["detail"].rpartition(", ")[0],
            "isa": kernels.isa(),
            "last_cache": cache,
            "load_average": os.getloadavg()[0],  # of the last minute, this program's own thread included
        },
        "versions": _versions(machine["versions"]),
        "threads": threads,
        "rows": rows,
        "errors": errors,
    }
    text = jsonlib.dumps(record, indent=1)
    if out is not None:
        out.write_text(text + "\n", "utf-8")
    print(text)


def _error(size: Shape, kind: Kind, layers: list[Layer], routed: Routed, ratio: float) -> dict[str, Any]:
    """Against float64 with the weights before quantisation. Raises SystemExit where the layer is not the same one."""
    found = relative_error(kind.work(routed, ratio, 1)(), reference(layers[routed.layer], routed, ratio))
    if not found <= LARGEST_ERROR[kind.name]:
        raise SystemExit(f"{kind.name} at {size} is wrong by {found:.1e}: its times would mean nothing")
    return {"shape": str(size), "tokens": len(routed.x), "weights": kind.name, "error": found}


def _case(
    size: Shape, kinds: list[Kind], tokens: int, routings: list[Routed], ratio: float, threads: int, repetitions: int
) -> list[dict[str, Any]]:
    """A row for each kind. In each round every kind has the next of the routings, none the one before it had."""
    works = [[kind.work(routed, ratio, threads) for routed in routings] for kind in kinds]
    seconds: list[list[float]] = [[] for _ in kinds]
    turn = 0
    for round in range(repetitions + 1):  # the first one warms up
        for which, own in enumerate(works):
            work, turn = own[turn % len(own)], turn + 1
            started = time.perf_counter()
            work()
            if round:
                seconds[which].append(time.perf_counter() - started)
        turn += len(works) % len(routings) == 0
    base = statistics.median(seconds[0])
    kept = statistics.mean(routed.distinct_experts(ratio) for routed in routings)
    return [
        {
            "shape": str(size),
            "tokens": tokens,
            "skip_ratio": ratio,
            "weights": kind.name,
            "seconds": statistics.median(timed),
            "least_seconds": min(timed),
            "speedup": base / statistics.median(timed),
            "bytes_per_second": kept * kind.bytes / statistics.median(timed),
            "expert_bytes": kind.bytes,
            "repetitions": len(timed),
        }
        for kind, timed in zip(kinds, seconds, strict=True)
    ]


if __name__ == "__main__":
    typer.run(main)
