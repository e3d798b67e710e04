"""Models that cannot be used: without MoE layers, without images, with experts of an unknown form, not models at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoints import PROCESSOR_FILES
from tests.cli.process import Commands, content

DATA = ("--data", "digits", "--samples", 2)
SENTENCES = [{"question": f"What is {n} and {n}?", "answer": str(n)} for n in range(12)]


@pytest.mark.parametrize("step", ["profile", "calibrate"])
def test_without_moe_layers(command: Commands, tiny_dense_checkpoint: Path, tmp_path: Path, step: str) -> None:
    ended = command(step, tiny_dense_checkpoint, *DATA, "--run", tmp_path / "run", "--json")
    ended.refused("bad_model", "`Qwen3VLForConditionalGeneration`", "`qwen3_vl`", "no MoE layers", hint="Mixture-of-Experts")
    assert content(tmp_path) == {}


def test_without_moe_layers_as_it_is_typed(command: Commands, tiny_dense_checkpoint: Path, tmp_path: Path) -> None:
    ended = command.cold("profile", tiny_dense_checkpoint, *DATA, "--run", tmp_path / "run", "--quiet")
    ended.refused("bad_model", "no MoE layers")
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 2
    assert content(tmp_path) == {}


@pytest.mark.parametrize("step", ["profile", "calibrate"])
def test_text_only(command: Commands, tiny_text_moe_checkpoint: Path, tmp_path: Path, step: str) -> None:
    ended = command(step, tiny_text_moe_checkpoint, *DATA, "--run", tmp_path / "run", "--json")
    ended.refused("bad_model", str(tiny_text_moe_checkpoint), "text-only", "`qwen3_moe`", hint="`--text-only`")
    assert content(tmp_path) == {}


def test_text_only_that_is_allowed(command: Commands, tiny_text_moe_checkpoint: Path, tmp_path: Path) -> None:
    """One modality, one threshold; the data has no images."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SENTENCES))
    data, run = ("--data", tmp_path / "text.jsonl", "--samples", 4, "--text-only"), ("--run", tmp_path / "run", "--json")

    profile = command("profile", tiny_text_moe_checkpoint, *data, *run).ok().json
    assert profile["tokens"]["vision"] == 0
    assert all(layer["update_angle"].keys() == {"text"} for layer in profile["layers"])

    importance = command("calibrate", tiny_text_moe_checkpoint, *data, *run).ok().json["importance"]
    assert sum(layer["text"] for layer in importance.values()) == pytest.approx(1)
    assert {layer["vision"] for layer in importance.values()} == {0}

    (found,) = command("search", "--target", 0.3, *run).ok().json["results"]
    assert found["tau"].keys() == {"text"}
    assert 0.3 <= found["skip_ratio"] <= 0.31
    thresholds = json.loads((tmp_path / "run" / "thresholds.json").read_text())
    assert thresholds["groups"] == ["text"]
    assert all(point["tau"].keys() == {"text"} for point in thresholds["results"][0]["frontier"])

    exported = command("export", "--format", "safetensors", *run).ok().json
    assert json.loads((Path(exported["bundle"]) / "bundle.json").read_text())["tau"] == found["tau"]
    evaluation = command("evaluate", "--max-new-tokens", 2, *data[:4], *run).ok().json
    assert evaluation["skip_ratio"].keys() == {"all", "text", "decode"}


def test_an_image_model_with_text_only_data(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps(SENTENCES[0]))
    ended = command("calibrate", tiny_checkpoint, "--data", tmp_path / "text.jsonl", "--samples", 1, "--run", tmp_path / "run")
    ended.refused("bad_data", "no image column", "`question`, `answer`", hint="`--image-column NAME`")


# -- experts of an unknown form ---------------------------------------------------------------------------------------


def save(model: Any, folder: Path, like: Path) -> Path:
    model.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        if (like / name).exists():
            shutil.copy(like / name, folder / name)
    return folder


def test_experts_that_take_other_inputs(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "kv_channels": 8, "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 512}
    config = transformers.JetMoeConfig(**sizes, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)
    checkpoint = save(transformers.JetMoeForCausalLM(config), tmp_path / "jetmoe", tiny_checkpoint)
    before = content(tmp_path)
    options = ("--text-only", "--family", "auto", *DATA, "--run", tmp_path / "run", "--json")
    ended = command("profile", checkpoint, *options)
    ended.refused("unknown_layout", "`JetMoeParallelExperts`", "weight (4, ", "gate_up_proj", hint="not supported")
    assert content(tmp_path) == before


MODELING = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

class ListConfig(Qwen3VLMoeConfig):
    model_type = "list_moe"

class ListForConditionalGeneration(Qwen3VLMoeForConditionalGeneration):
    config_class = ListConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.language_model.layers[1:]:
            layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(64, 32, bias=False) for _ in range(16))
"""


@pytest.fixture
def listed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with its own code, whose experts are modules in a list."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "listed"))
    config = json.loads((checkpoint / "config.json").read_text())
    names = {"AutoConfig": "ListConfig", "AutoModelForImageTextToText": "ListForConditionalGeneration"}
    config |= {"model_type": "list_moe", "auto_map": {auto: f"modeling_list.{name}" for auto, name in names.items()}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "modeling_list.py").write_text(MODELING)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        prefix = name.rsplit(".", 1)[0]
        del tensors[name]
        for expert in range(16):
            tensors[f"{prefix}.{expert}.weight"] = tensors["lm_head.weight"][:32, :64].clone()
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def test_experts_in_a_list(command: Commands, listed: Path, tmp_path: Path) -> None:
    options = ("--trust-remote-code", "--family", "auto", *DATA, "--run", tmp_path / "run", "--json")
    ended = command("calibrate", listed, *options, HF_HOME=str(tmp_path))
    ended.refused("unknown_layout", "`ModuleList`", "layers.1.mlp.experts", "(32, 64)", hint="not supported")
    assert not (tmp_path / "run").exists()


def test_code_of_a_checkpoint_is_not_run(command: Commands, listed: Path, tmp_path: Path) -> None:
    ended = command("calibrate", listed, *DATA, "--run", tmp_path / "run", "--json", HF_HOME=str(tmp_path))
    ended.refused("bad_model", str(listed), "`list_moe`", hint="`--trust-remote-code`")
    assert not list(tmp_path.rglob("ran"))


# -- not models -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_tensors(command: Commands, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name or "visual" in name}
    save_file(kept, checkpoint / "model.safetensors", {"format": "pt"})
    ended = command("profile", checkpoint, *DATA, "--run", tmp_path / "run", "--json")
    ended.refused("bad_model", "lacks", "language_model.layers.2.", hint="complete")


def make(folder: Path, kind: str, checkpoint: Path) -> str:
    folder.mkdir()
    if kind == "none":
        return str(folder / "none")
    if kind == "pickled":
        shutil.copy(checkpoint / "config.json", folder)
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    if kind == "unknown type":
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / "config.json").write_text('{"model_type": "of_next_year", "vision_config": {}}')
    return "" if kind == "nothing" else "not an/id" if kind == "no id" else str(folder)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", ["is no folder"]),
        ("nothing", ["``"]),
        ("empty", ["no config.json"]),
        ("pickled", ["no .safetensors weights"]),
        ("no id", ["`not an/id`", "neither a folder nor a model"]),
        ("unknown type", ["`of_next_year`"]),
    ],
)
def test_no_model(command: Commands, tiny_checkpoint: Path, tmp_path: Path, kind: str, words: list[str]) -> None:
    model = make(tmp_path / "it", kind, tiny_checkpoint)
    ended = command("calibrate", model, *DATA, "--run", tmp_path / "run", "--json")
    ended.refused("bad_model", *words)
    assert not (tmp_path / "run").exists()
