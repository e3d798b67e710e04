"""What experts return, pair by pair: norms, what predicts them, and how alike two experts are.

One more pass through the experts of each batch, every (token, expert) pair on its own, while the batch is recorded; nothing of
it changes what the forward computes. Sums are in float64, in the order of the batches, counts are integers.

What cannot be measured is left out, with the reason: `OutputSums.absent`, by the name of the tensor.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modes_cli.calibration import ridge
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.groups import GROUPS
from modes_cli.models.router import Router, find_router
from modes_cli.skipping.predictor import features
from modes_cli.skipping.routing import Routing

CHUNK = 64 << 20  # bytes of expert outputs that are in memory at a time
MOST = 2 << 30  # bytes of sums of one kind; twice that is needed while a batch is added
LARGEST_ROUTERS = 256 << 20  # bytes of all layers' routers
SMALLEST = 1e-12  # of a norm whose logarithm is taken

NORMS = ("output_norm", "expert_similarity")
PREDICTOR = ("norm_predictor", "norm_range", "router", "router_bias")


class OutputSums:
    """Sums over the pairs of any number of batches.

    Attributes:
        absent: why a tensor is not measured, by its name.
        layers_per_batch: what a batch costs, as a number of decoder layers. An MoE layer's experts are counted as a whole
            layer, which is more than they are.
        routers: of each block, as far as they were found.
    """

    def __init__(self, model: nn.Module, blocks: list[MoEBlock], chunk: int = CHUNK) -> None:
        self._blocks, self._chunk = blocks, chunk
        self.routers = [find_router(model, block) for block in blocks]
        self.absent = obstacles(blocks, self.routers)
        self.layers_per_batch = 0 if "output_norm" in self.absent else len(blocks)
        self.sums = self.zeros()

    def zeros(self) -> dict[str, Tensor]:
        """The sums before the first batch. `router` and `router_bias` are no sums: they come with batch 0."""
        layers, experts = len(self._blocks), self._blocks[0].num_experts
        sums: dict[str, Tensor] = {}
        if "output_norm" not in self.absent:
            sums["norm_sums"] = torch.zeros(layers, len(GROUPS), experts, dtype=torch.float64)
            sums["norm_counts"] = torch.zeros(layers, len(GROUPS), experts, dtype=torch.int64)
        if "expert_similarity" not in self.absent:
            sums["cosine_sums"] = torch.zeros(layers, experts, experts, dtype=torch.float64)
            sums["cosine_counts"] = torch.zeros(layers, experts, experts, dtype=torch.int64)
        if "norm_predictor" not in self.absent:
            sums["ridge_sums"] = torch.zeros(layers, experts, ridge.width(experts), dtype=torch.float64)
            sums["norm_range"] = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64).repeat(layers, 1)
        return sums

    def add(self, found: dict[str, Tensor]) -> None:
        """Add one batch, as `measuring` left it; in the order of the batches."""
        for name in self.sums.keys() & found.keys():
            if name == "norm_range":
                low, high = zip(self.sums[name].unbind(1), found[name].unbind(1), strict=True)
                self.sums[name] = torch.stack([torch.minimum(*low), torch.maximum(*high)], 1)
            elif name not in PREDICTOR:
                self.sums[name] += found[name]
        self.sums |= {name: found[name] for name in ("router", "router_bias") if name in found}

    def measuring(self, found: dict[str, Tensor], routers: bool) -> Callable[[Routing], None]:
        """What is to watch a batch's forward; it adds to `found`, which begins as `zeros()`.

        Args:
            routers: whether the routers go along, for one batch of all.
        """
        if not found:
            return lambda routing: None
        if routers and "norm_predictor" not in self.absent:
            experts, hidden = self._blocks[0].num_experts, self._blocks[0].hidden_size
            layers = len(self._blocks)
            found["router"] = torch.zeros(layers, experts, hidden, dtype=_router_dtype(self.routers))
            found["router_bias"] = torch.zeros(layers, experts, dtype=torch.float32)
        return lambda routing: self._watch(routing, found)

    def _watch(self, routing: Routing, found: dict[str, Tensor]) -> None:
        layer = routing.layer
        experts, group = routing.experts.long().cpu(), routing.group.long().cpu()
        norms, cosines = self._outputs(routing)
        flat = (group[:, None] * self._blocks[0].num_experts + experts).reshape(-1)
        found["norm_sums"][layer].view(-1).index_add_(0, flat, norms.reshape(-1))
        found["norm_counts"][layer].view(-1).index_add_(0, flat, torch.ones_like(flat))
        if "cosine_sums" in found:
            count = self._blocks[0].num_experts
            both = (experts[:, :, None] * count + experts[:, None, :]).reshape(-1)
            found["cosine_sums"][layer].view(-1).index_add_(0, both, cosines.reshape(-1))
            found["cosine_counts"][layer].view(-1).index_add_(0, both, torch.ones_like(both))
        router = self.routers[layer]
        if "ridge_sums" in found and router is not None and len(norms):
            logs = norms.clamp_min(SMALLEST).log()
            known = features(router.logits(routing.hidden), routing.experts).cpu()
            ridge.add_pairs(found["ridge_sums"][layer], known, experts, logs)
            low, high = found["norm_range"][layer]
            found["norm_range"][layer] = torch.stack([torch.minimum(low, logs.min()), torch.maximum(high, logs.max())])
            if "router" in found:
                found["router"][layer] = router.weight.detach().cpu()
                if router.bias is not None:
                    found["router_bias"][layer] = router.bias.detach().float().cpu()

    def _outputs(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """(tokens, k) norms of what each pair's expert returns, (tokens, k, k) cosines between those of a token; float64."""
        tokens, k = routing.experts.shape
        step = max(1, self._chunk // (4 * k * routing.hidden.shape[1]))
        norms, cosines = [torch.zeros(0, k, dtype=torch.float64)], [torch.zeros(0, k, k, dtype=torch.float64)]
        for begin in range(0, tokens, step):
            experts = routing.experts[begin : begin + step]
            rows = routing.hidden[begin : begin + step].repeat_interleave(k, 0)
            ones = torch.ones(len(rows), 1, dtype=routing.hidden.dtype, device=rows.device)
            out = routing.compute(rows, experts.reshape(-1, 1), ones).float().view(*experts.shape, -1)
            norm = out.norm(dim=-1)
            unit = out / norm.clamp_min(SMALLEST)[..., None]
            norms.append(norm.double().cpu())
            cosines.append((unit @ unit.transpose(1, 2)).double().cpu())
        return torch.cat(norms), torch.cat(cosines)

    def tensors(self) -> dict[str, Tensor]:
        """What calibration.safetensors gets, but for what is `absent`.

        `output_norm` (layers, groups, experts) float32: mean L2 norm of what an expert returns over the group's pairs; where
        there are none the mean of the layer's group, or of the layer.
        `expert_similarity` (layers, experts, experts) float32: mean cosine of what two experts return for the same token; the
        layer's mean where no token has both, 1 on the diagonal.
        `norm_predictor` (layers, experts, experts + 2) float32: coefficients of (router logits, log top-k softmax mass, 1).
        `norm_range` (layers, 2) float32: smallest and largest log-norm.
        `router` (layers, experts, hidden) in the model's dtype, `router_bias` (layers, experts) float32.
        """
        made: dict[str, Tensor] = {}
        if "output_norm" not in self.absent:
            sums, counts = self.sums["norm_sums"], self.sums["norm_counts"]
            layer = _mean(sums.sum((1, 2), keepdim=True), counts.sum((1, 2), keepdim=True), torch.ones(()))
            group = _mean(sums.sum(2, keepdim=True), counts.sum(2, keepdim=True), layer)
            made["output_norm"] = _mean(sums, counts, group).float()
        if "expert_similarity" not in self.absent:
            apart = ~torch.eye(self._blocks[0].num_experts, dtype=torch.bool)
            sums, counts = self.sums["cosine_sums"] * apart, self.sums["cosine_counts"] * apart
            layer = _mean(sums.sum((1, 2), keepdim=True), counts.sum((1, 2), keepdim=True), torch.zeros(()))
            made["expert_similarity"] = torch.where(apart, _mean(sums, counts, layer), 1.0).float()
        if "norm_predictor" not in self.absent:
            made["norm_predictor"] = torch.stack([ridge.solve(sums) for sums in self.sums["ridge_sums"]]).float()
            made["norm_range"] = self.sums["norm_range"].float()
            made |= {name: self.sums[name] for name in ("router", "router_bias")}
        return made


def obstacles(blocks: list[MoEBlock], routers: list[Router | None]) -> dict[str, str]:
    """What is against measuring a tensor, by its name; a tensor that nothing is against is not there."""
    layers, experts = len(blocks), blocks[0].num_experts
    outputs = predictor = similarity = ""
    if any(block.scales_input for block in blocks):
        outputs = "weights multiply what goes into an expert, so its output has no norm of its own"
    elif any(block.further for block in blocks):
        outputs = "the layers have more than one set of experts"
    elif any(block.num_experts != experts for block in blocks):
        outputs = "the layers have different numbers of experts"
    elif layers * experts * experts * 16 > MOST:
        similarity = _too_large(layers * experts * experts * 16, MOST)
    size, sums = _bytes_of(routers), layers * experts * ridge.width(experts) * 8
    if any(router is None for router in routers):
        predictor = "the layers' routers were not found: no matrix of experts x hidden size is nearest to the block"
    elif sums > MOST:
        predictor = _too_large(sums, MOST)
    elif size > LARGEST_ROUTERS:
        predictor = _too_large(size, LARGEST_ROUTERS)
    found = ((NORMS[:1], outputs), (NORMS[1:], outputs or similarity), (PREDICTOR, outputs or predictor))
    return {name: reason for names, reason in found for name in names if reason}


def _mean(sums: Tensor, counts: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(counts > 0, sums / counts.clamp_min(1), otherwise.double())


def _router_dtype(routers: list[Router | None]) -> torch.dtype:
    return next(router.weight.dtype for router in routers if router is not None)


def _bytes_of(routers: list[Router | None]) -> int:
    return sum(router.weight.numel() * router.weight.element_size() for router in routers if router is not None)


def _too_large(size: int, most: int) -> str:
    return f"it would need {size / 2**20:.0f} MiB for all layers, and {most / 2**20:.0f} MiB is the most"
