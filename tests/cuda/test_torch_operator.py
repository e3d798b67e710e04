"""`torch.ops.modes.skip_experts` on CUDA devices: emulated, and on a real one where there is one."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modes_cli.errors import KernelError
from modes_cli.runtime import devices, kernels, libraries
from modes_cli.runtime.cuda import Cuda
from tests.cuda.as_gpu import Emulated, install, real_gpu
from tests.kernels.reference import ALPHA, LIMIT, Case, assert_close, kept_pairs, random_case

OPERATOR = torch.ops.modes.skip_experts
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WHERE = [pytest.param("emulated", id="emulated"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return install(emulated_library, monkeypatch)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors of a test lie: on the CPU, which stands for a GPU, or on a real one."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return torch.device("cpu")
    return real_gpu()


def placed(case: Case, device: torch.device) -> Case:
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return case.but(**{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


def arguments(case: Case) -> tuple[object, ...]:
    return (
        case.x, case.expert_ids, case.expert_weights, case.group, case.tau, case.score_scale, case.gate_up, case.down,
        case.gate_up_bias, case.down_bias, case.activation, ALPHA, LIMIT, case.transposed, case.interleaved,
    )  # fmt: skip


@pytest.mark.parametrize("place", WHERE, indirect=True)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [{}, {"transposed": True, "interleaved": True, "biases": True, "activation": "swiglu_oai"}])
def test_computes_the_definition(dtype: torch.dtype, layout: dict[str, object], place: torch.device) -> None:
    case = random_case(hidden=32, dtype=dtype, weight_dtype=dtype, **layout)  # type: ignore[arg-type]
    there, kept = placed(case, place), torch.zeros(2, dtype=torch.int64, device=place)
    experts = kernels.Experts(*arguments(there)[6:])  # type: ignore[arg-type]
    out = experts(*arguments(there)[:6], kept=kept)  # type: ignore[arg-type]
    assert_close(out.cpu(), case)
    assert torch.equal(kept.cpu(), kept_pairs(case))
    assert torch.equal(OPERATOR(*arguments(there)), out)  # the same bits


@pytest.mark.parametrize("place", WHERE, indirect=True)
def test_scores_of_its_own_and_int32_ids(place: torch.device) -> None:
    case = random_case(explicit_score=True, id_dtype=torch.int32, per_expert=True)
    there = placed(case, place)
    assert_close(OPERATOR(*arguments(there), score=there.score).cpu(), case)


@pytest.mark.parametrize("place", WHERE, indirect=True)
def test_no_tokens(place: torch.device) -> None:
    there, kept = placed(random_case(tokens=0), place), torch.ones(2, dtype=torch.int64, device=place)
    assert kernels.skip_experts(*arguments(there), kept=kept).shape == (0, 24)  # type: ignore[arg-type]
    assert kept.tolist() == [0, 0]


@pytest.mark.parametrize("place", WHERE, indirect=True)
@pytest.mark.parametrize(("name", "value"), [("expert_ids", 6), ("expert_ids", -1), ("group", 2)])
def test_an_index_out_of_range_is_one_tokens_nan(name: str, value: int, place: torch.device) -> None:
    case = random_case(tau=0.0)
    good = OPERATOR(*arguments(placed(case, place))).cpu()
    changed = getattr(case, name).clone()
    changed.view(9, -1)[4, -1] = value
    out = OPERATOR(*arguments(placed(case.but(**{name: changed}), place))).cpu()
    assert bool(out[4].isnan().all())
    others = [t for t in range(9) if t != 4]
    torch.testing.assert_close(out[others], good[others])


@pytest.mark.parametrize("place", WHERE, indirect=True)
def test_opcheck(place: torch.device) -> None:
    there = placed(random_case(biases=True, explicit_score=True, weight_dtype=torch.bfloat16), place)
    torch.library.opcheck(OPERATOR.default, arguments(there), {"score": there.score})


class Layer(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.rest = arguments(case)[4:]

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor, group: Tensor) -> Tensor:
        out: Tensor = OPERATOR(x, expert_ids, expert_weights, group, *self.rest)
        return out * 2


@pytest.mark.parametrize("place", WHERE, indirect=True)
def test_a_compiled_layer_is_one_graph(place: torch.device) -> None:
    torch._dynamo.reset()
    there = placed(random_case(biases=True), place)
    compiled = torch.compile(Layer(there), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments(there)[:4]), 2 * OPERATOR(*arguments(there)))


@pytest.mark.parametrize("place", WHERE, indirect=True)
def test_an_exported_layer_takes_any_number_of_tokens(place: torch.device) -> None:
    there = placed(random_case(biases=True), place)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Layer(there), arguments(there)[:4], dynamic_shapes=({0: tokens},) * 4)  # type: ignore[arg-type]
    longer = placed(random_case(tokens=21, seed=1), place)
    assert torch.equal(program.module()(*arguments(longer)[:4]), 2 * OPERATOR(*arguments(longer)[:4], *arguments(there)[4:]))


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WHERE, indirect=True)
@pytest.mark.parametrize("name", ["x", "expert_ids", "tau", "score_scale", "down"])
def test_tensors_of_several_devices_are_refused(name: str, place: torch.device) -> None:
    there = placed(random_case(), place)
    mixed = there.but(**{name: getattr(there, name).to("meta")})
    with pytest.raises(KernelError, match=f"{name} is on `meta`, expected `{place.type}"):
        kernels.skip_experts(*arguments(mixed))  # type: ignore[arg-type]


def test_a_device_without_kernels() -> None:
    with pytest.raises(KernelError, match="no kernels for the device `meta`"):
        kernels.skip_experts(*arguments(placed(random_case(), torch.device("meta"))))  # type: ignore[arg-type]


def test_limits_of_the_kernels_are_errors_with_their_values(emulated: Emulated) -> None:
    case = random_case(experts=1025, hidden=8, intermediate=8)
    with pytest.raises(KernelError, match="experts is `1025`"):
        kernels.skip_experts(*arguments(case))  # type: ignore[arg-type]


def test_without_the_library_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.KINDS, "cpu", Cuda())
    monkeypatch.setattr(libraries, "library_path", lambda _name: None)
    libraries.load.cache_clear()
    with pytest.raises(KernelError, match=r"`libmodes_cuda\.so` is not installed") as raised:
        kernels.skip_experts(*arguments(random_case()))  # type: ignore[arg-type]
    assert "nvcc" in str(raised.value.hint)
    assert "MODES_CUDA=ON" in str(raised.value.hint)


def test_a_library_without_cuda_is_refused() -> None:
    path = libraries.library_path()
    assert path is not None
    with pytest.raises(KernelError, match=r"does not load.*modes_cuda_devices"):
        libraries.open_library(path, cuda=True)


def test_the_emulated_library_has_the_cpu_kernels_too(emulated_library: Path) -> None:
    library = libraries.open_library(emulated_library, cuda=True)
    assert library.modes_cpu_isa() == libraries.load().modes_cpu_isa()
