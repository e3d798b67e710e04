"""Hostile inputs of modes::SkipExperts in ONNX Runtime: an error status comes back, and the session goes on with the same bits.

The graph says nothing of shapes, so that every check is the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from tests.kernels import calling
from tests.kernels.onnx_layer import ELEMENT, FED, feeds, model, session
from tests.kernels.quantised import random_quantised
from tests.kernels.reference import Case, random_case

Feeds = dict[str, np.ndarray]
CASES: dict[str, Callable[[], Case]] = {
    "plain": random_case,
    "per expert": lambda: random_case(per_expert=True),
    "score": lambda: random_case(explicit_score=True),
    "int32 ids": lambda: random_case(id_dtype=torch.int32),
    "half": lambda: random_case(dtype=torch.float16, weight_dtype=torch.float16),
    "transposed": lambda: random_case(transposed=True, interleaved=True, biases=True),
    "swiglu_oai": lambda: random_case(activation="swiglu_oai", biases=True),
    "int8": lambda: random_quantised("int8")[0],
    "int4": lambda: random_quantised("int4", hidden=40, intermediate=33, biases=True)[0],
}


def test_the_library_under_test_is_the_one_that_was_asked_for() -> None:
    """`make sanitize` runs this file on a library of its own."""
    assert calling.library().is_file()
    assert calling.UNDER_TEST is None or str(calling.library()) == calling.UNDER_TEST


def without_shapes(case: Case, **attributes: object) -> onnx.ModelProto:
    proto = model(case, **attributes)
    for value in proto.graph.input:
        value.type.tensor_type.ClearField("shape")
    return proto


def assert_refused(opened: ort.InferenceSession, good: Feeds, bad: Feeds, *words: str) -> None:
    """And what is good is answered as before."""
    (expected,) = opened.run(None, good)
    with pytest.raises(Exception, match=r"modes\.SkipExperts|Unexpected input data type") as caught:
        opened.run(None, good | bad)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    (again,) = opened.run(None, good)
    assert again.tobytes() == expected.tobytes()


# -- sizes and ranks ------------------------------------------------------------------------------------------------


def fewer(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1) if value.ndim > 1 else np.array(value[0])


RESHAPED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "one dimension more": lambda value: value[None],
    "one dimension less": fewer,
    "no dimension": lambda value: np.array(value.flat[0]),
    "nine dimensions": lambda value: value.reshape((1,) * 8 + (-1,)),
    "nothing": lambda value: value[:0],
    "one row less": lambda value: value[:-1],
    "one row more": lambda value: np.concatenate([value, value[:1]]),
    "one column less": lambda value: value[..., :-1],
    "no column": lambda value: value[..., :0],
    "transposed": lambda value: np.ascontiguousarray(value.T),
    "a million columns of nothing": lambda value: np.zeros((0, 1 << 20), value.dtype),
    "2^40 rows of nothing": lambda value: np.zeros((1 << 40, 0), value.dtype),
    "2^40 sequences of nothing": lambda value: np.zeros((1 << 20, 1 << 20, 0), value.dtype),
}


@pytest.mark.parametrize("name", CASES)
def test_every_input_in_every_wrong_shape(name: str) -> None:
    case = CASES[name]()
    opened, good = session(without_shapes(case)), feeds(case)
    tried = 0
    for fed, value in good.items():
        for what, change in RESHAPED.items():
            bad = change(value)
            same_meaning = bad.shape == value.shape or (fed == "x" and what == "one dimension more")
            if same_meaning or (fed == "score_scale" and bad.shape == (2, 6)):
                continue
            assert_refused(opened, good, {fed: bad}, "`")
            tried += 1
    assert tried > 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"x": (0, 24), "expert_ids": (0, 3), "expert_weights": (0, 3), "group": (0,), "tau": (0,), "score_scale": (0,)},
            "groups",
        ),
        ({"expert_ids": (9, 0), "expert_weights": (9, 0)}, "top_k"),
        ({"tau": (0,), "score_scale": (0,)}, "groups"),
    ],
)
def test_sizes_of_zero_that_agree_with_each_other(change: dict[str, tuple[int, ...]], words: str) -> None:
    case = random_case()
    good = feeds(case)
    assert_refused(
        session(without_shapes(case)), good, {k: np.zeros(shape, good[k].dtype) for k, shape in change.items()}, words
    )


@pytest.mark.parametrize("size", ["hidden", "intermediate", "experts"])
@pytest.mark.parametrize("tokens", [0, 9])
def test_weights_without_elements(size: str, tokens: int) -> None:
    shapes = {"hidden": 24, "intermediate": 16, "experts": 6} | {size: 0}
    H, I, E = shapes["hidden"], shapes["intermediate"], shapes["experts"]  # noqa: E741
    case = random_case(tokens=tokens)
    empty = case.but(x=torch.zeros(tokens, H), gate_up=torch.zeros(E, 2 * I, H), down=torch.zeros(E, H, I))
    with pytest.raises(Exception, match=r"modes\.SkipExperts.*`0`"):
        session(without_shapes(empty)).run(None, feeds(empty))


WEIGHTS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "gate_up of fewer experts": lambda c: {"gate_up": c.gate_up[:-1]},
    "down of fewer experts": lambda c: {"down": c.down[:-1]},
    "an odd number of gate and up rows": lambda c: {"gate_up": c.gate_up[:, :-1]},
    "gate_up of another width": lambda c: {"gate_up": c.gate_up[..., :-1]},
    "down of another width": lambda c: {"down": c.down[..., :-1]},
    "two dimensions": lambda c: {"down": c.down[0]},
    "four dimensions": lambda c: {"gate_up": c.gate_up[None]},
    "swapped": lambda c: {"gate_up": c.down, "down": c.gate_up},
}


@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("name", ["plain", "transposed", "int8", "int4"])
def test_weights_that_do_not_fit(name: str, change: str) -> None:
    case = CASES[name]()
    bad = case.but(**WEIGHTS[change](case))
    with pytest.raises(Exception, match=r"modes\.SkipExperts.*shape"):
        session(without_shapes(bad)).run(None, feeds(bad))


@pytest.mark.parametrize("shape", [(0, 1 << 62, 1 << 62), (0, (1 << 63) - 1, 1), (0, 1 << 31, 16)], ids=str)
@pytest.mark.parametrize("name", ["plain", "transposed", "int8"])
def test_weights_of_nothing_in_sizes_that_overflow(name: str, shape: tuple[int, ...]) -> None:
    case = CASES[name]()
    for weight in ("gate_up", "down"):
        proto = without_shapes(case)
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == weight)
        tensor.dims[:], tensor.raw_data = shape, b""
        with pytest.raises(Exception, match=rf"modes\.SkipExperts.*{weight} has shape"):
            session(proto).run(None, feeds(case))


@pytest.mark.parametrize("bias", ["gate_up_bias", "down_bias"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (5, 32), (1, 6, 32), (0,), ()])
def test_biases_that_do_not_fit(bias: str, shape: tuple[int, ...]) -> None:
    case = random_case(biases=True).but(**{bias: torch.zeros(shape)})
    with pytest.raises(Exception, match=rf"modes\.SkipExperts.*{bias}"):
        session(without_shapes(case)).run(None, feeds(case))


# -- ids, groups and values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 0), (4, 1), (8, 2)])
@pytest.mark.parametrize("name", ["plain", "int32 ids", "per expert", "score", "half", "int8", "int4"])
def test_expert_ids_out_of_range(name: str, place: tuple[int, int]) -> None:
    case = CASES[name]()
    opened, good = session(model(case)), feeds(case)
    limits = np.iinfo(good["expert_ids"].dtype)
    for bad in (-1, 6, 7, 1 << 16, limits.min, limits.max):
        ids = good["expert_ids"].copy()
        ids[place] = bad
        words = (f"expert id `{bad}` of token {place[0]}, slot {place[1]} is not in 0..5",)
        assert_refused(opened, good, {"expert_ids": ids}, *words)


@pytest.mark.parametrize("bad", [-1, 2, 1 << 30, -(1 << 31), (1 << 31) - 1])
def test_groups_out_of_range(bad: int) -> None:
    case = random_case()
    good = feeds(case)
    group = good["group"].copy()
    group[5] = bad
    assert_refused(session(model(case)), good, {"group": group}, f"group `{bad}` of token 5 is not in 0..1")


VALUES = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0)


FLOATS = [
    (name, fed)
    for name in ("plain", "per expert", "score", "swiglu_oai", "int8", "int4")
    for fed in ("x", "expert_weights", "tau", "score_scale", "score")
    if fed != "score" or name == "score"
]


@pytest.mark.parametrize(("name", "fed"), FLOATS)
def test_any_float_is_answered_and_stays_with_its_token(name: str, fed: str) -> None:
    case = CASES[name]()
    opened, good = session(model(case)), feeds(case)
    (expected,) = opened.run(None, good)
    for value in VALUES:
        bad = good[fed].copy()
        bad[(3,) if fed in ("x", "expert_weights", "score") else (0,)] = value
        (out,) = opened.run(None, good | {fed: bad})
        others = np.arange(len(out)) != 3 if fed in ("x", "expert_weights", "score") else good["group"] != 0
        if fed == "x" or name in ("int8", "int4"):  # rows of an expert that are summed together keep their number
            assert out[others].tobytes() == expected[others].tobytes(), value
        else:
            np.testing.assert_allclose(out[others], expected[others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 65504.0])
def test_any_scale_is_answered(scheme: str, value: float) -> None:
    """`modes verify` refuses such scales; the operator need not, but must not fall over them."""
    case, _ = random_quantised(scheme)
    assert case.gate_up_scales is not None
    scales = torch.full_like(case.gate_up_scales, value)
    (out,) = session(model(case.but(gate_up_scales=scales))).run(None, feeds(case))
    assert out.shape == tuple(case.x.shape)


# -- quantised weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 1, 31, 33, -32, 64, 1 << 40, (1 << 63) - 32, -(1 << 63)])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_blocks_that_are_none_or_do_not_fit(scheme: str, block: int) -> None:
    case, _ = random_quantised(scheme, hidden=96, intermediate=96)
    with pytest.raises(Exception, match=r"modes\.SkipExperts.*(block|scales)"):
        session(without_shapes(case, block=block)).run(None, feeds(case))


@pytest.mark.parametrize("shape", [(6, 32), (6, 32, 2), (6, 31, 1), (5, 32, 1), (6, 32, 0), (0,), ()])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_scales_that_do_not_fit(scheme: str, shape: tuple[int, ...]) -> None:
    case, _ = random_quantised(scheme)
    bad = case.but(gate_up_scales=torch.zeros(shape, dtype=torch.float16))
    with pytest.raises(Exception, match=r"modes\.SkipExperts.*gate_up_scales"):
        session(without_shapes(bad)).run(None, feeds(bad))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_without_scales_or_transposed(scheme: str) -> None:
    case, _ = random_quantised(scheme)
    for missing in ("gate_up_scales", "down_scales"):
        with pytest.raises(Exception, match=rf"modes\.SkipExperts.*{missing} is missing"):
            session(without_shapes(case.but(**{missing: None}))).run(None, feeds(case))
    with pytest.raises(Exception, match=r"modes\.SkipExperts.*transposed"):
        session(without_shapes(case, transposed=1)).run(None, feeds(case))


# -- dtypes, missing inputs, attributes -----------------------------------------------------------------------------

DTYPES = (np.float64, np.float16, np.int8, np.uint8, np.int64, np.int32, np.float32, np.bool_)


@pytest.mark.parametrize("fed", [name for name in FED if name != "score"])
def test_dtypes_that_no_overload_has(fed: str) -> None:
    """As they are fed, and as the graph says: such a graph does not load."""
    case = random_case()
    opened, good = session(model(case)), feeds(case)
    right = {good[fed].dtype.type, *((np.int32, np.int64) if fed == "expert_ids" else ())}
    for dtype in DTYPES:
        if dtype in right:
            continue
        assert_refused(opened, good, {fed: good[fed].astype(dtype)})
        proto = model(case)
        value = next(value for value in proto.graph.input if value.name == fed)
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        with pytest.raises(Exception, match="SkipExperts"):
            session(proto)


@pytest.mark.parametrize("weight", ["gate_up", "down", "gate_up_bias", "gate_up_scales"])
@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.INT32, TensorProto.BOOL, TensorProto.UINT16])
def test_weights_of_dtypes_that_no_overload_has(weight: str, kind: int) -> None:
    case = random_quantised("int8", biases=True)[0] if weight == "gate_up_scales" else random_case(biases=True)
    proto = model(case)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == weight)
    size = {TensorProto.DOUBLE: 8, TensorProto.INT32: 4, TensorProto.BOOL: 1, TensorProto.UINT16: 2}[kind]
    tensor.data_type, tensor.raw_data = kind, bytes(int(np.prod(tensor.dims)) * size)
    with pytest.raises(Exception, match="SkipExperts"):
        session(proto)


@pytest.mark.parametrize("index", range(8))
def test_required_inputs_that_are_missing(index: int) -> None:
    for change in ("empty", "cut off"):
        proto = model(random_case())
        (node,) = proto.graph.node
        if change == "empty":
            node.input[index] = ""
        else:
            del node.input[index:]
        with pytest.raises(Exception, match=r"SkipExperts|input"):
            session(proto).run(None, feeds(random_case()))


def test_more_inputs_and_outputs_than_there_are() -> None:
    for field, more in (("input", ["", "", "", "tau", "tau", "tau"]), ("output", ["kept", "third"])):
        proto = model(random_case())
        getattr(proto.graph.node[0], field).extend(more)
        with pytest.raises(Exception, match="SkipExperts"):
            session(proto)


@pytest.mark.parametrize(
    "attributes",
    [
        {"activation": ""},
        {"activation": "x" * 100_000},
        {"activation": "silu\0"},
        {"activation": "SILU"},
        {"transposed": -1},
        {"interleaved": 1 << 40},
        {"activation": "swiglu_oai", "limit": -1.0},
        {"activation": "swiglu_oai", "limit": float("nan")},
    ],
    ids=str,
)
def test_attributes_that_make_no_sense(attributes: dict[str, object]) -> None:
    case = random_case()
    with pytest.raises(Exception, match=r"modes\.SkipExperts"):
        session(model(case, **attributes)).run(None, feeds(case))


def test_ids_and_groups_of_every_overload_are_checked() -> None:
    assert {ELEMENT[torch.int64], ELEMENT[torch.int32]} == {TensorProto.INT64, TensorProto.INT32}
    for dtype in (torch.float32, torch.float16):
        for weights in (torch.float32, torch.float16, torch.bfloat16):
            case = random_case(dtype=dtype, weight_dtype=weights)
            good = feeds(case)
            assert_refused(session(model(case)), good, {"expert_ids": np.full_like(good["expert_ids"], 6)}, "expert id `6`")
