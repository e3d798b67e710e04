"""One policy per file. A new one is a new file and a line here."""

from modes_cli.skipping.policies import (
    diep,
    dmt,
    gmlg,
    grouped,
    mcmoe,
    modes,
    naee,
    norm,
    predicted,
    random,
    salient,
    tempered,
    threshold,
    topk,
    topp,
)

__all__ = [
    "diep",
    "dmt",
    "gmlg",
    "grouped",
    "mcmoe",
    "modes",
    "naee",
    "norm",
    "predicted",
    "random",
    "salient",
    "tempered",
    "threshold",
    "topk",
    "topp",
]
