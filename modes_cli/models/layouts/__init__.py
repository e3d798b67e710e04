"""MoE modules that are not of the common form, by class name: one layout per file, one line here.

The common form needs none: one set of experts, called as `experts(hidden, expert ids, weights)`.
"""

from modes_cli.models.layouts.base import Computed, Engine, Experts, Layout, replace_forward
from modes_cli.models.layouts.modality_sets import ModalitySets
from modes_cli.models.layouts.scaled_input import ScaledInput

LAYOUTS: dict[str, Layout] = {"Llama4TextMoe": ScaledInput(), "Ernie4_5_VLMoeMoeBlock": ModalitySets()}

__all__ = ["LAYOUTS", "Computed", "Engine", "Experts", "Layout", "replace_forward"]
