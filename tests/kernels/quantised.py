"""Cases with quantised weights, each beside the same case with what they stand for in float32."""

from modes_cli.models.quantization import SCHEMES, dequantise, quantise
from tests.kernels.reference import Case, random_case


def quantised(case: Case, scheme: str, block: int = 32) -> tuple[Case, Case]:
    """The case with quantised weights, and with these dequantised to float32."""
    kind = SCHEMES[scheme]
    gate_up, down = (quantise(weights, kind, block) for weights in (case.gate_up, case.down))
    wide = [
        dequantise(*pair, kind, weights.shape[-1], block)
        for pair, weights in ((gate_up, case.gate_up), (down, case.down))
    ]  # fmt: skip
    packed = case.but(gate_up=gate_up[0], down=down[0], gate_up_scales=gate_up[1], down_scales=down[1], block=block)
    return packed, case.but(gate_up=wide[0], down=wide[1])


def random_quantised(scheme: str, block: int = 32, **sizes: object) -> tuple[Case, Case]:
    """Of `random_case`."""
    return quantised(random_case(**sizes), scheme, block)  # type: ignore[arg-type]
