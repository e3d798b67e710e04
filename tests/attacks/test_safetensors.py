"""Weights and thresholds: headers that lie, and numbers that are none."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from modes_cli.errors import BadArtifact
from modes_cli.safetensors_header import read_header
from tests.attacks.bundles import NORM, SHARD, THRESHOLDS, assert_refused, assert_verify_fails, header_of, write_header
from tests.export.bundles import relist

Header = dict[str, Any]


def first(header: Header) -> Header:
    entry: Header = min((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][0])
    return entry


ATTACKS: dict[str, tuple[Callable[[Header], object], str]] = {
    "past the end": (lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256]), "past the end"),
    "before the beginning": (lambda h: h[NORM].update(data_offsets=[-256, 0]), "data_offsets"),
    "overlap": (lambda h: h[NORM].update(data_offsets=[0, 256]), "overlaps"),
    "reversed": (lambda h: h[NORM].update(data_offsets=h[NORM]["data_offsets"][::-1]), "data_offsets"),
    "another shape": (lambda h: h[NORM].update(shape=[65]), "needs"),
    "shape that overflows": (lambda h: h[NORM].update(shape=[1 << 32, 1 << 32]), "needs"),
    "huge number": (lambda h: h[NORM].update(shape=[1 << 70]), "shape"),
    "negative shape": (lambda h: h[NORM].update(shape=[-8, -8]), "shape"),
    "boolean shape": (lambda h: h[NORM].update(shape=[True]), "shape"),
    "float shape": (lambda h: h[NORM].update(shape=[64.0]), "shape"),
    "too many dimensions": (lambda h: h[NORM].update(shape=[1] * 100), "shape"),
    "unknown dtype": (lambda h: h[NORM].update(dtype="F99"), "dtype"),
    "dtype that no runtime takes": (lambda h: h[NORM].update(dtype="I32"), "dtype"),
    "one more field": (lambda h: h[NORM].update(code="x"), "nothing else"),
    "no object": (lambda h: h.update({NORM: 7}), "nothing else"),
    "a hole": (lambda h: h.pop(NORM), "hole"),
    "metadata that is no object": (lambda h: h.update(__metadata__=[1]), "__metadata__"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_safetensors_headers(bundle: Path, name: str) -> None:
    change, word = ATTACKS[name]
    header = header_of(bundle / SHARD)
    change(header)
    write_header(bundle / SHARD, header)
    relist(bundle, SHARD)
    assert_refused(bundle, SHARD, word)


@pytest.mark.parametrize(
    ("raw", "length", "word"),
    [
        (b"{}", (1 << 64) - 1, "header of"),
        (b"{}", 101 << 20, "header of"),
        (b"[" * 100_000, None, "begin"),
        (b'{"a":' * 100_000, None, "offset 8"),
        (b'{"a": \xff}', None, "UTF-8"),
        (b'{"a": 1, "a": 2}', None, "twice"),
        (b'{"a": NaN}', None, "NaN"),
        (b"{} x", None, "JSON"),
    ],
)
def test_safetensors_headers_that_are_no_json(bundle: Path, raw: bytes, length: int | None, word: str) -> None:
    write_header(bundle / SHARD, raw, length=length)
    relist(bundle, SHARD)
    assert_refused(bundle, SHARD, word)


@pytest.mark.parametrize("raw", [b"", b"\x02", b"\x02" + bytes(7), b"\x02" + bytes(7) + b"{}" + b"x"])
def test_safetensors_files_that_are_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(BadArtifact, match=r"a\.safetensors"):
        read_header(tmp_path / "a.safetensors")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.binary(max_size=80), tail=st.binary(max_size=8), skew=st.integers(-2, 2))
def test_any_bytes_are_read_or_refused(tmp_path: Path, text: bytes, tail: bytes, skew: int) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(text) + skew)) + text + tail)
    with contextlib.suppress(BadArtifact):
        read_header(path)


SHAPES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 65), 1 << 65)
    | st.text(max_size=5)
    | st.sampled_from(["F32", "dtype", "shape"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tree=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), SHAPES, max_size=3))
def test_any_header_is_read_or_refused(tmp_path: Path, tree: Header) -> None:
    path = tmp_path / "fuzz.safetensors"
    text = json.dumps(tree).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with contextlib.suppress(BadArtifact):
        read_header(path)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [("tau", np.nan), ("tau", -1.0), ("score_scale", np.nan), ("score_scale", np.inf), ("score_scale", -0.5)],
)
def test_thresholds_that_are_no_numbers(bundle: Path, tensor: str, value: float) -> None:
    tensors = load_file(bundle / THRESHOLDS)
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor].flat[1] = value
    save_file(tensors, bundle / THRESHOLDS)
    relist(bundle, THRESHOLDS)
    assert_refused(bundle, THRESHOLDS, tensor, "offset")


@pytest.mark.parametrize(
    ("tensor", "shape"), [("tau", (2,)), ("score_scale", (3, 3)), ("score_scale", (4, 5)), ("extra", (1,))]
)
def test_thresholds_of_another_shape(bundle: Path, tensor: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(bundle / THRESHOLDS) | {tensor: np.zeros(shape, np.float32)}
    save_file(tensors, bundle / THRESHOLDS)
    relist(bundle, THRESHOLDS)
    assert_refused(bundle, THRESHOLDS, tensor)


def test_index_that_points_elsewhere(bundle: Path) -> None:
    path = bundle / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    tree["weight_map"][NORM] = "../other.safetensors"
    path.write_text(json.dumps(tree))
    relist(bundle, path.name)
    assert_verify_fails(bundle, NORM)
