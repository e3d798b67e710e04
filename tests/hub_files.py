"""A model's tensors as the hub's files have them: one function per layout, from a tensor in memory to those of the files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = Iterator[tuple[str, Tensor]]


def as_it_is(name: str, tensor: Tensor) -> Tensors:
    yield name, tensor


def one_by_one(name: str, tensor: Tensor, first: int = 0) -> Tensors:
    experts, _, part = name.rpartition(".")
    if not experts.endswith(".experts"):
        yield name, tensor
        return
    pieces = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
    for number, matrix in enumerate(tensor, first):
        for piece, rows in zip(pieces, matrix.chunk(len(pieces)), strict=True):
            yield f"{experts}.{number}.{piece}.weight", rows


def thinker_prefix(name: str, tensor: Tensor) -> Tensors:
    for key, value in one_by_one(name, tensor):
        yield "thinker." + re.sub(r"^model\.(?=audio_tower|visual)", "", key.replace("model.language_model.", "model.")), value


def shared_numbering(name: str, tensor: Tensor) -> Tensors:
    """Text experts come first, vision experts after them; routers stand the other way round; biases lie in one tensor."""
    name = name.replace("model.language_model.", "model.").replace("model.vision_tower.", "vision_model.")
    for old, new in (("fc1", "0"), ("fc2", "2"), ("ln", "3")):
        name = re.sub(rf"(spatial_linear|temporal_linear)\.{old}\.", rf"\1.{new}.", name)
    if name.startswith("vision_model."):
        yield name, tensor
    elif ".text_moe.gate.weight" in name:
        yield name.replace("text_moe.gate.weight", "gate.weight"), tensor.T
    elif ".vision_moe.gate.weight" in name:
        yield name.replace("vision_moe.gate.weight", "gate.weight_1"), tensor.T
    elif ".text_moe.gate.moe_statics" in name:
        yield name.replace("text_moe.gate.", ""), torch.cat([tensor, tensor.flip(-1)])
    elif ".vision_moe.gate.moe_statics" in name:
        return
    else:
        plain = name.replace("text_moe.", "").replace("vision_moe.", "")
        yield from one_by_one(plain, tensor, tensor.shape[0] if "vision_moe" in name else 0)


def first_and_second(name: str, tensor: Tensor) -> Tensors:
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    name = name.replace("mlp.experts.gate_up_proj", "mlp.experts.fc1.weight")
    yield name.replace("mlp.experts.down_proj", "mlp.experts.fc2.weight"), tensor


def write_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = list(tensors)
    cut = len(names) * 2 // 3  # in the middle of a layer
    places = {}
    for number, part in enumerate((names[:cut], names[cut:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file(
            {name: tensors[name].clone(memory_format=torch.contiguous_format) for name in part}, folder / file, {"format": "pt"}
        )
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
