"""Weights: every source layout gives the model's own tensors, aligned, and transformers loads them."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import Tensor

from modes_cli.errors import BadModel, UnknownLayout
from modes_cli.export import weights
from modes_cli.export.plan import checkpoint_files
from modes_cli.safetensors_header import merged, read_header

E, I, H = 3, 8, 20  # noqa: E741
EXPERTS = "model.layers.1.mlp.experts"


def model(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(50, H, dtype=dtype),
        f"{EXPERTS}.gate_up_proj": torch.randn(E, 2 * I, H, dtype=dtype),
        f"{EXPERTS}.down_proj": torch.randn(E, H, I, dtype=dtype),
        "norm.weight": torch.randn(H, dtype=dtype),
        "odd.bias": torch.randn(3, dtype=dtype),
    }


def rewrite(
    folder: Path, source: dict[str, Tensor], wanted: dict[str, Tensor], dtype: str = "float32", limit: int = 1 << 30
) -> dict[str, Tensor]:
    """Through a file, the plan and the writer; what the safetensors library then reads."""
    folder.mkdir(exist_ok=True)
    save_file(source, folder / "source.safetensors")
    entries = merged([read_header(folder / "source.safetensors")])
    targets = weights.plan({name: tuple(t.shape) for name, t in wanted.items()}, entries, dtype)
    out = folder / "out"
    out.mkdir()
    weights.write_weights(out, targets, limit=limit)
    written = merged([read_header(path) for path in sorted(out.glob("*.safetensors"))])
    assert weights.places(out, targets, limit) == written
    found: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= load_file(path)
    assert found.keys() == wanted.keys()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_own_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = model(dtype)
    assert_same(rewrite(tmp_path, wanted, wanted, str(dtype).removeprefix("torch.")), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hub_layout_of_qwen3_vl_moe_is_transposed(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = model(dtype)
    source = {name: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for name, t in wanted.items()}
    assert_same(rewrite(tmp_path, source, wanted), wanted)


def test_one_by_one_layout(tmp_path: Path) -> None:
    wanted = model()
    source = {name: t for name, t in wanted.items() if t.dim() < 3}
    for expert in range(E):
        gate, up = wanted[f"{EXPERTS}.gate_up_proj"][expert].chunk(2)
        source[f"{EXPERTS}.{expert}.gate_proj.weight"] = gate.clone()
        source[f"{EXPERTS}.{expert}.up_proj.weight"] = up.clone()
        source[f"{EXPERTS}.{expert}.down_proj.weight"] = wanted[f"{EXPERTS}.down_proj"][expert].clone()
    assert_same(rewrite(tmp_path, source, wanted), wanted)


def test_narrowing_leaves_vectors_alone(tmp_path: Path) -> None:
    wanted = model()
    found = rewrite(tmp_path, wanted, wanted, "bfloat16")
    assert_same(found, {name: t.bfloat16() if t.dim() > 1 else t for name, t in wanted.items()})


def test_several_shards(tmp_path: Path) -> None:
    wanted = model()
    assert_same(rewrite(tmp_path, wanted, wanted, limit=3000), wanted)
    assert len(list((tmp_path / "out").glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"norm.weight": None}, "norm.weight"),
        ({"norm.weight": torch.zeros(H + 1)}, "norm.weight"),
        ({"embed.weight": torch.zeros(H, 50)}, "embed.weight"),  # only experts may be transposed
        ({f"{EXPERTS}.down_proj": torch.zeros(E + 1, H, I)}, "down_proj"),
        ({"norm.weight": torch.zeros(H, dtype=torch.int8)}, "norm.weight"),
    ],
)
def test_unknown_layouts_are_refused(tmp_path: Path, change: dict[str, Tensor | None], names: str) -> None:
    source = {name: t for name, t in (model() | change).items() if t is not None}
    with pytest.raises(UnknownLayout, match=names):
        rewrite(tmp_path, source, model())


def test_one_expert_too_many_is_refused(tmp_path: Path) -> None:
    source = {name: t for name, t in model().items() if t.dim() < 3}
    for expert in range(E + 1):
        source |= {f"{EXPERTS}.{expert}.{p}.weight": torch.zeros(I, H) for p in ("gate_proj", "up_proj")}
        source[f"{EXPERTS}.{expert}.down_proj.weight"] = torch.zeros(H, I)
    with pytest.raises(UnknownLayout, match="gate_up_proj"):
        rewrite(tmp_path, source, model())


@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "BF16"]), st.lists(st.integers(1, 70), min_size=1, max_size=3)),
        min_size=1,
        max_size=12,
    )
)
def test_order_alone_aligns_every_tensor(tensors: list[tuple[str, list[int]]]) -> None:
    targets = [weights.Target(str(i), dtype, tuple(shape), ()) for i, (dtype, shape) in enumerate(tensors)]
    for group in weights.shards(targets, 40_000):
        offset = len(weights.header_bytes(group, {"format": "pt"}))
        assert offset % 4096 == 0
        for target in group:
            assert offset % weights.alignment(target.bytes) == 0
            offset += target.bytes


def test_checkpoint_files_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / weights.INDEX).write_text('{"weight_map": {"a": "../other/model.safetensors"}}')
    with pytest.raises(BadModel, match="outside"):
        checkpoint_files(tmp_path)
    (tmp_path / weights.INDEX).write_text("[" * 100_000)
    with pytest.raises(BadModel, match="index"):
        checkpoint_files(tmp_path)
    (tmp_path / weights.INDEX).unlink()
    with pytest.raises(BadModel, match="does not exist"):
        checkpoint_files(tmp_path)
