"""ERNIE 4.5 VL: text experts and vision experts beside each other, each with a router of its own.

A set is called with the rows of its modality only, in reading order. Which rows those are is what the MoE module is told;
without images, and while decoding, the text experts see all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from modes_cli.models.layouts.base import Engine, Experts

_TYPES = "moe_mm_token_type_ids"


class ModalitySets:
    sets: tuple[str, ...] = ("text_moe.experts", "vision_moe.experts")
    arguments: int = 3
    transposed: bool | None = None
    scales_input: bool = False

    def install(self, moe: Any, names: tuple[str, ...], engine: Engine) -> Callable[[], None]:
        def rows(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            types: Tensor | None = kwargs.get(_TYPES, args[1] if len(args) > 1 else None)
            if types is None or not types.any():
                return engine.only_rows({})
            vision = types.bool().reshape(-1)
            return engine.only_rows(dict(zip(names, (~vision, vision), strict=True)))

        handle = moe.register_forward_pre_hook(rows, with_kwargs=True)
        return partial(handle.remove)

    def pairs(self, experts: nn.Module) -> Experts | None:
        return None
