"""Bundles that are truncated, altered or hostile. Each is refused by name and place, before anything of it runs.

An attacker may rewrite bundle.json as well, so most attacks here list the changed file with its new size and digest.
"""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from modes_cli.errors import BadArtifact
from modes_cli.export.integrity import check_for_loading
from modes_cli.export.safetensors_header import read_header
from modes_cli.export.verify import verify_bundle
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.session import session
from tests.export.bundles import relist, shared_bundle

SHARD = "model-00001-of-00001.safetensors"
THRESHOLDS = "thresholds.safetensors"


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shared_bundle(tmp_path_factory.getbasetemp()), tmp_path / "bundle"))


def assert_refused(bundle: Path, *words: str) -> None:
    """By loading and by verify, in the same words."""
    with pytest.raises(BadArtifact) as caught:
        check_for_loading(bundle)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(BadArtifact):
        session(bundle)
    assert_verify_fails(bundle, *words)


def assert_verify_fails(bundle: Path, *words: str) -> None:
    failed = [check for check in verify_bundle(bundle) if not check.ok]
    assert failed
    assert any(all(word in check.detail for word in words) for check in failed), failed
    assert not any(check.name == "session" for check in failed)  # it was never tried


def write_header(path: Path, header: Any, *, length: int | None = None, data: bytes | None = None) -> None:
    raw = path.read_bytes()
    old = struct.unpack("<Q", raw[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + (raw[8 + old :] if data is None else data)
    )


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    tree: dict[str, Any] = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return tree


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, THRESHOLDS, "decoder.onnx", "config.json", "libmodes_cpu.so"])
def test_truncated(bundle: Path, name: str) -> None:
    path = bundle / name
    os.truncate(path, path.stat().st_size - 1)
    assert_refused(bundle, name, "size")


@pytest.mark.parametrize("name", [THRESHOLDS, "decoder.onnx", "vision.onnx", "tokenizer.json", "libmodes_cpu.so"])
def test_one_bit_altered(bundle: Path, name: str) -> None:
    """Of everything but the weights, loading compares digests."""
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    assert_refused(bundle, name, "SHA-256")


def test_one_bit_of_the_weights_altered(bundle: Path) -> None:
    with (bundle / SHARD).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x55")
    assert_verify_fails(bundle, SHARD, "SHA-256")


@pytest.mark.parametrize("name", [SHARD, "decoder.onnx", "bundle.json"])
def test_missing(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert_refused(bundle, name, "missing")


def test_swapped_kernel_library(bundle: Path) -> None:
    (bundle / "libmodes_cpu.so").write_bytes(b"\x7fELF" + bytes(1000))
    assert_refused(bundle, "libmodes_cpu.so")


def test_swapped_kernel_library_that_is_listed_never_runs(bundle: Path) -> None:
    """Where the package has its own library, the code that comes with a bundle is not used at all."""
    (bundle / "libmodes_cpu.so").write_bytes(b"\x7fELF" + bytes(1000))
    relist(bundle, "libmodes_cpu.so")
    assert session(bundle) is not None
    kernels = next(check for check in verify_bundle(bundle) if check.name == "kernels")
    assert "instead of the bundle's" in kernels.detail


@pytest.mark.parametrize("name", ["extra.py", "onnx/extra.bin", ".hidden"])
def test_extra_file(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("import os")
    assert_verify_fails(bundle, Path(name).parts[0], "not listed")


def test_symlinks(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes((bundle / "tokenizer.json").read_bytes())
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    assert_refused(bundle, "tokenizer.json", "link")


def test_linked_bundle_json(bundle: Path, tmp_path: Path) -> None:
    (bundle / "bundle.json").rename(tmp_path / "elsewhere.json")
    (bundle / "bundle.json").symlink_to(tmp_path / "elsewhere.json")
    assert_refused(bundle, "bundle.json", "link")


def test_fifo_does_not_block(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    os.mkfifo(bundle / "vision.onnx")
    assert_refused(bundle, "vision.onnx", "regular")


# -- bundle.json ----------------------------------------------------------------------------------------------------


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads((bundle / "bundle.json").read_text())
    change(tree)
    (bundle / "bundle.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "..", "", "a//b", "C:\\x", "a\n", ".hidden", "a/./b"]
)
def test_paths_out_of_the_folder(bundle: Path, path: str) -> None:
    edit(bundle, lambda tree: tree["files"][0].update(path=path))
    assert_refused(bundle, "bundle.json", "path")


@pytest.mark.parametrize("value", [-0.1, "NaN", 1e400])
def test_thresholds_in_bundle_json(bundle: Path, value: object) -> None:
    edit(bundle, lambda tree: tree["tau"].update(text=value))
    assert_refused(bundle, "bundle.json")


def test_other_thresholds_in_bundle_json(bundle: Path) -> None:
    edit(bundle, lambda tree: tree["tau"].update(text=0.5))
    assert_refused(bundle, THRESHOLDS, "`tau`")


def test_special_tokens_are_never_skipped(bundle: Path) -> None:
    edit(bundle, lambda tree: tree["tau"].update(special=0.5))
    header = header_of(bundle / THRESHOLDS)
    tensors = load_file(bundle / THRESHOLDS)
    tensors["tau"][-1] = 0.5
    save_file(tensors, bundle / THRESHOLDS, header["__metadata__"])
    relist(bundle, THRESHOLDS)
    assert_refused(bundle, "tau", "special")


def test_decode_has_the_threshold_of_text_unless_it_is_named(bundle: Path) -> None:
    edit(bundle, lambda tree: tree["tau"].update(decode=tree["tau"]["text"] / 2))
    assert_refused(bundle, THRESHOLDS, "`tau`")


def test_groups_in_another_order(bundle: Path) -> None:
    edit(bundle, lambda tree: tree["groups"].reverse())
    assert_refused(bundle, "bundle.json", "groups")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 200_000, '{"a": NaN}', "null", '{"schema_version": 1}', '{"files": ' + "9" * 5000 + "}"]
)
def test_bundle_json_that_is_none(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    assert_refused(bundle, "bundle.json")


def test_unlisted_parts(bundle: Path) -> None:
    edit(bundle, lambda tree: tree.update(files=[file for file in tree["files"] if file["path"] != THRESHOLDS]))
    assert_refused(bundle, "files", THRESHOLDS)


# -- safetensors ----------------------------------------------------------------------------------------------------

Header = dict[str, Any]
NAME = "model.language_model.norm.weight"


def first(header: Header) -> Header:
    entry: Header = min((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"][0])
    return entry


ATTACKS: dict[str, tuple[Callable[[Header], object], str]] = {
    "past the end": (lambda h: h[NAME].update(data_offsets=[1 << 40, (1 << 40) + 256]), "past the end"),
    "before the beginning": (lambda h: h[NAME].update(data_offsets=[-256, 0]), "data_offsets"),
    "overlap": (lambda h: h[NAME].update(data_offsets=[0, 256]), "overlaps"),
    "reversed": (lambda h: h[NAME].update(data_offsets=h[NAME]["data_offsets"][::-1]), "data_offsets"),
    "another shape": (lambda h: h[NAME].update(shape=[65]), "needs"),
    "shape that overflows": (lambda h: h[NAME].update(shape=[1 << 32, 1 << 32]), "needs"),
    "huge number": (lambda h: h[NAME].update(shape=[1 << 70]), "shape"),
    "negative shape": (lambda h: h[NAME].update(shape=[-8, -8]), "shape"),
    "boolean shape": (lambda h: h[NAME].update(shape=[True]), "shape"),
    "float shape": (lambda h: h[NAME].update(shape=[64.0]), "shape"),
    "too many dimensions": (lambda h: h[NAME].update(shape=[1] * 100), "shape"),
    "unknown dtype": (lambda h: h[NAME].update(dtype="F99"), "dtype"),
    "dtype that no runtime takes": (lambda h: h[NAME].update(dtype="I32"), "dtype"),
    "one more field": (lambda h: h[NAME].update(code="x"), "nothing else"),
    "no object": (lambda h: h.update({NAME: 7}), "nothing else"),
    "a hole": (lambda h: h.pop(NAME), "hole"),
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
    tree["weight_map"][NAME] = "../other.safetensors"
    path.write_text(json.dumps(tree))
    relist(bundle, path.name)
    assert_verify_fails(bundle, NAME)


# -- graphs ---------------------------------------------------------------------------------------------------------


def external(model: onnx.ModelProto, **fields: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == NAME)
    for entry in tensor.external_data:
        entry.value = fields.get(entry.key, entry.value)


def big(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1 << 19, np.float32), "big"))


def foreign_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Run", ["logits"], ["x"], domain="evil"))


def other_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("SkipEverything", ["logits"], ["x"], domain="modes"))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(
        onnx.helper.make_function("modes", "SkipExperts", ["a"], ["b"], [], [onnx.helper.make_opsetid("", 23)])
    )


def external_constant(model: onnx.ModelProto) -> None:
    """Not an initializer: hidden in an attribute, where a careless check does not look."""
    tensor = onnx.TensorProto(
        name="hidden", dims=[1], data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="../../etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "parent folder": (lambda m: external(m, location="../" + SHARD), "outside"),
    "absolute path": (lambda m: external(m, location="/etc/passwd"), "outside"),
    "a file that holds no weights": (lambda m: external(m, location="tokenizer.json"), "no tensor"),
    "offset past the end": (lambda m: external(m, offset=str(1 << 50)), "no tensor"),
    "negative offset": (lambda m: external(m, offset="-1"), "no tensor"),
    "another length": (lambda m: external(m, length="1"), "no tensor"),
    "another tensor": (lambda m: external(m, offset="4096", length=str(16 * 64 * 64 * 4)), "decoder"),
    "foreign operator": (foreign_node, "evil"),
    "another operator of ours": (other_operator, "SkipEverything"),
    "foreign opset": (lambda m: m.opset_import.append(onnx.helper.make_opsetid("evil", 1)), "evil"),
    "function": (function, "SkipExperts"),
    "weights inside": (big, "big"),
    "external attribute": (external_constant, "hidden"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(bundle: Path, name: str) -> None:
    change, word = GRAPHS[name]
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    change(model)
    (bundle / "decoder.onnx").write_bytes(model.SerializeToString())
    relist(bundle, "decoder.onnx")
    assert_verify_fails(bundle, "decoder.onnx", word)
    with pytest.raises(BadArtifact, match=word):
        session(bundle)


@pytest.mark.parametrize("raw", [b"", b"\xff" * 1000, b"not a graph"])
def test_graphs_that_are_none(bundle: Path, raw: bytes) -> None:
    (bundle / "decoder.onnx").write_bytes(raw)
    relist(bundle, "decoder.onnx")
    assert_verify_fails(bundle, "decoder.onnx")
    with pytest.raises(BadArtifact, match="decoder"):
        OrtModel(bundle)
