"""What fuzzing found, each by its smallest example: refused by name, where an exception of a library came out before."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save_file

from modes_cli.data.archives import Archives
from modes_cli.data.images import Unusable
from modes_cli.data.local import open_samples
from modes_cli.data.sample import DataSpec
from modes_cli.data.tables import Parquet
from modes_cli.errors import LONGEST_ERROR, BadArtifact, BadData, BadModel, ModesError
from modes_cli.export.onnx_checks import check_graph
from modes_cli.models.checkpoint import INDEX, checkpoint_files
from modes_cli.models.loading import describe
from modes_cli.requests import ModelSpec
from modes_cli.runtime import interface
from modes_cli.safetensors_header import read_header
from tests.kernels import calling
from tests.kernels.quantised import random_quantised


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_an_index_of_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadModel, match="does not exist"):
        checkpoint_files(tmp_path)


def test_an_index_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"\xff")
    with pytest.raises(ModesError, match="index"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    "header", [r'{"a\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', r'{"__metadata__": {"a": "\udc00"}}']
)
def test_a_header_with_half_a_character(tmp_path: Path, header: str) -> None:
    """The safetensors library refuses it; nothing that it refuses may pass."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(BadArtifact, match="half a character"):
        read_header(path)


def graph(path: Path) -> onnx.ModelProto:
    """One node that copies `x`, and one tensor by reference."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    node = onnx.helper.make_node("Identity", ["x"], ["y"], name="copy")
    made = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    tensor = made.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": "w.safetensors", "offset": "8", "length": "4"}.items():
        tensor.external_data.add(key=key, value=value)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)])


def assert_graph_refused(path: Path, raw: bytes, word: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(BadArtifact, match=word):
        check_graph(path, {})


def test_a_location_that_is_not_utf8(tmp_path: Path) -> None:
    raw = graph(tmp_path).SerializeToString().replace(b"w.safetensors", b"\xff" * 13)
    assert_graph_refused(tmp_path / "a.onnx", raw, "UTF-8")


def test_a_location_that_is_there_twice(tmp_path: Path) -> None:
    """A reader that takes the first one opens another file than the one that was checked."""
    model = graph(tmp_path)
    model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    assert_graph_refused(tmp_path / "a.onnx", model.SerializeToString(), "twice")


def test_a_node_that_is_not_valid_and_whose_name_is_not_utf8(tmp_path: Path) -> None:
    model = graph(tmp_path)
    del model.graph.initializer[:]
    model.graph.node[0].input[0] = "missing"
    raw = model.SerializeToString().replace(b"copy", b"c\xffpy").replace(b"missing", b"miss\xffng")
    assert_graph_refused(tmp_path / "a.onnx", raw, "UTF-8|graph")


def archive(folder: Path, raw: bytes) -> Archives:
    (folder / "part.zip").write_bytes(raw)
    return Archives(LocalFileSystem(), str(folder), ".mp4")


def zipped(method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        made.writestr("one.mp4", b"abcd" * 64)
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_in_methods_that_may_ask_for_gigabytes(tmp_path: Path, method: int) -> None:
    with pytest.raises(Unusable, match=rf"method {method}"), archive(tmp_path, zipped(method)).open("one.mp4"):
        pass


def test_a_member_that_begins_before_the_archive(tmp_path: Path) -> None:
    """The end record says that the list of members is longer to the left than it is: every place moves before the start."""
    raw = bytearray(zipped())
    at = raw.rindex(b"PK\x05\x06")
    (offset,) = struct.unpack_from("<L", raw, at + 16)
    struct.pack_into("<L", raw, at + 16, offset + 40)
    with pytest.raises(Unusable, match="begins outside"), archive(tmp_path, bytes(raw)).open("one.mp4"):
        pass


def test_other_failures_of_the_file_system_are_not_the_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = archive(tmp_path, zipped())

    def lost(*_: object, **__: object) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(zipfile.ZipFile, "open", lost)
    with pytest.raises(ConnectionResetError), made.open("one.mp4"):
        pass


@pytest.mark.parametrize("block", [1 << 31, 1 << 40, (1 << 63) - 32])
def test_a_block_that_overflows(block: int) -> None:
    """Blocks of a row are counted by sums with it; the sanitizer saw one overflow."""
    case, _ = random_quantised("int8")
    assert case.gate_up_scales is not None
    assert case.down_scales is not None
    kinds = {"weight_dtype": interface.QUANTISED[case.gate_up.dtype], "block": block}
    scales = {"gate_up_scales": case.gate_up_scales.data_ptr(), "down_scales": case.down_scales.data_ptr()}
    plain = case.but(gate_up=case.gate_up.view(torch.int8).float())  # `arguments` knows the dtypes of floats alone
    args = calling.arguments(plain, torch.empty_like(case.x), gate_up=case.gate_up.data_ptr(), **kinds, **scales)
    assert calling.call(args) == (calling.MODES_BAD_ARGUMENT, f"block is `{block}`, must be a multiple of 32 below 2^31")


def parquet_that_claims(path: Path, below_zero: bool) -> None:
    """12,345 rows, of which the row group's own count may be made -12,345: as zigzag varints they differ in one bit."""
    pq.write_table(pa.table({"question": ["?"] * 12_345, "answer": ["!"] * 12_345}), path)
    raw = bytearray(path.read_bytes())
    if below_zero:
        raw[raw.rindex(b"\xf2\xc0\x01")] = 0xF1  # after the columns' counts and the file's
    path.write_bytes(raw)


def test_a_row_group_with_fewer_rows_than_none(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    parquet_that_claims(path, below_zero=False)
    assert len(Parquet(path)) == 12_345
    parquet_that_claims(path, below_zero=True)
    with pytest.raises(BadData, match="a row group has -12345 rows"):
        open_samples(DataSpec(str(path), None, None), text_only=True)


def test_more_rows_than_can_be_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.parquet"
    parquet_that_claims(path, below_zero=False)
    monkeypatch.setattr("modes_cli.data.tables.MAX_ROWS", 12_344)
    with pytest.raises(BadData, match="it has 12345 rows, the limit is 12344"):
        open_samples(DataSpec(str(path), None, 64), text_only=True)


def test_a_tree_where_a_name_is_wanted(tmp_path: Path) -> None:
    """The message has the value, and not the whole of it: 240,000 characters came out."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": [["x" * 200_000], "the end"]}))
    with pytest.raises(BadModel, match=r"(?s)cannot read model type `\[\['xxxx.* \[\.\.\] .*'the end'\]`: ") as refused:
        describe(ModelSpec(str(tmp_path), device="cpu"))
    assert len(str(refused.value)) == LONGEST_ERROR
