"""Where the operator computes a block's kept pairs in place of transformers, and where it must not.

transformers has classes whose parameters look alike and whose experts differ: clamped activations, norms behind an expert,
scales. So nothing is concluded from names. Before the operator computes a block it is compared with the block's own
implementation, once: two made-up tokens, the real weights, activations from small ones to far beyond any clamp in use.
Where the two differ, or cannot be compared, transformers goes on computing the block; `implementation` says why.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modes_cli.errors import KernelError
from modes_cli.models.blocks import MoEBlock
from modes_cli.runtime import devices, kernels

Base = Callable[[Tensor, Tensor, Tensor], Tensor]

_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are set to
_WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
# Largest gate or up value of the probes. Clamps in use are at 7 to 16; a product in float16 must stay below 65504.
_PEAKS = {torch.float32: (2.0, 64.0, 4096.0), torch.bfloat16: (2.0, 64.0, 4096.0), torch.float16: (2.0, 48.0)}
# Norm of the difference over the norm of the output. transformers rounds to the dtype after every step, the operator once.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@dataclass(frozen=True)
class Implementation:
    """What computes a block's kept pairs where others are skipped: `modes` (the operator) or `transformers`, and why."""

    name: str
    reason: str


class _Setting(NamedTuple):
    """What a comparison is valid for."""

    hidden: torch.dtype
    routing: torch.dtype
    stored: torch.dtype
    device: torch.device


class _Mask(NamedTuple):
    """With these a score of 0 or 1 is a mask: every token in group 0, whose threshold is 0.5."""

    group: Tensor
    tau: Tensor
    scale: Tensor


class BlockOperator:
    """The operator for one block.

    Attributes:
        implementation: what computed the last call that skipped pairs.
    """

    def __init__(self, block: MoEBlock, base: Base) -> None:
        self.implementation = Implementation("transformers", "no pair has been skipped yet")
        self._block, self._base = block, base
        self._experts: kernels.Experts | None = None
        self._verdicts: dict[_Setting, Implementation] = {}
        self._masks: dict[torch.device, _Mask] = {}

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor, keep: Tensor) -> Tensor | None:
        """The block's output with the kept pairs only, or None where transformers must compute it."""
        if torch.compiler.is_compiling():
            return _outside_the_graph(self, hidden, index, weights, keep)
        return self._computed(hidden, index, weights, keep)

    def _computed(self, hidden: Tensor, index: Tensor, weights: Tensor, keep: Tensor) -> Tensor | None:
        experts = self._ready(hidden, index, weights)
        return None if experts is None else self._run(experts, hidden, index, weights, keep.float())

    def routed(
        self,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        group: Tensor,
        tau: Tensor,
        scale: Tensor,
        kept: Tensor,
        score: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """The same where the operator decides: the pairs that `score_scale * pi >= tau` keeps, counted in `kept`.

        Args:
            score: gives what stands in the place of `score_scale * pi`, (tokens, k) float32; only called when it is needed.
        """
        experts = self._ready(hidden, index, weights)
        if experts is None:
            return None
        wide, weights = _alike(hidden, weights)
        given = None if score is None else score()
        return experts(wide, index, weights, group, tau, scale, score=given, kept=kept).to(hidden.dtype)

    def _ready(self, hidden: Tensor, index: Tensor, weights: Tensor) -> kernels.Experts | None:
        """The experts, if the operator may compute this call. `implementation` says why not."""
        if (reason := self._objection(hidden, index, weights)) is None:
            experts = self._prepared(hidden, weights)
            if isinstance(experts, kernels.Experts):
                return experts
            reason = experts
        self.implementation = Implementation("transformers", reason)
        return None

    def _run(self, experts: kernels.Experts, hidden: Tensor, index: Tensor, weights: Tensor, score: Tensor) -> Tensor:
        """`score` is a mask: 0 or 1 against 0.5, which float32 decides exactly."""
        tokens = hidden.shape[0]
        mask = self._masks.get(hidden.device)
        if mask is None or mask.group.shape[0] < tokens:
            with torch.inference_mode(False):
                self._masks[hidden.device] = mask = _Mask(
                    torch.zeros(tokens, dtype=torch.int32, device=hidden.device),
                    torch.full((1,), 0.5, dtype=torch.float32, device=hidden.device),
                    torch.ones(1, dtype=torch.float32, device=hidden.device),
                )
        wide, weights = _alike(hidden, weights)
        return experts(wide, index, weights, mask.group[:tokens], mask.tau, mask.scale, score=score).to(hidden.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: prepared experts are pointers into this one."""
        return {**vars(self), "_experts": None}

    # -- may it? ------------------------------------------------------------------------------------------------------

    def _objection(self, hidden: Tensor, index: Tensor, weights: Tensor) -> str | None:
        """What is against the operator in this call."""
        for tensor in (hidden, index, weights):
            if type(tensor) is not Tensor or tensor.device.type not in devices.KINDS:
                where = f"a `{type(tensor).__name__}` on `{tensor.device}`"
                return f"called with {where}, not a plain tensor on the CPU or a CUDA device"
        if hidden.dtype not in _TOLERANCE or weights.dtype not in _TOLERANCE or index.dtype not in (torch.int64, torch.int32):
            return f"called with `{hidden.dtype}`, expert ids in `{index.dtype}`, weights in `{weights.dtype}`"
        if torch.is_grad_enabled():
            for tensor in (hidden, weights, *self._block.experts.parameters()):
                if tensor.requires_grad:
                    return "gradients are recorded, and the operator has none: use `torch.no_grad()`"
        if torch.is_autocast_enabled(hidden.device.type):
            return "autocast is on"
        return None

    def _prepared(self, hidden: Tensor, weights: Tensor) -> kernels.Experts | str:
        """The block's experts ready to run, or why not. Made anew when the block was given other weights."""
        parameters = self._block.experts._parameters
        given = [parameters.get(name) for name in _WEIGHTS]
        if self._experts is None or not self._experts.stands_for(*given):
            self._first_time(hidden.device)
            self._experts = None
            made = self._make(given)
            if isinstance(made, str):
                return made
            self._experts = made
        if self._experts.device != hidden.device:
            return f"called with a tensor on `{hidden.device}`, with the experts' weights on `{self._experts.device}`"
        setting = _Setting(hidden.dtype, weights.dtype, self._experts.dtype, hidden.device)
        if setting not in self._verdicts:
            self._first_time(hidden.device)
            self._verdicts[setting] = self._compare(self._experts, setting)
        self.implementation = self._verdicts[setting]
        return self._experts if self.implementation.name == "modes" else self.implementation.reason

    def _first_time(self, device: torch.device) -> None:
        devices.refuse_while_capturing(device, f"the operator is still to be compared with `{self._block.name}`")

    def _make(self, given: list[nn.Parameter | None]) -> kernels.Experts | str:
        """What can be seen without computing anything. Weights that are elsewhere for now (offloaded) are refused here."""
        block, experts = self._block, self._block.experts
        label = f"`{type(experts).__name__}`"
        known = {name for name, parameter in zip(_WEIGHTS, given, strict=True) if parameter is not None}
        others = {name for name, _ in (*experts.named_parameters(), *experts.named_buffers())} - known
        if others:
            return f"{label} has more than the weights the operator knows: {', '.join(sorted(others))}"
        gate_up, down, gate_up_bias, down_bias = given
        if gate_up is None or down is None or any(type(p) is not nn.Parameter for p in given if p is not None):
            return f"{label} has weights of another kind than plain parameters"
        if getattr(experts, "_is_expert_parallel", False):
            return f"{label} holds a part of the experts only"
        limits = [v for name, v in vars(experts).items() if "limit" in name and isinstance(v, int | float) and math.isfinite(v)]
        if limits and block.activation != "swiglu_oai":
            return f"{label} clamps its activations at `{limits[0]}`"
        try:
            oai: dict[str, Any] = (
                {name: float(getattr(experts, name)) for name in ("alpha", "limit")} if block.activation == "swiglu_oai" else {}
            )
            return kernels.Experts(
                gate_up, down, gate_up_bias, down_bias, block.activation,
                transposed=block.transposed, interleaved=block.interleaved, **oai,
            )  # fmt: skip
        except (KernelError, TypeError) as error:  # TypeError: a limit of None
            return str(error)

    # -- does it compute the same? --------------------------------------------------------------------------------------

    def _compare(self, experts: kernels.Experts, setting: _Setting) -> Implementation:
        """The operator and the block's own implementation on the probes."""
        label, worst = f"`{type(self._block.experts).__name__}`", 0.0
        if setting.stored != setting.hidden:
            return Implementation("transformers", f"{label} has weights of another dtype than `{setting.hidden}`")
        for peak in _PEAKS[setting.hidden]:
            try:
                difference = self._difference(experts, setting, peak)
            except Exception as error:  # whatever it is: the model must go on as it did without the operator
                return Implementation("transformers", f"{label} cannot be compared with the operator: {error}")
            if not difference <= _TOLERANCE[setting.hidden]:
                reason = f"{label} does not compute what the operator does: they differ by {difference:.1e} of the output"
                return Implementation("transformers", f"{reason} where activations reach {peak:g}")
            worst = max(worst, difference)
        return Implementation("modes", f"{label} and the operator compute the same: within {worst:.1e} of the output")

    @torch.no_grad()
    def _difference(self, experts: kernels.Experts, setting: _Setting, peak: float) -> float:
        """Norm of the difference over the norm of the output for two tokens. NaN where the output is 0 or not finite."""
        block = self._block
        k, last = block.top_k, block.num_experts - 1
        first = torch.arange(k, device="cpu") * block.num_experts // k  # made on the CPU: the same probes everywhere
        index = torch.stack([first, last - first])
        weights = torch.stack([torch.linspace(1.0, 0.5, k, **_FLOAT), torch.linspace(0.3, 0.9, k, **_FLOAT)])  # sums are not 1
        index, weights = index.to(setting.device), weights.to(setting.device, setting.routing)
        hidden = torch.randn(2, block.hidden_size, generator=torch.Generator("cpu").manual_seed(0), **_FLOAT)
        hidden = hidden.to(setting.device)
        stack: Tensor = block.experts._parameters["gate_up_proj"]  # type: ignore[assignment]
        for token in range(2):
            matrix = stack[int(index[token, 0])].float()
            before = hidden[token] @ matrix if block.transposed else matrix @ hidden[token]
            hidden[token] *= peak / before.abs().max()
        hidden = hidden.to(setting.hidden)
        expected = self._base(hidden, index, weights).double()
        found = self._run(experts, hidden, index, weights, torch.ones_like(weights, dtype=torch.float32)).double()
        return float((found - expected).norm() / expected.norm())


def _alike(hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype. A router in float32 below a bfloat16 model: no weight is rounded for it."""
    if weights.dtype == hidden.dtype:
        return hidden, weights
    wide = torch.promote_types(hidden.dtype, weights.dtype)
    return hidden.to(wide), weights.to(wide)


# A compiled model has left its graph by now anyway, to see whether any pair is skipped.
_outside_the_graph: Callable[..., Tensor | None] = torch.compiler.disable(BlockOperator._computed)  # type: ignore[no-untyped-call]
