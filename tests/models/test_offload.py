"""A model whose decoder layers are read when they run gives the bits of one that is in memory whole, in less memory."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import dispatch_model
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modes_cli import app
from modes_cli.calibration import calibrate
from modes_cli.calibration.replay import Replay, answer_logits
from modes_cli.data.sample import Sample
from modes_cli.errors import BadArtifact, BadModel, BadOption
from modes_cli.models.inputs import measuring_batch
from modes_cli.models.loading import Loaded, load
from modes_cli.requests import ModelSpec
from modes_cli.runtime.torch_model import open_model
from modes_cli.search import find_thresholds
from modes_cli.skipping.engine import SkipEngine
from tests.checkpoints import _moe, _multimodal, _text
from tests.families import spread
from tests.runs import calibration_request, content, search_request
from tests.sparse_checkpoint import write_sparse

GB = 10**9


def hub_checkpoint(folder: Path) -> Path:
    """As the tiny checkpoint, in the hub's layout: transposed experts, in several shards."""
    config = transformers.Qwen3VLMoeConfig(**_multimodal({**_text(), **_moe()}))
    model = spread(transformers.Qwen3VLMoeForConditionalGeneration(config))
    tensors = {name: t.numpy() for name, t in model.state_dict().items()}

    def values(name: str, _shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.ascontiguousarray(tensors[name].swapaxes(1, 2)) if ".experts." in name else tensors[name]

    return write_sparse(folder, config, values, dtype="F32", shard=300_000)


def one_by_one_checkpoint(folder: Path, tiny_text: Path) -> Path:
    """The text-only tiny checkpoint with one tensor for each expert's gate, up and down, as the hub's files are."""
    folder.mkdir()
    for path in tiny_text.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for name, tensor in load_file(tiny_text / "model.safetensors").items():
        experts, _, part = name.rpartition(".")
        if part not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
            tensors[name] = tensor
            continue
        for number, one in enumerate(tensor):
            matrices = dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True)) if part != "down_proj" else {part: one}
            tensors |= {f"{experts}.{number}.{kind}.weight": m.contiguous() for kind, m in matrices.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return hub_checkpoint(tmp_path_factory.mktemp("hub") / "checkpoint")


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory, tiny_text_moe_checkpoint: Path) -> Path:
    return one_by_one_checkpoint(tmp_path_factory.mktemp("one-by-one") / "checkpoint", tiny_text_moe_checkpoint)


@pytest.fixture
def offloaded(hub: Path) -> Loaded:
    return load(ModelSpec(str(hub), device="cpu", offload=True))


def layers_of(loaded: Loaded) -> nn.Module:
    return loaded.model.get_submodule(loaded.blocks[0].name.split(".layers.")[0] + ".layers")


def in_memory(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.is_meta]


@pytest.mark.parametrize(
    ("layout", "dtype"), [("hub", "float32"), ("hub", "bfloat16"), ("one_by_one", "bfloat16"), ("tiny_checkpoint", "float32")]
)
def test_calibrate_and_search_give_the_same_bytes(
    layout: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint, text_only = request.getfixturevalue(layout), layout == "one_by_one"
    for offload in (False, True):
        run = tmp_path / f"{offload}"
        asked = calibration_request(checkpoint, run, samples=4, text_only=text_only)
        spec = dataclasses.replace(asked.model, offload=offload, dtype=dtype)
        calibrate(dataclasses.replace(asked, model=spec))
        find_thresholds(search_request(run, 0.4, policy="modes", passes=4, offload=offload))
    whole, streamed = content(tmp_path / "False"), content(tmp_path / "True")
    assert set(whole) >= {"calibration.json", "calibration.safetensors", "thresholds.json"}
    assert streamed == whole
    assert json.loads(whole["thresholds.json"])["results"][0]["skip_ratio"] > 0.4


def test_answers_are_the_same(hub: Path, tmp_path: Path, small_samples: Callable[..., list[Sample]]) -> None:
    asked = calibration_request(hub, tmp_path, samples=4)
    calibrate(asked)
    find_thresholds(search_request(tmp_path, 0.5, policy="modes", passes=4))
    found = []
    for offload in (False, True):
        runtime = open_model(dataclasses.replace(asked.model, offload=offload), tmp_path)
        found += [[runtime.answer(small_samples(3), 4, rule) for rule in (None, runtime.rule)]]
        assert runtime.loaded.model.generation_config.eos_token_id is not None
        found[-1] += [[(one.name, one.reason) for one in runtime.engine.implementations]]
        runtime.engine.remove()
    for whole, streamed in zip(found[0][:2], found[1][:2], strict=True):
        assert streamed.tokens == whole.tokens
        assert torch.equal(streamed.counts.kept, whole.counts.kept)
    assert found[0][1].counts.kept.sum() < found[0][1].counts.total.sum()
    assert found[0][2] == found[1][2]  # computed by the same: weights that come anew are no reason to leave the operator


def test_layers_are_in_memory_one_at_a_time(offloaded: Loaded, small_samples: Callable[..., list[Sample]]) -> None:
    layers = list(layers_of(offloaded).children())
    seen: list[list[int]] = []

    def look(*_: object) -> None:
        seen.append([number for number, layer in enumerate(layers) if in_memory(layer)])

    for layer in layers:
        layer.self_attn.register_forward_hook(look)
    batch = measuring_batch(offloaded, small_samples(2))
    answer_logits(offloaded.model, batch)
    assert seen == [[number] for number in range(len(layers))]
    with Replay(offloaded.model, offloaded.blocks) as replay:  # a layer that is not run is not read
        replay.record(batch)
        seen.clear()
        replay.run(batch, 2)
        assert seen == [[2], [3]]
    seen.clear()
    answer_logits(offloaded.model, batch)  # the replay gave back what reads them
    assert len(seen) == len(layers)
    assert in_memory(layers_of(offloaded)) == []
    outside = set(in_memory(offloaded.model))
    assert {"lm_head.weight", "model.visual.pos_embed.weight", "model.language_model.embed_tokens.weight"} <= outside


def test_an_error_inside_a_layer_frees_it(offloaded: Loaded, small_samples: Callable[..., list[Sample]]) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    layers_of(offloaded).get_submodule("1.self_attn").register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        answer_logits(offloaded.model, measuring_batch(offloaded, small_samples(1)))
    assert in_memory(layers_of(offloaded)) == []


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_a_tensor_is_refused_at_once(tmp_path: Path) -> None:
    folder = hub_checkpoint(tmp_path / "hub")
    name = "model.language_model.layers.3.mlp.experts.down_proj"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)

    rewrite(folder, drop)
    with pytest.raises(BadModel, match=r"lacks `1` of the tensors .*layers\.3\.mlp\.experts\.down_proj"):
        load(ModelSpec(str(folder), device="cpu", offload=True))


def test_weights_of_another_shape_are_refused_at_once(tmp_path: Path) -> None:
    folder = hub_checkpoint(tmp_path / "hub")
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:8].clone()}) if name in tensors else None)
    with pytest.raises(BadModel, match="cannot be loaded"):
        load(ModelSpec(str(folder), device="cpu", offload=True))


def test_a_file_that_is_damaged_later_is_named(tmp_path: Path, small_samples: Callable[..., list[Sample]]) -> None:
    folder = hub_checkpoint(tmp_path / "hub")
    loaded = load(ModelSpec(str(folder), device="cpu", offload=True))
    for path in folder.glob("*.safetensors"):
        if any("layers.1." in name for name in safe_open(path, "pt").keys()):  # noqa: SIM118
            content = path.read_bytes()
            path.unlink()  # what is mapped stays
            path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadArtifact, match=r"model-0000\d-of"):
        answer_logits(loaded.model, measuring_batch(loaded, small_samples(1)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"offload": True, "device_map": "auto"}, "exclude each other"),
        ({"device": "cpu", "device_map": "auto"}, "--device cpu"),
    ],
)
def test_options_that_contradict_each_other(hub: Path, spec: dict[str, object], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        load(dataclasses.replace(ModelSpec(str(hub)), **spec))


def test_a_bundle_is_not_offloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["evaluate", "--bundle", str(tmp_path), "--offload"]) == 1
    assert "`--offload` and `--device-map` are for the run's model" in capsys.readouterr().err


def test_processes_cannot_spread_weights_over_the_same_gpus(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(BadOption, match="`2` processes"):
        load(ModelSpec(str(hub), device_map="auto"))


def test_quantized_weights_are_refused(hub: Path, tmp_path: Path) -> None:
    folder = hub_checkpoint(tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(BadModel, match="quantized"):
        load(ModelSpec(str(folder), device="cpu", offload=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would go to the GPU")
def test_a_device_map_where_there_is_no_gpu(hub: Path, small_samples: Callable[..., list[Sample]]) -> None:
    spread_out, whole = (load(ModelSpec(str(hub), device_map=how)) for how in ("auto", None))
    assert spread_out.device == torch.device("cpu")
    batch = measuring_batch(whole, small_samples(2))
    assert torch.equal(answer_logits(spread_out.model, batch), answer_logits(whole.model, batch))


def test_a_replay_leaves_the_hooks_of_a_device_map(hub: Path, small_samples: Callable[..., list[Sample]]) -> None:
    """accelerate moves inputs and weights in a `forward` of each instance, as if the layers were on two devices."""
    loaded, whole = load(ModelSpec(str(hub), device="cpu")), load(ModelSpec(str(hub), device="cpu"))
    path = loaded.blocks[0].name.split(".layers.")[0] + ".layers"
    names = ["model.visual", "model.language_model.embed_tokens", "model.language_model.norm", "lm_head"]
    names += ["model.language_model.rotary_emb", *(f"{path}.{i}" for i in range(4))]
    dispatch_model(loaded.model, dict.fromkeys(names, "cpu"), force_hooks=True)
    hooked = [name for name, module in loaded.model.named_modules() if "forward" in module.__dict__]
    assert set(names) <= set(hooked)
    batch = measuring_batch(whole, small_samples(2))
    engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
    with Replay(loaded.model, loaded.blocks) as replay:
        assert torch.equal(replay.record(batch), answer_logits(whole.model, batch))
        assert torch.equal(replay.run(batch, 2), answer_logits(whole.model, batch))
    engine.remove()
    assert [name for name, module in loaded.model.named_modules() if "forward" in module.__dict__] == hooked


# -- memory ---------------------------------------------------------------------------------------------------------------

LAYERS, DENSE = 12, 10


def heavy_checkpoint(folder: Path) -> tuple[Path, int]:
    """12 layers of 150 MB, the last two with experts; and its size. Weights are zeros but for norms, routers and experts."""
    text = {
        **_text(), **_moe(), "num_hidden_layers": LAYERS, "hidden_size": 512, "intermediate_size": 26_000,
        "moe_intermediate_size": 1632, "num_experts": 16, "mlp_only_layers": list(range(DENSE)),
    }  # fmt: skip
    sizes = _multimodal(text)
    sizes["vision_config"]["out_hidden_size"] = 512
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) / 20

    def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if "norm" in name:
            return np.ones(shape, np.float32)
        return None if ".mlp." in name and ".experts." not in name and ".gate." not in name else np.resize(block, shape)

    write_sparse(folder, transformers.Qwen3VLMoeConfig(**sizes), values, dtype="F32", shard=400 << 20)
    return folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


CALIBRATE = """
import json, resource, sys
from pathlib import Path
import modes_cli.calibration, modes_cli.models.offload, transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe
from modes_cli.data.sample import DataSpec
from modes_cli.requests import CalibrateRequest, ModelSpec
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model, run, before = ModelSpec(sys.argv[1], device="cpu", offload=True), Path(sys.argv[2]), peak()
modes_cli.calibration.calibrate(CalibrateRequest(model, DataSpec("digits", None, 1, 0), run, 1))
print(json.dumps([before, peak()]))
"""


def peaks(checkpoint: Path, run: Path) -> tuple[int, int]:
    """The most memory a process has held before and after it calibrates, as the kernel counts it: mapped pages too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CALIBRATE, str(checkpoint), str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


def test_calibrate_holds_a_layer_and_not_the_model(tmp_path: Path) -> None:
    checkpoint, size = heavy_checkpoint(tmp_path / "heavy")
    assert size > 1.8 * GB  # more than is allowed below: a model in memory whole would fail
    before, after = peaks(checkpoint, tmp_path / "run")
    assert after - before < size / 3 + GB
    assert after - before < 4 * size / LAYERS  # the pages of a layer's files and what is made of them, and some room
