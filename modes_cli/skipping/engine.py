"""Skipping inside a transformers model, without a copy of its modeling code.

The engine registers an implementation named `modes` with transformers' experts interface. When a block's experts are
called and a rule skips some of their pairs, the kept ones are computed by the operator (`modes_cli.skipping.operator`), or
where that cannot be, by the implementation that was configured before, each pair as a "token with one expert"; skipped
pairs are never computed. If every pair is kept, the call is passed on unchanged, so that tau = 0 gives the unmodified
model's logits bit for bit.

On a GPU nothing is read back to decide any of this: a rule whose thresholds are all 0 passes calls on, any other is
decided and counted by the operator on the device (`modes_cli.skipping.placed`), so that a forward can be captured in a CUDA
graph once it has run.

Classes outside the interface (step3p7) get the same through their instance's `forward`, MoE modules of another form
through their layout (`modes_cli.models.layouts`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modes_cli.errors import ModesError
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.groups import TokenGroups, last_real, with_decode
from modes_cli.models.layouts import Computed, replace_forward
from modes_cli.runtime.devices import asynchronous, refuse_while_capturing
from modes_cli.skipping import pairs
from modes_cli.skipping.attention import AttentionReceived
from modes_cli.skipping.contribution import Pairs
from modes_cli.skipping.interface import experts_forward, interface_base, set_implementation
from modes_cli.skipping.operator import Base, BlockOperator, Implementation
from modes_cli.skipping.placed import Placed, cannot_capture, placeable
from modes_cli.skipping.policy import Rule
from modes_cli.skipping.routing import Drop, Routing, Trace
from modes_cli.skipping.statistics import PairCounts


class SkipEngine:
    """Skipping, dropping and watching the routed experts of one model. State is per instance, never per module or process.

    Attributes:
        rule: what is kept; None keeps all.
        drop: routed experts that contribute nothing, whatever the rule says. Without a rule transformers computes the
            others, so that what a drop changes is not mixed with the last bits of another implementation.
        watch: called with each layer's routing.
        trace: called in the place of each layer's experts, with the layer's routing, which tokens are real, and a function
            that computes them all. Neither rule nor drop hold while there is one.
        counts: kept and total pairs since `counts.reset()`; only filled while a rule is set.
        decoding: (B, S) bool, the tokens of the coming forwards that predict an answer; None: the last real one of each row,
            as it is when a model generates.
        ended: token ids that `generate` feeds for rows of a batch that have ended; such rows are padding, not tokens.
        use_operator: False leaves all computing to transformers; `implementations` says what computes each block.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[MoEBlock], tokens: TokenGroups) -> None:
        self.model, self.blocks, self.tokens = model, blocks, tokens
        self.rule: Rule | None = None
        self.drop: Drop | None = None
        self.watch: Callable[[Routing], None] | None = None
        self.trace: Trace | None = None
        self.counts = PairCounts(len(blocks))
        self.decoding: Tensor | None = None
        self.ended: tuple[int, ...] = ()
        self.use_operator = True
        self._group: Tensor | None = None  # (B * S,) of the running forward
        self._real: Tensor | None = None  # (B * S,) bool: not padding
        self._phase = 0
        self._forward = 0  # number of the running forward
        self._attention: AttentionReceived | None = None  # once a rule has asked for it
        self._placed: dict[torch.device, Placed] = {}
        self._rows: Mapping[str, Tensor] = {}  # by the name of a set of experts, in the running MoE module
        self._sets = {part.name: part for block in blocks for part in block.sets}
        self._undo: list[Callable[[], None]] = []
        self._operators: dict[str, BlockOperator] = {}  # by the name of a set of experts
        self._install()

    @property
    def implementations(self) -> list[Implementation]:
        """What computed each block, or each of its sets, when it last skipped pairs, and why."""
        if not self.use_operator:
            return [Implementation("transformers", "the operator is switched off")] * len(self._sets)
        return [self._operators[name].implementation for name in self._sets]

    # -- installing and removing ------------------------------------------------------------------------------------

    def _install(self) -> None:
        for block in self._sets.values():  # before anything is changed
            if getattr(block.experts, "_modes_engine", None) is not None:
                raise ModesError(f"`{block.name}` is already being skipped by another engine", hint="remove that one first")
        hook = self.model.register_forward_pre_hook(self._read_tokens, with_kwargs=True)
        self._undo += [hook.remove, self.model.register_forward_hook(self._count).remove]
        self._undo.append(self.model.register_forward_hook(self._attended, always_call=True).remove)
        for block in self.blocks:
            for part in block.sets:
                self._install_set(part)
            if block.layout is not None:
                moe = self.model.get_submodule(block.moe)
                self._undo.append(block.layout.install(moe, tuple(part.name for part in block.sets), self))
        self._undo += set_implementation(self.model)

    def _install_set(self, block: MoEBlock) -> None:
        experts: Any = block.experts
        experts._modes_engine, experts._modes_block = self, block
        own = None if block.layout is None else block.layout.pairs(experts)
        if own is not None:
            experts._modes_base = own
        elif hasattr(experts, "_is_expert_parallel"):  # the mark that transformers' decorator leaves
            experts._modes_base = interface_base(experts)
        else:
            experts._modes_base = experts.forward
            self._undo.append(replace_forward(experts, partial(experts_forward, experts)))
        self._operators[block.name] = BlockOperator(block, experts._modes_base)

    def remove(self) -> None:
        """Give the model back as it was."""
        while self._undo:
            self._undo.pop()()
        if self._attention is not None:
            self._attention.remove()
            self._attention = None
        for block in self._sets.values():
            for name in ("_modes_engine", "_modes_block", "_modes_base"):
                block.experts.__dict__.pop(name, None)

    # -- one forward ------------------------------------------------------------------------------------------------

    def _read_tokens(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = self._ids_of_embeddings(kwargs.get("inputs_embeds"))
        groups_of = self._place(ids.device).groups_of if asynchronous(ids.device) else self.tokens.of
        self._forward += 1
        self._rows = {}
        mask = kwargs.get("attention_mask")
        length = ids.shape[1]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -length:].bool()
        else:
            real = torch.ones_like(ids, dtype=torch.bool)
        self._phase = int(length == 1)
        for ended in self.ended if self._phase else ():
            real = real & (ids != ended)
        decoding = last_real(real) if self.decoding is None else self.decoding
        self._group, self._real = with_decode(groups_of(ids), decoding).reshape(-1), real.reshape(-1)
        if self._asks_for_attention:
            self._attention = self._attention or AttentionReceived(self.model, self.blocks)
            self._attention.begin(real)

    def _ids_of_embeddings(self, embeddings: Tensor | None) -> Tensor:
        """Ids for a forward that was given embeddings only: placeholder rows are recognised, every other row is text."""
        if embeddings is None:
            raise ModesError("the model was called without input_ids and without inputs_embeds")
        if asynchronous(embeddings.device):
            known = self._place(embeddings.device).known_ids
        else:
            ids = (*self.tokens.vision_ids, *self.tokens.special_ids, *self.tokens.audio_ids)
            known = torch.tensor(ids, dtype=torch.int64, device=embeddings.device)
        if not known.numel():
            return torch.full(embeddings.shape[:2], -1, device=embeddings.device)
        table = self.model.get_input_embeddings()(known).to(embeddings)
        hits = (embeddings[:, :, None] == table).all(-1)
        return torch.where(hits.any(-1), known[hits.int().argmax(-1)], -1)

    def _place(self, device: torch.device) -> Placed:
        if device not in self._placed:
            self._placed[device] = Placed(device, len(self.blocks), self.tokens)
        return self._placed[device]

    @property
    def _asks_for_attention(self) -> bool:
        return self.rule is not None and self.rule.contribution is not None and self.rule.contribution.needs_attention

    def _attended(self, *_: object) -> None:
        if self._attention is not None:
            self._attention.end()

    def _count(self, *_: object) -> None:
        for placed in self._placed.values():
            placed.finish(self._forward, self.counts, self._phase)

    def experts(self, block: MoEBlock, base: Base, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What a block's experts return under the current rule, drop and watcher."""
        if self.rule is None and self.drop is None and self.watch is None and self.trace is None:
            return base(hidden, index, weights)
        group, real = self._tokens_of(block, hidden)
        if self.trace is not None:
            seen = Pairs(block.index, pairs.score(block, weights.detach()), group, index, hidden)
            return self.trace(Routing.real(seen, real, base, block, None, None), real, partial(base, hidden, index, weights))
        drops = self.drop is not None and self.drop.layer == block.index
        free = self.watch is None and not drops and block.layout is None and asynchronous(hidden.device)
        if free and self.rule is not None and placeable(self.rule):
            routed = _routed_outside_the_graph if torch.compiler.is_compiling() else SkipEngine._routed
            out = routed(self, self.rule, (group, real), block, base, hidden, index, weights)
            if out is not None:
                return out
        if self.rule is not None and not placeable(self.rule):
            what = f"`{block.name}` is skipped by a rule that is not decided on the device"
            refuse_while_capturing(hidden.device, what, "take a policy that does not look at attention weights")
        keep = score = None
        standing = None
        if self._asks_for_attention and self._attention is not None:
            standing = self._attention.standing(block, hidden, self._rows.get(block.name))
        seen = Pairs(block.index, pairs.score(block, weights), group, index, hidden, standing)
        if self.rule is not None:
            score = self.rule.score(seen)
            keep = self.rule.reaches(score, group)
            self.counts.add(self._phase, block.index, group, keep.sum(-1), index.shape[1], real)
        if self.watch is not None:
            self.watch(Routing.real(seen, real, base, block, score, keep))
        if self.drop is not None and drops:
            kept_tokens = ~self.drop.lost(group)[:, None].expand_as(weights)
            keep = kept_tokens if keep is None else keep & kept_tokens
        kept = index.numel() if keep is None else int(keep.sum())
        if keep is None or kept == index.numel():
            return base(hidden, index, weights)
        if not kept:
            return torch.zeros_like(hidden)
        if self.rule is None and block.scales_input:  # a drop alone is compared with the full forward, bit for bit
            return base(hidden, index, weights * keep)
        if block.scales_input:
            operator = self._operators[block.name] if self.use_operator else None
            experts: Any = block.experts
            return pairs.scaled(operator, experts._modes_base, hidden, index, weights, keep)
        out = None
        if self.use_operator and self.rule is not None:  # likewise
            out = self._operators[block.name](hidden, index, weights, keep)
        return pairs.survivors(base, hidden, index, weights, keep) if out is None else out

    # -- what layouts use -----------------------------------------------------------------------------------------------

    def layout_experts(self, name: str, computed: Computed, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(self._sets[name], computed.whole, hidden, index, weights)

    def only_rows(self, rows: Mapping[str, Tensor]) -> None:
        self._rows = rows

    def _routed(
        self,
        rule: Rule,
        tokens: tuple[Tensor, Tensor],
        block: MoEBlock,
        base: Base,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
    ) -> Tensor | None:
        """The block's output under the rule, decided on the device; None where the operator does not compute it."""
        placed, layer, top_k = self._place(hidden.device), block.index, index.shape[1]
        placed.use(rule)
        placed.start(self._forward, *tokens)
        if placed.keeps_all:
            placed.ran(layer, top_k, routed=False)
            return base(hidden, index, weights)
        reason = "the operator is switched off"
        if self.use_operator:
            operator = self._operators[block.name]
            score = None if rule.contribution is None else partial(_placed_score, placed, block, hidden, index, weights)
            where = placed.group, placed.tau, placed.scale(layer), placed.kept(layer)
            out = operator.routed(hidden, index, weights, *where, score)
            if out is not None:
                placed.ran(layer, top_k, routed=True)
                return out
            reason = operator.implementation.reason
        cannot_capture(hidden.device, block.name, reason)
        return None

    def _tokens_of(self, block: MoEBlock, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows.get(block.name)
        given = hidden.shape[0] if rows is None else rows.numel()
        if self._group is None or self._real is None or self._group.numel() != given:
            seen = None if self._group is None else self._group.numel()
            raise ModesError(
                f"the experts see {given} tokens, the model was given {seen}", hint="this family needs an adapter of its own"
            )
        if self._group.device != hidden.device:  # once for all layers there
            self._group, self._real = self._group.to(hidden.device), self._real.to(hidden.device)
        return (self._group, self._real) if rows is None else (self._group[rows], self._real[rows])

    def hand_over(self, rule: Rule, device: torch.device) -> None:
        """Put a rule's thresholds where forwards on `device` that were captured as CUDA graphs read them.

        Raises:
            KernelError: the rule is of another kind than the last one on that device, whose forwards compute something else.
        """
        self._place(device).replace(rule)

    # -- for a while --------------------------------------------------------------------------------------------------

    @contextmanager
    def using(
        self,
        *,
        rule: Rule | None = None,
        drop: Drop | None = None,
        watch: Callable[[Routing], None] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[PairCounts]:
        """Rule, drop and listeners for the length of a block, with fresh counts."""
        before = self.rule, self.drop, self.watch, self.trace
        self.rule, self.drop, self.watch, self.trace = rule, drop, watch, trace
        self.counts.reset()
        try:
            yield self.counts
        finally:
            self.rule, self.drop, self.watch, self.trace = before

    @contextmanager
    def answers_at(self, decoding: Tensor | None) -> Iterator[None]:
        """For forwards that hold answers as well as prompts: which tokens, (B, S) bool, count as `decode`."""
        before, self.decoding = self.decoding, decoding
        try:
            yield
        finally:
            self.decoding = before


# The operator's checks look at objects and addresses, which a traced graph does not have.
_routed_outside_the_graph: Callable[..., Tensor | None] = torch.compiler.disable(SkipEngine._routed)  # type: ignore[no-untyped-call]


def _placed_score(placed: Placed, block: MoEBlock, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """(tokens, k) float32: what the rule in use compares with its thresholds, computed on the device."""
    return placed.score(Pairs(block.index, pairs.score(block, weights), placed.group, index, hidden))
