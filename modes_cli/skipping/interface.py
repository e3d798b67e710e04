"""The experts implementation named `modes`, as transformers knows it: it hands every call to the engine of the model.

Experts carry what a call needs: `_modes_engine`, `_modes_block` and `_modes_base`, set by the engine that is installed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from modes_cli.errors import ModesError
from modes_cli.skipping.operator import Base

IMPLEMENTATION = "modes"


def set_implementation(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Set the implementation wherever experts have an engine; how to undo it.

    Wrapper classes refuse set_experts_implementation; the inner model that owns the experts takes it.
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            if not any(hasattr(m, "_modes_engine") and hasattr(m, "_is_expert_parallel") for m in module.modules()):
                continue  # a vision tower with experts of its own
            before = module.config._experts_implementation
            module.set_experts_implementation(IMPLEMENTATION)
            undo.append(partial(module.set_experts_implementation, before))
    return undo


def interface_base(experts: Any) -> Base:
    """The implementation that was configured before ours, bound to this module."""
    name = experts.config._experts_implementation
    function = type(experts).forward.__wrapped__ if name in (None, "eager") else ALL_EXPERTS_FUNCTIONS[name]
    return lambda hidden, index, weights: function(experts, hidden, index, weights)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A call of experts, whose engine answers it."""
    engine = getattr(self, "_modes_engine", None)
    if engine is None:
        raise ModesError(f"`{type(self).__name__}` is set to the `modes` experts implementation, but no engine is installed")
    out: Tensor = engine.experts(self._modes_block, self._modes_base, hidden_states, top_k_index, top_k_weights)
    return out


ExpertsInterface.register(IMPLEMENTATION, experts_forward)
