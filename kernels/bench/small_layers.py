"""Small layers on the GPU through every kind of kernel, compared with the reference: what compute-sanitizer watches.

    compute-sanitizer --tool racecheck python -m kernels.bench.small_layers

All is made and compared on the CPU, so that torch launches no kernels of its own.
"""

import sys

import torch

from kernels.bench.cases import TOLERANCE, Layer, Shape, random_layers, random_routings, reference, relative_error
from kernels.bench.measure_gpu import UNFIT
from kernels.bench.ours import Ours
from modes_cli.errors import KernelError

SHAPES = (Shape(128, 64, 8, 2), Shape(192, 96, 5, 3))
CASES = (
    ("hopper", "bfloat16", 150),
    ("mma", "bfloat16", 37),
    ("mma", "float16", 130),
    ("decode", "bfloat16", 1),
    ("decode", "bfloat16", 8),
    ("float", "float32", 20),
    ("plain", "float32", 9),
)
RATIOS = [0.0, 0.5, 0.88]


def main() -> int:
    """1 if a layer is wrong."""
    wrong = computed = 0
    for shape in SHAPES:
        for path, name, tokens in CASES:
            dtype: torch.dtype = getattr(torch, name)
            layer = random_layers(shape, dtype, 1)[0]
            routed = random_routings(shape, dtype, tokens, RATIOS, 1, 1)[0]
            there = routed.to("cuda")
            ours = Ours([Layer(layer.gate_up.cuda(), layer.down.cuda())], path)
            for ratio in RATIOS:
                try:
                    out = ours.work(there, ratio, 1)().cpu()
                except KernelError as refusal:
                    if UNFIT not in str(refusal):
                        raise
                    print(f"{path} {name} {shape}, {tokens} tokens: does not fit")
                    break
                error = relative_error(out, reference(layer, routed, ratio))
                computed += 1
                if not error <= TOLERANCE[name]:
                    wrong += 1
                    print(f"{path} {name} {shape}, {tokens} tokens, {ratio:.0%} skipped: wrong by {error:.1e}")
    print(f"{wrong} of {computed} layers are wrong" if wrong or not computed else f"{computed} layers are right")
    return int(bool(wrong) or not computed)


if __name__ == "__main__":
    sys.exit(main())
