"""modes::SkipExperts in real ONNX Runtime sessions: every overload, optional inputs and outputs, mistakes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from modes_cli.runtime import kernels
from tests.kernels.onnx_layer import NAMES, feeds, model, run, session
from tests.kernels.reference import ACTIVATIONS, assert_close, kept_pairs, random_case


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_overload_matches_the_definition(dtype: torch.dtype, weight_dtype: torch.dtype, id_dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype, weight_dtype=weight_dtype, id_dtype=id_dtype, biases=True)
    assert_close(run(case), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_attribute_reaches_the_kernel(activation: str, transposed: bool, interleaved: bool) -> None:
    case = random_case(activation=activation, transposed=transposed, interleaved=interleaved)
    assert_close(run(case), case)


def test_alpha_and_limit_reach_the_kernel() -> None:
    case = random_case(activation="swiglu_oai")
    assert torch.equal(run(case), run(case, alpha=1.702, limit=7.0))
    assert not torch.allclose(run(case), run(case, alpha=1.0))
    assert not torch.allclose(run(case), run(case, limit=0.5))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("explicit_score", [False, True])
@pytest.mark.parametrize("per_expert", [False, True])
def test_optional_inputs_may_be_absent(biases: bool, explicit_score: bool, per_expert: bool) -> None:
    case = random_case(biases=biases, explicit_score=explicit_score, per_expert=per_expert)
    assert_close(run(case), case)


def test_the_second_output_counts_kept_pairs() -> None:
    case = random_case(tokens=30, groups=3)
    out, kept = session(model(case, outputs=("out", "kept"))).run(None, feeds(case))
    assert_close(torch.from_numpy(out), case)
    assert kept.tolist() == kept_pairs(case).tolist()


def test_takes_batch_and_sequence_and_no_tokens() -> None:
    case = random_case(tokens=12)
    (flat,) = session(model(case)).run(None, feeds(case))
    batched = case.but(x=case.x.reshape(3, 4, -1))
    (out,) = session(model(batched)).run(None, feeds(batched))
    assert out.shape == (3, 4, 24)
    assert np.array_equal(out.reshape(12, -1), flat)

    empty = random_case(tokens=0)
    (out,) = session(model(empty)).run(None, feeds(empty))
    assert out.shape == (0, 24)


def test_infers_the_shapes_of_its_outputs() -> None:
    case = random_case(groups=3)
    proto = model(case, outputs=("out", "kept"))
    del proto.graph.output[:]
    del proto.graph.input[:]
    for name, value in feeds(case).items():
        element = helper.np_dtype_to_tensor_dtype(value.dtype)
        shape = ["tokens", *value.shape[1:]] if value.ndim == 2 and name != "score_scale" else value.shape
        proto.graph.input.append(helper.make_tensor_value_info(name, element, shape))
    proto.graph.output.extend([onnx.ValueInfoProto(name="out"), onnx.ValueInfoProto(name="kept")])
    out, kept = session(proto).get_outputs()
    assert (out.shape, out.type) == (["tokens", 24], "tensor(float)")
    assert (kept.shape, kept.type) == ([3], "tensor(int64)")


def test_same_bits_as_pytorch_and_for_any_number_of_threads() -> None:
    case = random_case(tokens=100, hidden=160, intermediate=130, weight_dtype=torch.bfloat16)
    alone = run(case, threads=1)
    assert torch.equal(run(case, threads=4), alone)
    assert torch.equal(alone, torch.ops.modes.skip_experts(*[getattr(case, name) for name in NAMES[:-1]], "silu", 1.702, 7.0,
                                                           False, False))  # fmt: skip


def test_one_session_serves_many_threads() -> None:
    case = random_case(tokens=50, hidden=96, intermediate=96)
    shared, fed = session(model(case), threads=2), feeds(case)
    (expected,) = shared.run(None, fed)
    with ThreadPoolExecutor(6) as pool:
        for (out,) in pool.map(lambda _: shared.run(None, fed), range(24)):
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("offset", [1, 4099])
def test_weights_are_read_in_place_from_a_file_at_any_offset(tmp_path: Path, offset: int) -> None:
    case = random_case(weight_dtype=torch.bfloat16)
    proto, data = model(case), b"\xff" * offset
    for tensor in proto.graph.initializer:
        location = {"location": "weights.bin", "offset": len(data), "length": len(tensor.raw_data)}
        data += tensor.raw_data + b"\xff"
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in location.items())
    (tmp_path / "weights.bin").write_bytes(data)
    (tmp_path / "layer.onnx").write_bytes(proto.SerializeToString())
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernels.library_path()))
    opened = ort.InferenceSession(str(tmp_path / "layer.onnx"), options, providers=["CPUExecutionProvider"])
    (out,) = opened.run(None, feeds(case))
    assert_close(torch.from_numpy(out), case)


def test_mistakes_in_data_raise_and_the_session_goes_on() -> None:
    case = random_case()
    opened, good = session(model(case)), feeds(case)
    (expected,) = opened.run(None, good)
    ids, group = good["expert_ids"].copy(), good["group"].copy()
    ids[4, 2], group[3] = 6, -1
    bad = [
        ({"expert_ids": ids}, "expert id `6` of token 4, slot 2 is not in 0..5"),
        ({"group": group}, "group `-1` of token 3 is not in 0..1"),
        ({"group": group[:8]}, "group has shape `[8]`, expected [T] = [9]"),
        ({"x": good["x"][:, :23].copy()}, "down has shape `[6, 24, 16]`, expected [E, H, I] = [6, 23, 16]"),
        ({"expert_weights": good["expert_weights"][:, :2].copy()}, "expert_weights has shape `[9, 2]`"),
        ({"score_scale": np.ones(3, np.float32)}, "score_scale has shape `[3]`, expected [G] = [2]"),
    ]
    for changes, message in bad:
        with pytest.raises(Exception, match=r"modes\.SkipExperts") as caught:
            opened.run(None, {**good, **changes})
        assert message in str(caught.value)
        (out,) = opened.run(None, good)
        assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"activation": "relu"}, "attribute activation is `relu`, expected silu, gelu_tanh or swiglu_oai"),
        ({"transposed": 2}, "attribute transposed is `2`, expected 0 or 1"),
    ],
)
def test_mistakes_in_attributes_are_refused_at_load(attributes: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=r"modes\.SkipExperts") as caught:
        session(model(random_case(), **attributes))
    assert message in str(caught.value)


def test_mixed_weight_types_are_refused_at_load() -> None:
    case = random_case()
    with pytest.raises(Exception, match=r"SkipExperts|Type"):
        session(model(case.but(down=case.down.half())))
