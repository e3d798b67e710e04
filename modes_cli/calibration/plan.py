"""What a calibration will need in memory and in passes, worked out before a weight is read: `modes profile MODEL --plan`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modes_cli.calibration.calibrate import COLUMNS
from modes_cli.calibration.contributions import obstacles
from modes_cli.errors import BadModel
from modes_cli.models.loading import DTYPES, describe
from modes_cli.models.router import find_router
from modes_cli.models.structure import Structure, read_structure
from modes_cli.requests import ModelSpec

# Of one sample, where the data is not looked at: an image of a megapixel with its question, and a short answer.
TOKENS, ANSWER_TOKENS = 1000, 3
GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Weights:
    """Bytes in memory, in the dtype asked for. `layers`: of each decoder layer; the parts add up to `total`."""

    total: int
    experts: int
    embedding: int
    vision: int
    head: int
    other: int
    layers: tuple[int, ...]

    @property
    def resident(self) -> int:
        """What stays in memory with `--offload`."""
        return self.total - sum(self.layers)


@dataclass(frozen=True)
class Placement:
    """Bytes on the fullest device, and in the host's memory: weights, and with `working` what a batch needs beside them."""

    name: str  # one device | N devices | offload
    option: str
    weights: int
    working: int

    @property
    def needed(self) -> int:
        return self.weights + self.working


@dataclass(frozen=True)
class Plan:
    """Attributes:
    forward_equivalents, naive_forwards: per batch, as calibrate reports them.
    layer_runs: how often each decoder layer runs for one batch.
    offload_read: bytes that `--offload` reads from the files for the whole calibration.
    reference: bytes of the reference distributions, in the host's memory and in calibration.safetensors.
    """

    model: str
    family: str
    dtype: str
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    parameters: int
    weights: Weights
    placements: tuple[Placement, ...]
    samples: int
    batch_size: int
    batches: int
    forward_equivalents: float
    naive_forwards: int
    layer_runs: tuple[int, ...]
    offload_read: int
    reference: int
    memory: int  # of this machine
    gpus: tuple[int, ...]  # bytes of each


def make_plan(spec: ModelSpec, samples: int, batch_size: int) -> Plan:
    """Raises BadModel, UnknownLayout: the checkpoint cannot be found, is incomplete, or is not understood."""
    folder, info, config = describe(spec)
    dtype = DTYPES[info.dtype]
    structure = read_structure(folder, config, dtype, text_only=spec.text_only, trust_remote_code=spec.trust_remote_code)
    _require_complete(spec, structure)
    weights = _weights(structure)
    layers, moe = len(weights.layers), [block.layer for block in structure.blocks]
    looked_at, derived = _looked_at(structure)
    runs = tuple(1 + len(COLUMNS) * sum(start <= layer for start in moe) + 2 * derived for layer in range(layers))
    batches = -(-samples // batch_size)
    read = [0] * layers
    for name, place in structure.place.items():
        if (number := structure.layer_of(place)) is not None:
            read[number] += structure.source[name].length
    embedding: Any = structure.model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    return Plan(
        model=spec.id,
        family=config.model_type,
        dtype=info.dtype,
        moe_layers=tuple(moe),
        experts=structure.blocks[0].num_experts,
        top_k=structure.blocks[0].top_k,
        parameters=sum(p.numel() for p in structure.model.parameters()),
        weights=weights,
        placements=_placements(structure, weights, min(batch_size, samples), vocabulary, 1 + derived),
        samples=samples,
        batch_size=batch_size,
        batches=batches,
        forward_equivalents=(sum(runs) + looked_at) / layers + derived,
        naive_forwards=1 + len(COLUMNS) * len(moe),
        layer_runs=runs,
        offload_read=batches * sum(count * size for count, size in zip(runs, read, strict=True)),
        reference=samples * ANSWER_TOKENS * vocabulary * 4,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpus=tuple(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())),
    )


def _looked_at(structure: Structure) -> tuple[int, bool]:
    """Layers whose experts' outputs are computed once more for their norms, which calibrate counts as whole layers; and
    whether there is a forward for the saliency, which computes every layer again, and a way back through it.
    """
    blocks = structure.blocks
    against = obstacles(blocks, [find_router(structure.model, block) for block in blocks])
    return 0 if "output_norm" in against else len(blocks), "norm_predictor" not in against


def _require_complete(spec: ModelSpec, structure: Structure) -> None:
    """As far as names say it: transformers' conversions decide when the weights are loaded."""
    there = set(structure.place.values())
    held = {number for place in there if (number := structure.layer_of(place)) is not None}
    layers: Any = structure.model.get_submodule(structure.layers)
    if lacking := sorted(set(range(len(layers))) - held):
        raise BadModel(
            f"`{spec.id}` has no weights for decoder layer `{lacking[0]}` of `{len(layers)}`",
            hint="is the checkpoint complete?",
        )


def _weights(structure: Structure) -> Weights:
    model: Any = structure.model
    seen: set[int] = set()

    def size(module: nn.Module | None) -> int:
        """Of what was not counted before: tied weights are in memory once."""
        tensors = [] if module is None else [*module.parameters(), *module.buffers()]
        new = {id(t): t.numel() * t.element_size() for t in tensors if id(t) not in seen}
        seen.update(new)
        return sum(new.values())

    experts = sum(
        p.numel() * p.element_size() for block in structure.blocks for part in block.sets for p in part.experts.parameters()
    )
    layers = tuple(size(layer) for layer in model.get_submodule(structure.layers))
    embedding, head = size(model.get_input_embeddings()), size(model.get_output_embeddings())
    size(model.get_decoder())  # its norms and tables: `other`
    decoder = set(model.get_decoder().modules())
    base = getattr(model, model.base_model_prefix, model)
    vision = sum(size(child) for child in base.children() if not decoder & set(child.modules()))
    every = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    total = sum(every.values())
    other = total - sum(layers) - embedding - head - vision
    return Weights(total, experts, embedding, vision, head, other, layers)


def _placements(structure: Structure, weights: Weights, batch: int, vocabulary: int, copies: int) -> tuple[Placement, ...]:
    """`copies`: 2 where there is a way back, which keeps every layer's input, and one layer's inside with its gradients."""
    block, item = structure.blocks[0], structure.dtype.itemsize
    tokens, answers = batch * TOKENS, batch * ANSWER_TOKENS
    recorded = len(weights.layers) * tokens * block.hidden_size * item  # every layer's output, for the replays
    # Inside one layer, in float32 at worst: the residual stream a few times over, and each pair's gate, up and product.
    inside = tokens * 4 * (8 * block.hidden_size + block.top_k * (3 * block.intermediate_size + block.hidden_size))
    logits = answers * vocabulary * (item + 3 * 8)  # and the distributions in float64
    working = copies * (recorded + inside) + logits
    largest = max(weights.layers)
    many = [
        Placement(f"{n} devices", "--device-map balanced", _fullest(weights, n), working)
        for n in GPUS
        if n <= len(weights.layers)
    ]
    return (
        Placement("one device", "", weights.total, working),
        *many,
        # While a layer is read, the pages of its files and what is made of them are there together.
        Placement("offload", "--offload", weights.resident + 2 * largest, working),
    )


def _fullest(weights: Weights, devices: int) -> int:
    """Bytes on the fullest of several devices that hold consecutive layers; the first has the rest too, the last the head."""
    parts = [weights.resident - weights.head, *weights.layers, weights.head]
    low, high = max(parts), sum(parts)
    while low < high:
        middle = (low + high) // 2
        if _devices_needed(parts, middle) <= devices:
            high = middle
        else:
            low = middle + 1
    return low


def _devices_needed(parts: Sequence[int], room: int) -> int:
    needed, used = 1, 0
    for part in parts:
        if used + part > room:
            needed, used = needed + 1, 0
        used += part
    return needed
