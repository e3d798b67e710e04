"""How much what a layer's experts return for a token matters for the answer, and what predicts it.

    u[l, t] = || d m / d o[l, t] ||,   m = sum over answer tokens a of s_a * log(margin_a)

o[l, t] is what the routed experts of layer l return for token t; margin_a is the unmodified model's most probable logit minus
the next one, so that m changes by the share of the way to another answer; s_a is +1 or -1 by chance, which makes the square
of u the expected sum of the answer tokens' squares. One forward and one backward pass give it for every layer and token; each
decoder layer is computed again in the backward pass, so that no more than one layer's inside is in memory.

log u is predicted, for each layer and token group, linearly from what the experts are given. Where that is wider than
`WIDEST`, from as many directions of it: the router's rows, and directions by chance. The prediction is a vector of the hidden
size again: one scalar product per token.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modes_cli.calibration import linear
from modes_cli.calibration.replay import Replay
from modes_cli.errors import ModesError
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.groups import GROUPS, SKIPPABLE
from modes_cli.models.inputs import Batch
from modes_cli.models.router import Router
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.routing import Routing

NAMES = ("saliency", "saliency_range")
SUMS = ("saliency_sums", "saliency_dead")
WIDEST = 512
ROUTER_ROWS = 384  # at most, of the directions
PASSES = 2  # beside the forward: computing each layer again, and the way back through it
LEAST_MARGIN = 1e-3  # of logits; rounding makes ties of half precision
HALF_SCALE = 1024.0  # keeps float16's gradients from vanishing


class SaliencySums:
    """Sums over the tokens of any number of batches.

    Args:
        obstacle: why it is not measured; empty: nothing is against it.
    """

    def __init__(self, blocks: list[MoEBlock], routers: list[Router | None], obstacle: str) -> None:
        self.obstacle = obstacle
        self._blocks, self._routers = blocks, routers
        hidden = blocks[0].hidden_size
        self._features = min(hidden, WIDEST)
        self._random = None if hidden <= WIDEST else _directions(WIDEST, hidden)
        self.sums = {} if obstacle else {name: torch.stack([part, part]) for name, part in self.zeros().items()}

    def zeros(self) -> dict[str, Tensor]:
        """One batch's sums: `saliency_sums` (layers, groups, width) float64, and `saliency_dead` (layers, groups) int64, the
        tokens on which no answer depends. Special tokens are left out.
        """
        if self.obstacle:
            return {}
        cells = len(self._blocks), len(SKIPPABLE)
        sums = torch.zeros(*cells, linear.width(self._features), dtype=torch.float64)
        return dict(zip(SUMS, (sums, torch.zeros(*cells, dtype=torch.int64)), strict=True))

    def measure(self, number: int, batch: Batch, engine: SkipEngine, replay: Replay) -> dict[str, Tensor]:
        """One batch's sums. `replay` has recorded it. A model that cannot be differentiated becomes an obstacle."""
        found = self.zeros()
        if not found:
            return {}
        backward = _Backward(self, found)
        try:
            with engine.using(trace=backward.trace), torch.enable_grad(), _deterministic():
                logits = replay.differentiable(batch)
                backward.start()
                scale = HALF_SCALE if logits.dtype == torch.float16 else 1.0
                torch.autograd.grad(scale * _signed_log_margin(logits, number), backward.source)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.obstacle, self.sums = f"the model cannot be differentiated: {_first_line(error)}", {}
            return {}
        backward.require_all(len(self._blocks))
        return found

    def add(self, number: int, found: dict[str, Tensor]) -> None:
        """Add one batch; in the order of the batches."""
        if not self.obstacle and not found.keys() >= set(SUMS):
            self.obstacle, self.sums = "another process could not differentiate the model", {}
        for name in self.sums:
            self.sums[name][number % 2] += found[name]

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from the sums of an earlier process."""
        if not state.keys() >= set(SUMS):
            self.obstacle, self.sums = self.obstacle or "the model could not be differentiated", {}
        self.sums = {name: state[name] for name in self.sums}

    def take(self, routing: Routing, saliency: Tensor, found: dict[str, Tensor]) -> None:
        """One layer's real tokens; `saliency` (tokens,) float32."""
        known = routing.hidden.detach().float()
        if self._random is not None:
            known = known @ self._basis(routing.layer, None).to(known.device).T
        alive = (saliency > 0) & torch.isfinite(saliency)
        logs = saliency.clamp_min(1e-38).log()
        for group in range(len(SKIPPABLE)):
            mine = routing.group == group
            chosen = mine & alive
            found[SUMS[1]][routing.layer, group] += int((mine & ~alive).sum())
            if bool(chosen.any()):
                linear.add_tokens(found[SUMS[0]][routing.layer, group], known[chosen], logs[chosen])

    def tensors(self, routers: Tensor) -> dict[str, Tensor]:
        """What calibration.safetensors gets.

        `saliency` (layers, groups, hidden + 1) float32: the predicted log of a token's saliency is its scalar product with
        (what the experts are given, 1). `saliency_range` (layers, groups, 3) float32: the smallest and the largest prediction
        to believe, and the share of the group's tokens on which any answer depends. A group without tokens has the
        layer's mean; so have special tokens.

        Args:
            routers: (layers, E, hidden), the routers' weights.
        """
        if self.obstacle:
            return {}
        sums, dead = self.sums[SUMS[0]], self.sums[SUMS[1]].sum(0)
        hidden, (layers, cells) = self._blocks[0].hidden_size, dead.shape
        coefficients = torch.zeros(layers, len(GROUPS), hidden + 1, dtype=torch.float64)
        ranges = torch.zeros(layers, len(GROUPS), 3, dtype=torch.float64)
        for layer in range(layers):
            count, total = sums[:, layer, :, _ones(self._features)].sum(), sums[:, layer, :, -2].sum()
            coefficients[layer, :, -1] = ranges[layer, :, 0] = ranges[layer, :, 1] = total / count.clamp_min(1)
            ranges[layer, :, 2] = (count > 0).double()
            for group in range(cells):
                alive = float(sums[:, layer, group, _ones(self._features)].sum())
                if alive + float(dead[layer, group]) == 0:
                    continue
                own, believed = linear.solve(sums[:, layer, group], self._features)
                slopes = own[:-1] if self._random is None else own[:-1] @ self._basis(layer, routers).double()
                coefficients[layer, group] = torch.cat([slopes, own[-1:]])
                ranges[layer, group, :2] = believed
                ranges[layer, group, 2] = alive / (alive + float(dead[layer, group]))
        return dict(zip(NAMES, (coefficients.float(), ranges.float()), strict=True))

    def _basis(self, layer: int, routers: Tensor | None) -> Tensor:
        """(WIDEST, hidden) float32: the directions of a layer's inputs that predict."""
        assert self._random is not None
        if routers is None:
            router = self._routers[layer]
            assert router is not None
            rows = router.weight.detach()
        else:
            rows = routers[layer]
        rows = rows[:ROUTER_ROWS].float().cpu()
        return torch.cat([rows, self._random[: WIDEST - len(rows)]])


class _Backward:
    """Listens to a forward and to its way back. A layer's inputs come when the layer is computed again, the gradient at its
    outputs before or after that: each cell is added when both are there, and nothing else is kept.
    """

    def __init__(self, sums: SaliencySums, found: dict[str, Tensor]) -> None:
        self._sums, self._found = sums, found
        self._inputs: dict[int, Routing] = {}
        self._gradients: dict[int, Tensor] = {}
        self._started, self._heard = False, 0
        self.source = torch.zeros((), requires_grad=True)  # what makes every layer's outputs part of the graph

    def start(self) -> None:
        self._started = True

    def trace(self, routing: Routing, real: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        layer = routing.layer
        if self._started:
            self._inputs[layer] = routing  # first: nothing is computed that the way back does not need
            self._both(layer)
            out = compute()
            return out + self.source.to(out)
        if not routing.hidden.requires_grad:  # the way back ends here: this layer is not computed again
            self._inputs[layer] = routing
        out = compute()
        traced = out + self.source.to(out)
        traced.register_hook(lambda gradient: self._hear(layer, gradient.detach()[real]))
        return traced

    def _hear(self, layer: int, gradient: Tensor) -> None:
        self._gradients[layer] = gradient.float().norm(dim=-1)
        self._both(layer)

    def _both(self, layer: int) -> None:
        if layer in self._inputs and layer in self._gradients:
            with torch.no_grad():
                self._sums.take(self._inputs.pop(layer), self._gradients.pop(layer), self._found)
            self._heard += 1

    def require_all(self, layers: int) -> None:
        if self._heard != layers:
            raise ModesError(f"saliency came from {self._heard} of {layers} layers", hint="report this")


def _signed_log_margin(logits: Tensor, number: int) -> Tensor:
    """m of logits (answer tokens, V); the signs follow from the batch's number."""
    first, second = logits.float().topk(2, -1).values.unbind(-1)
    signs = torch.randint(0, 2, (len(logits),), generator=torch.Generator().manual_seed(number)).to(first) * 2 - 1
    return (signs * (first - second).clamp_min(LEAST_MARGIN).log()).sum()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Gradients of what reads a row several times are added in any order otherwise; where a device knows no other way, in
    that one.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _directions(rows: int, size: int) -> Tensor:
    """(rows, size) of +1 and -1 by the length's root, from a hash."""
    data = b"".join(hashlib.shake_128(f"saliency {row}".encode()).digest(-(-size // 8)) for row in range(rows))
    bits = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, -1)
    signs = torch.stack([bits >> bit & 1 for bit in range(8)], -1).view(rows, -1)[:, :size]
    return (signs.float() * 2 - 1) / size**0.5


def _ones(features: int) -> int:
    """Where the upper triangle of z z^T has the product of 1 with itself."""
    return linear.width(features) - 3


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
