"""thresholds.safetensors: a bundle's rule as tensors. Every runtime decides with these; nothing in them is executed.

`score_scale` [L, G] or [L, G, E] and `tau` [G], over L MoE layers, G token groups and E experts. A policy that has a formula in
the place of pi adds `contribution.NAME` [L, ...] for each of the formula's tensors; which formula it is follows from the
policy's name in bundle.json. All float32.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from modes_cli.artifacts import bundle as artifact
from modes_cli.artifacts.bundle import Bundle
from modes_cli.errors import BadArtifact, BadOption
from modes_cli.models.groups import GROUPS
from modes_cli.safetensors_header import Entry, Header, chunks, read_header
from modes_cli.skipping.formula import Formula, Sizes
from modes_cli.skipping.policy import Rule, tau_vector
from modes_cli.skipping.registry import policy

THRESHOLDS = "thresholds.safetensors"
PREFIX = "contribution."
_PAGE = 4096


def rule_bytes(rule: Rule, metadata: Mapping[str, str]) -> bytes:
    """A rule as a file; its contribution, if it has one, must be a `Formula`."""
    tensors = {"score_scale": rule.score_scale.contiguous(), "tau": rule.tau.contiguous()}
    if rule.contribution is not None:
        assert isinstance(rule.contribution, Formula)
        tensors |= {PREFIX + name: tensor for name, tensor in rule.contribution.tensors.items()}
    data = save(tensors, dict(metadata))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library's order differs from run to run
    text = json.dumps(header, separators=(",", ":")).encode()
    pad = -(8 + len(text)) % _PAGE  # aligned like the weights, so that it may be mapped as well
    return struct.pack("<Q", len(text) + pad) + text + b" " * pad + data[8 + length :]


def read_rule(folder: Path, bundle: Bundle) -> Rule:
    """The rule of a bundle.

    Raises:
        BadArtifact: no such policy; other tensors or shapes than it has; a value that is not finite, or a threshold or scale
            that is negative; or a tau that bundle.json denies.
    """
    expected, (kind, parameters) = _tau(folder, bundle), _formula(folder, bundle)
    header = read_header(folder / THRESHOLDS)
    layers, groups = len(bundle.moe_layers), len(bundle.groups)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "score_scale": ((layers, groups), (layers, groups, bundle.experts)),
        "tau": ((groups,),),
    }
    own = {} if kind is None else kind.shapes(Sizes(bundle.experts, bundle.top_k, bundle.decoder.hidden_size))
    shapes |= {PREFIX + name: ((layers, *shape),) for name, shape in own.items()}
    if set(header.tensors) != set(shapes):
        problem = f"are {sorted(header.tensors)[:8]}, should be {', '.join(sorted(shapes))}"
        raise BadArtifact(str(header.path), "tensors", problem)
    found = {name: _floats(header, name, allowed) for name, allowed in shapes.items()}
    if not np.array_equal(found["tau"], expected):
        raise BadArtifact(str(header.path), "tensor `tau`", f"is {found['tau'].tolist()}, bundle.json says {expected.tolist()}")
    contribution = None
    if kind is not None:
        contribution = kind({name: torch.tensor(found[PREFIX + name]) for name in own}, parameters)
    return Rule(torch.tensor(found["score_scale"]), tau_vector(bundle.tau), contribution)


def layer_entries(folder: Path) -> dict[str, Entry]:
    """Where each layer's part of a formula's tensors lies, as `contribution.NAME_LAYER`, for graphs that refer to it."""
    header = read_header(folder / THRESHOLDS)
    found = {}
    for name, entry in header.tensors.items():
        if not name.startswith(PREFIX) or not entry.shape or not entry.shape[0]:
            continue
        size = entry.length // entry.shape[0]
        for layer in range(entry.shape[0]):
            label = f"{name}_{layer}"
            found[label] = Entry(entry.file, label, entry.dtype, entry.shape[1:], entry.start + layer * size, size)
    return found


def _formula(folder: Path, bundle: Bundle) -> tuple[type[Formula] | None, dict[str, float]]:
    """What stands in the place of pi, with its parameters. Raises BadArtifact if the policy does not exist."""
    where = str(folder / artifact.FILE)
    try:
        made = policy(bundle.policy, **bundle.parameters)
    except (BadOption, TypeError) as error:
        raise BadArtifact(where, "field `policy`", str(error)) from error
    if made.parameters != bundle.parameters:
        wanted, found = ", ".join(made.parameters) or "none", ", ".join(bundle.parameters) or "none"
        raise BadArtifact(where, "field `parameters`", f"policy `{bundle.policy}` has {wanted}, not {found}")
    return made.formula, made.parameters


def _tau(folder: Path, bundle: Bundle) -> NDArray[np.float32]:
    """[G]. Raises BadArtifact if the bundle's groups are not those of this version, or a threshold makes no sense."""
    where = str(folder / artifact.FILE)
    if tuple(bundle.groups) != GROUPS:
        raise BadArtifact(where, "field `groups`", f"is `{', '.join(bundle.groups)}`, should be {', '.join(GROUPS)}")
    try:
        found: NDArray[np.float32] = tau_vector(bundle.tau).numpy()
    except BadOption as error:
        raise BadArtifact(where, "field `tau`", str(error)) from error
    return found


def _floats(header: Header, name: str, allowed: tuple[tuple[int, ...], ...]) -> NDArray[np.float32]:
    entry = header.tensors[name]
    if entry.dtype != "F32" or entry.shape not in allowed:
        raise BadArtifact(
            str(header.path), f"tensor `{name}`", f"is {entry.dtype} {list(entry.shape)}, should be F32 {list(allowed[0])}"
        )
    values = np.frombuffer(b"".join(chunks(entry)), dtype="<f4").reshape(entry.shape)
    signed = name.startswith(PREFIX)
    wrong = np.argwhere(~(np.isfinite(values) & (signed | (values >= 0))))
    if len(wrong):
        at = entry.start + 4 * math.ceil(np.ravel_multi_index(tuple(wrong[0]), entry.shape))
        problem = f"`{values[tuple(wrong[0])]}` is not a finite number" + ("" if signed else " of 0 or more")
        raise BadArtifact(str(header.path), f"tensor `{name}` at offset {at}", problem)
    return values
