"""thresholds.safetensors: the rule of a bundle. What is taken is finite and not negative."""

import shutil
import struct

import torch

from modes_cli.artifacts import Bundle
from modes_cli.export.integrity import read_bundle
from modes_cli.export.thresholds import THRESHOLDS, layer_entries, read_rule
from tests.fuzz.mutate import as_safetensors as mutate
from tests.fuzz.places import real, scratch

__all__ = ["mutate", "one", "seeds"]

_bundles: list[Bundle] = []


def seeds() -> list[bytes]:
    raw = real("bundle", THRESHOLDS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip()  # without the padding to a page: shorter inputs are tried faster
    return [raw, struct.pack("<Q", len(header)) + header + raw[8 + length :]]


def one(data: bytes) -> None:
    folder = scratch("rule")
    if not _bundles:
        shutil.copytree(real("bundle"), folder, dirs_exist_ok=True)
        _bundles.append(read_bundle(folder))
    (folder / THRESHOLDS).write_bytes(data)
    rule = read_rule(folder, _bundles[0])
    layer_entries(folder)
    for values in (rule.score_scale, rule.tau):
        assert torch.isfinite(values).all(), "not finite"
        assert (values >= 0).all(), "negative"
