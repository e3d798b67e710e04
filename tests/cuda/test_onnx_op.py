"""modes::SkipExperts as ONNX Runtime runs it for CUDA: in real sessions, and by callbacks with a GPU's stream and memory.

libmodes_emulated.so registers the code for CUDA, with emulated kernels, for the CPU provider, so that sessions without a
GPU run it. On a machine with a GPU and the CUDA build the same sessions run there too.
"""

import ctypes
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from modes_cli.runtime import libraries
from tests.cuda.conftest import cuda_library
from tests.cuda.fake_ort import ELEMENT, FakeOrt, Overload
from tests.kernels import onnx_layer
from tests.kernels.onnx_layer import NAMES, feeds, model
from tests.kernels.reference import ACTIVATIONS, Case, assert_close, kept_pairs, random_case

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CPU, CUDA, PLUGIN = "CPUExecutionProvider", "CUDAExecutionProvider", "CudaPluginExecutionProvider"


@dataclass(frozen=True)
class Target:
    """A library, and the providers of sessions that run its code for CUDA."""

    library: Path
    providers: tuple[str, ...]

    def session(self, case: Case, **model_options: object) -> ort.InferenceSession:
        return onnx_layer.session(model(case, **model_options), library=self.library, providers=self.providers)

    def run(self, case: Case, **attributes: object) -> Tensor:
        (out,) = self.session(case, **attributes).run(None, feeds(case))
        return torch.from_numpy(out).to(case.x.dtype)


def gpus() -> int:
    count = ctypes.c_int32()
    assert libraries.open_library(cuda_library(), cuda=True).modes_cuda_devices(ctypes.byref(count), None) == 0
    return count.value


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "emulated":
        return Target(request.getfixturevalue("emulated_library"), (CPU,))
    path = cuda_library()
    if gpus() == 0:
        pytest.skip("there is no GPU")
    if CUDA not in ort.get_available_providers():
        pytest.skip("ONNX Runtime is built without CUDA")
    return Target(path, (CUDA, CPU))


@pytest.fixture
def fake(emulated_library: Path, tmp_path: Path) -> Callable[..., FakeOrt]:
    return lambda **options: registered(emulated_library, tmp_path, **options)


def registered(library: Path, folder: Path, **options: object) -> FakeOrt:
    """A stand-in with the overloads of a copy of the library, whose one domain no other test has made."""
    made = FakeOrt(**options)  # type: ignore[arg-type]
    copy = folder / f"{len(list(folder.iterdir()))}-{library.name}"
    made.register(shutil.copy(library, copy))
    return made


def overload_for(case: Case, made: FakeOrt, provider: str = CPU) -> Overload:
    wanted = tuple(ELEMENT[tensor.dtype] for tensor in (case.x, case.gate_up, case.expert_ids))
    (found,) = [one for one in made.overloads if (one.provider, one.dtypes) == (provider, wanted)]
    return found


def inputs(case: Case) -> list[Tensor | None]:
    return [getattr(case, name) for name in NAMES]


# -- sessions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_overload(target: Target, dtype: torch.dtype, weight_dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype, weight_dtype=weight_dtype, id_dtype=id_dtype, biases=True)
    assert_close(target.run(case), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("transposed", "interleaved"), [(False, False), (True, False), (False, True)])
def test_attributes(target: Target, activation: str, transposed: bool, interleaved: bool) -> None:
    case = random_case(activation=activation, transposed=transposed, interleaved=interleaved)
    assert_close(target.run(case), case)


@pytest.mark.parametrize(("explicit_score", "per_expert"), [(True, False), (False, True)])
def test_scores(target: Target, explicit_score: bool, per_expert: bool) -> None:
    case = random_case(explicit_score=explicit_score, per_expert=per_expert)
    assert_close(target.run(case), case)


def test_as_on_the_cpu_kept_pairs_too(target: Target) -> None:
    case = random_case(tokens=30, groups=3, hidden=64, intermediate=32)
    out, kept = target.session(case, outputs=("out", "kept")).run(None, feeds(case))
    on_cpu = onnx_layer.session(model(case, outputs=("out", "kept"))).run(None, feeds(case))
    np.testing.assert_allclose(out, on_cpu[0], rtol=1e-4, atol=1e-5)
    assert kept.tolist() == on_cpu[1].tolist() == kept_pairs(case).tolist()


def test_batch_and_sequence_and_no_tokens(target: Target) -> None:
    case = random_case(tokens=12)
    batched = case.but(x=case.x.reshape(3, 4, -1))
    (out,) = target.session(batched).run(None, feeds(batched))
    assert np.array_equal(out.reshape(12, -1), target.run(case).numpy())
    empty = random_case(tokens=0, groups=2)
    out, kept = target.session(empty, outputs=("out", "kept")).run(None, feeds(empty))
    assert out.shape == (0, 24)
    assert kept.tolist() == [0, 0]


def test_an_id_out_of_range_is_nan_in_its_token_only(target: Target) -> None:
    case = random_case(tokens=5).but(tau=torch.zeros(2))
    opened, good = target.session(case, outputs=("out", "kept")), feeds(case)
    expected, kept = opened.run(None, good)
    ids = good["expert_ids"].copy()
    ids[3, 1] = 6
    out, fewer = opened.run(None, {**good, "expert_ids": ids})
    assert np.isnan(out[3]).all()
    assert np.array_equal(np.delete(out, 3, 0), np.delete(expected, 3, 0))
    assert fewer.sum() == kept.sum() - 1
    assert np.array_equal(opened.run(None, good)[0], expected)


def test_mistakes_are_statuses_and_the_session_goes_on(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case()
    opened, good = target.session(case), feeds(case)
    (expected,) = opened.run(None, good)
    with pytest.raises(Exception, match=r"modes\.SkipExperts: score_scale has shape `\[3\]`, expected \[G\] = \[2\]"):
        opened.run(None, {**good, "score_scale": np.ones(3, np.float32)})
    monkeypatch.setenv("MODES_CUDA_PATH", "fastest")
    with pytest.raises(Exception, match=r"modes\.SkipExperts: MODES_CUDA_PATH is `fastest`, expected one of"):
        opened.run(None, good)
    monkeypatch.delenv("MODES_CUDA_PATH")
    (out,) = opened.run(None, good)
    assert np.array_equal(out, expected)


def test_without_a_device(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case()
    opened = Target(emulated_library, (CPU,)).session(case)
    monkeypatch.setenv("MODES_EMULATED_DEVICE", "none")
    with pytest.raises(Exception, match=r"modes\.SkipExperts: no CUDA device"):
        opened.run(None, feeds(case))


def test_scratch_memory_does_not_pile_up(emulated_library: Path) -> None:
    """Address space, since memory that nobody wrote to is not resident."""
    case = random_case(tokens=500, hidden=512, intermediate=1024, experts=2, top_k=2).but(tau=torch.full((2,), torch.inf))
    opened, fed = Target(emulated_library, (CPU,)).session(case), feeds(case)

    def size() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    for _ in range(3):
        opened.run(None, fed)
    before = size()
    for _ in range(40):
        opened.run(None, fed)
    one = 500 * 2 * (512 + 1024) * 4
    assert size() - before < 2 * one


# -- callbacks ----------------------------------------------------------------------------------------------------------


def test_scratch_is_of_the_stream_and_goes_back(fake: Callable[..., FakeOrt]) -> None:
    case = random_case(biases=True)
    made = fake()
    out, kept = made.run(overload_for(case, made), inputs(case))
    assert_close(out, case)
    assert kept.tolist() == kept_pairs(case).tolist()
    assert made.log == ["memory info", "allocator", "scratch", "free", "return allocator"]
    assert made.nothing_left()


def test_without_a_stream_the_allocator_is_asked(fake: Callable[..., FakeOrt]) -> None:
    case = random_case()
    made = fake(stream=0)
    assert_close(made.run(overload_for(case, made), inputs(case))[0], case)
    assert made.log == ["memory info", "allocator", "alloc", "free", "return allocator"]
    assert made.nothing_left()


@pytest.mark.parametrize("stream", [0x5000, 0])
@pytest.mark.parametrize("what", ["memory info", "allocator", "scratch", "alloc", "free"])
def test_a_failure_is_reported_and_leaves_nothing(fake: Callable[..., FakeOrt], what: str, stream: int) -> None:
    case = random_case()
    made = fake(stream=stream, fail={what})
    if what == ("alloc" if stream else "scratch"):  # the other one is asked
        made.run(overload_for(case, made), inputs(case))
    else:
        with pytest.raises(RuntimeError, match=f"{what} failed"):
            made.run(overload_for(case, made), inputs(case))
    assert made.nothing_left()


@pytest.mark.parametrize("fail", [set(), {"free"}])
def test_a_call_that_fails_gives_its_scratch_back(
    fake: Callable[..., FakeOrt], monkeypatch: pytest.MonkeyPatch, fail: set[str]
) -> None:
    case = random_case()
    made = fake(fail=fail)
    monkeypatch.setenv("MODES_CUDA_PATH", "fastest")
    with pytest.raises(RuntimeError, match=r"2: modes\.SkipExperts: MODES_CUDA_PATH is `fastest`"):
        made.run(overload_for(case, made), inputs(case))
    assert made.log == ["memory info", "allocator", "scratch", "free", "return allocator"]
    assert made.nothing_left()


def all_dtypes() -> list[tuple[int, int, int]]:
    ids = (ELEMENT[torch.int64], ELEMENT[torch.int32])
    floats = [ELEMENT[dtype] for dtype in FLOATS]
    return sorted(product(floats, [*floats, ELEMENT[torch.int8], ELEMENT[torch.uint8]], ids))


def test_the_emulated_library_has_the_overloads_of_cuda_for_the_cpu(fake: Callable[..., FakeOrt]) -> None:
    made = fake()
    assert {one.provider for one in made.overloads} == {CPU}
    assert sorted(one.dtypes for one in made.overloads) == all_dtypes()


def test_the_cpu_library_has_nothing_for_cuda(tmp_path: Path) -> None:
    path = libraries.library_path()
    assert path is not None
    made = registered(path, tmp_path)
    assert {one.provider for one in (*made.overloads, *made.others)} == {CPU}
    assert sorted(one.dtypes for one in made.overloads) == all_dtypes()


# -- libmodes_cuda.so ---------------------------------------------------------------------------------------------------


def test_the_cuda_library_has_overloads_for_every_provider(tmp_path: Path) -> None:
    made = registered(cuda_library(), tmp_path)
    for provider in (CPU, CUDA, PLUGIN):
        assert sorted(one.dtypes for one in made.overloads if one.provider == provider) == all_dtypes()
    assert len(made.overloads) == 3 * len(all_dtypes())
    assert [(one.name, one.provider) for one in made.others] == [("Route", CPU)]


def test_the_cuda_library_computes_on_the_cpu_where_a_session_asks_for_it() -> None:
    case = random_case(tokens=20, weight_dtype=torch.bfloat16, biases=True)
    out = Target(cuda_library(), (CPU,)).run(case)
    assert_close(out, case)
    assert torch.equal(out, onnx_layer.run(case))


@pytest.mark.parametrize("provider", [CUDA, PLUGIN])
def test_the_cuda_library_says_that_there_is_no_gpu(tmp_path: Path, provider: str) -> None:
    made = registered(cuda_library(), tmp_path)
    if gpus():
        pytest.skip("there is a GPU")
    case = random_case()
    with pytest.raises(RuntimeError, match=r"1: modes\.SkipExperts: no CUDA device"):
        made.run(overload_for(case, made, provider), inputs(case))
    assert made.nothing_left()
