"""Where a model's weights are: on one device, spread over several, or read layer by layer while it runs."""

import importlib.util
from typing import Any

import torch
from transformers import PreTrainedModel

from modes_cli.errors import BadModel, BadOption
from modes_cli.ranks import place
from modes_cli.requests import ModelSpec


def check_placement(spec: ModelSpec) -> None:
    """Before anything is read.

    Raises:
        BadOption: options that contradict each other, or weights are to be spread and accelerate is not installed.
    """
    if spec.device_map is None:
        return
    if spec.offload:
        raise BadOption(
            f"`--device-map {spec.device_map}` and `--offload` exclude each other",
            hint="`--device-map` if all devices together hold the weights, else `--offload`",
        )
    if spec.device == "cpu":
        raise BadOption(f"`--device-map {spec.device_map}` spreads weights over GPUs, not with `--device cpu`")
    if (world := place().world) > 1:
        raise BadOption(
            f"`--device-map {spec.device_map}` spreads weights over all GPUs, which `{world}` processes cannot share",
            hint="start one process, or leave `--device-map` out: each process then has a GPU of its own",
        )
    if importlib.util.find_spec("accelerate") is None:
        raise BadOption(f"`--device-map {spec.device_map}` needs the package `accelerate`", hint="pip install accelerate")


def first_device(model: PreTrainedModel) -> torch.device:
    """Where a model that was spread over devices takes its inputs.

    Raises:
        BadModel: a part of it fits on no device and not into memory either.
    """
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if left := sorted(name for name, place in places.items() if place == "disk"):
        raise BadModel(
            f"`{len(left)}` parts of the model, among them `{left[0]}`, fit on no device",
            hint="`--offload` reads each layer when it runs; `modes profile MODEL --plan` says what fits",
        )
    embedding: Any = model.get_input_embeddings()
    device = torch.device(embedding.weight.device)
    if device.type == "meta":  # kept in memory, moved to a device when it runs
        device = torch.device(next((f"cuda:{place}" for place in places.values() if isinstance(place, int)), "cpu"))
    return device
