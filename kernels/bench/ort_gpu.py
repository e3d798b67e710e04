"""The operator in an ONNX Runtime session on a GPU, beside com.microsoft's MoE and QMoE; float16, inputs on the device.

    python -m kernels.bench.ort_gpu FILE

Writes what was measured, or why nothing was: not every onnxruntime package has a CUDA provider. MoE and QMoE cannot skip.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.bench.cases import TOLERANCE, Layer, Routed, Shape, random_layers, random_routings, reference, relative_error
from kernels.bench.names import MOE, OURS, QMOE
from modes_cli.errors import first_line

SHAPE = Shape(2048, 768, 128, 8)
TOKENS = (1, 8, 512, 8192)
RATIOS = [0.0, 0.88]
REPETITIONS = 15
CUDA = "CUDAExecutionProvider"
CHECKED_TOKENS = 64

Json = dict[str, Any]


def main(target: str) -> int:
    """1 if our operator broke or was wrong."""
    found: Json = {"rows": [], "notes": []}
    try:
        import onnxruntime as ort

        providers = ort.get_available_providers()
        if CUDA not in providers:
            found["notes"].append(f"this ONNX Runtime has no `{CUDA}`, only {', '.join(providers)}")
        elif why := _unusable():
            found["notes"].append(f"the `{CUDA}` of this ONNX Runtime does not work: {why}")
        else:
            measure(found)
    except ImportError as error:
        found["notes"].append(f"not measured: {first_line(error)}")
    Path(target).write_text(json.dumps(found, indent=1), "utf-8")
    ours = [row for row in found["rows"] if row["runtime"] == OURS]
    return int(bool(found["rows"]) and (not ours or not all(row["right"] for row in ours)))


def _unusable() -> str | None:
    """Why nothing can be put on the device through ONNX Runtime: libraries of another CUDA version, mostly."""
    import numpy as np
    import onnxruntime as ort

    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception as error:  # of its own classes, which are not public
        return first_line(error)
    return None


def measure(found: Json) -> None:
    """Fill `rows` and `notes`."""
    layer = random_layers(SHAPE, torch.float16, 1)[0]
    for name, make in _makers(layer).items():
        try:
            work_of = make()
            for tokens in TOKENS:
                routed = random_routings(SHAPE, torch.float16, tokens, RATIOS, 1, 1)[0]
                for ratio in RATIOS if name == OURS else RATIOS[:1]:
                    found["rows"].append(_row(name, work_of, layer, routed, ratio))
        except Exception as error:  # a version without the operator, or with other inputs
            found["notes"].append(f"{name}: {first_line(error)}")
            found["rows"] += [{"runtime": OURS, "right": False, "reason": first_line(error)}] if name == OURS else []


@dataclass(frozen=True)
class Work:
    """A run with inputs and output on the device.

    Attributes:
        weights: a session reads their memory without owning it.
    """

    session: Any
    binding: Any
    weights: dict[str, Any]

    def __call__(self) -> None:
        """Waits for the device."""
        self.session.run_with_iobinding(self.binding)

    def output(self) -> torch.Tensor:
        """[T, H] of the last call."""
        return torch.from_numpy(self.binding.copy_outputs_to_cpu()[0])


WorkOf = Callable[[Routed, float], Work]


def _makers(layer: Layer) -> dict[str, Callable[[], WorkOf]]:
    """A session for each; its work for one call's inputs."""
    return {OURS: lambda: _ours(layer), MOE: lambda: _stock(layer, "MoE"), QMOE: lambda: _stock(layer, "QMoE")}


def _ours(layer: Layer, provider: str = CUDA) -> WorkOf:
    from onnx import TensorProto

    from kernels.bench.peers_ort import node_session
    from modes_cli.runtime import libraries

    half, ids, group, single = TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT
    fed = {
        "x": (half, "tokens", layer.down.shape[1]),
        "expert_ids": (ids, "tokens", "top_k"),
        "expert_weights": (half, "tokens", "top_k"),
        "group": (group, "tokens"),
        "tau": (single, 1),
        "score_scale": (single, 1),
    }
    weights = {"gate_up": layer.gate_up.numpy(), "down": layer.down.numpy()}
    library = str(libraries.library_path(libraries.CUDA if provider == CUDA else libraries.CPU))
    session = node_session("modes", "SkipExperts", [*fed, *weights], fed, weights, 1, (provider,), library)

    def work_of(routed: Routed, ratio: float) -> Work:
        values = (routed.x, routed.ids, routed.weights, routed.group, routed.tau[ratio], routed.scale)
        return _bound(session, dict(zip(fed, (value.numpy() for value in values), strict=True)), weights, provider)

    return work_of


def _stock(layer: Layer, operator: str, provider: str = CUDA, shape: Shape = SHAPE) -> WorkOf:
    """ONNX Runtime's own, every pair computed."""
    from onnx import TensorProto

    from kernels.bench import peers_ort

    weights, inputs = (
        {"fc1": peers_ort.in_turn(layer.gate_up).numpy(), "fc2": layer.down.numpy()},
        ["x", "logits", "fc1", "", "fc2"],
    )
    attributes: Json = {"normalize_routing_weights": 1}
    if operator == "QMoE":
        (fc1, scale1), (fc2, scale2) = (peers_ort.eight_bits(w) for w in (peers_ort.in_turn(layer.gate_up), layer.down))
        weights = {"fc1": fc1, "scale1": scale1, "fc2": fc2, "scale2": scale2}
        inputs, attributes = ["x", "logits", "fc1", "scale1", "", "fc2", "scale2"], attributes | {"expert_weight_bits": 8}
    attributes |= peers_ort.stock_attributes(shape)
    widths = {name: width for name, width in peers_ort.stock_widths(shape).items() if name in inputs}
    fed = {name: (TensorProto.FLOAT16, "tokens", width) for name, width in widths.items()}
    session = peers_ort.node_session("com.microsoft", operator, inputs, fed, weights, 1, (provider,), **attributes)

    def work_of(routed: Routed, _ratio: float) -> Work:
        logits = peers_ort.spread(routed, routed.weights.float().log(), shape, peers_ort.NEVER).astype("float16")
        return _bound(session, {"x": routed.x.numpy(), "logits": logits}, weights, provider)

    return work_of


def _bound(session: Any, feeds: dict[str, Any], weights: dict[str, Any], provider: str) -> Work:
    import onnxruntime as ort

    device, binding = "cuda" if provider == CUDA else "cpu", session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, device, 0))
    binding.bind_output("out", device)
    return Work(session, binding, weights)


def _row(name: str, work_of: WorkOf, layer: Layer, routed: Routed, ratio: float) -> Json:
    work = work_of(routed, ratio)
    work()
    some = torch.arange(min(len(routed.x), CHECKED_TOKENS))
    error = relative_error(work.output()[some], reference(layer, routed.of_tokens(some), ratio))
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    allowed = TOLERANCE["float16/int8" if name == QMOE else "float16"]
    times = {"seconds": statistics.median(seconds), "repetitions": REPETITIONS}
    case = {"runtime": name, "dtype": "float16", "tokens": len(routed.x), "skip_ratio": ratio}
    return case | times | {"error": error, "right": error <= allowed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
