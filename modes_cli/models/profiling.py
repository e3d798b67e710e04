"""What a model's MoE layers do on sample data: expert use, how far they turn a token, what they cost: `modes profile`."""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from modes_cli import files
from modes_cli.artifacts import Profile
from modes_cli.artifacts.profile import LayerProfile
from modes_cli.data import batches, open_source
from modes_cli.fingerprint import fingerprint
from modes_cli.locks import one_writer
from modes_cli.models.blocks import MoEBlock
from modes_cli.models.groups import GROUPS, SKIPPABLE
from modes_cli.models.identity import identity
from modes_cli.models.inputs import Batch, measuring_batch
from modes_cli.models.loading import Loaded, load, versions
from modes_cli.requests import Outcome, ProfileRequest
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.engine import SkipEngine
from modes_cli.skipping.routing import Routing
from modes_cli.unfinished import State, Unfinished, file_name

UNFINISHED = file_name(Profile.FILE)


def profile_model(request: ProfileRequest) -> Outcome[Profile]:
    """Find the MoE layers and measure them; writes profile.json.

    Its `seconds` are measured times, so two runs do not give the same bytes; everything else does. Of a profile that was
    stopped and continued they are those of all its batches, each measured when it ran.

    Raises:
        BadModel, UnknownLayout: nothing that can be skipped was found.
        StaleArtifact: the run folder holds a profile made from something else.
        RunLocked: another command writes there.
    """
    run = RunFolder(request.run)
    with one_writer(run.path, "profile"):
        return _profile(request, run)


def _profile(request: ProfileRequest, run: RunFolder) -> Outcome[Profile]:
    source = open_source(request.data, text_only=request.model.text_only, progress=request.progress)
    options: dict[str, str | int | float | bool | None] = {
        "batch_size": request.batch_size,
        "text_only": request.model.text_only,
        "special": request.model.special,
    }
    expected = identity(request.model, source, options)
    if not request.fresh:
        kept = run.read_if_same(Profile, expected.flat, renew=expected.renew("profile", run))
        if kept is not None:
            files.remove(run.file(UNFINISHED))
            return Outcome(kept, run.file(Profile.FILE), reused=True)
    loaded = load(request.model)
    observer = _Observer(loaded)
    unfinished = Unfinished(run.file(UNFINISHED), fingerprint(expected.flat, loaded.path, loaded.device), request.progress)
    before = None if request.fresh else unfinished.restore()
    done = 0 if before is None else observer.resume(before)
    request.progress.start("profile", len(source))
    try:
        for number, samples in enumerate(batches(source, request.batch_size)):
            if number >= done:
                observer.see(measuring_batch(loaded, samples))
                if unfinished.due:
                    unfinished.save(observer.state(number + 1))
            request.progress.advance(len(samples))
    finally:
        observer.remove()
    first = loaded.blocks[0]
    artifact = Profile(
        model=loaded.info,
        data=expected.data,
        options=options,
        versions=versions(),
        family=loaded.family,
        moe_layers=len(loaded.blocks),
        experts=first.num_experts,
        top_k=first.top_k,
        hidden_size=first.hidden_size,
        expert_intermediate_size=first.intermediate_size,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        expert_parameters=sum(p.numel() for block in loaded.blocks for part in block.sets for p in part.experts.parameters()),
        layers=[observer.layer(block) for block in loaded.blocks],
        tokens=observer.tokens(),
    )
    path = run.write(artifact)
    unfinished.remove()
    return Outcome(artifact, path)


class _Observer:
    """Sums over batches, per layer and token group."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        layers, groups, experts = len(loaded.blocks), len(GROUPS), loaded.blocks[0].num_experts
        self.usage = torch.zeros(layers, groups, experts, dtype=torch.int64)
        self.angle = torch.zeros(layers, groups, dtype=torch.float64)
        self.top = torch.zeros(layers, groups, dtype=torch.float64)
        self.count = torch.zeros(layers, groups, dtype=torch.int64)
        self.seconds = [0.0] * layers
        self.engine = SkipEngine(loaded.model, loaded.blocks, loaded.tokens)
        self._update: Tensor | None = None
        self._started = 0.0
        self._handles = [handle for block in loaded.blocks for handle in self._hook(block)]

    def state(self, done: int) -> State:
        """All sums after so many batches."""
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        sums = {"usage": self.usage, "angle": self.angle, "top": self.top, "count": self.count, "seconds": seconds}
        return State(done, sums)

    def resume(self, before: State) -> int:
        """Go on from what `state` gave; how many batches were done."""
        sums = before.tensors
        self.usage, self.angle, self.top, self.count = sums["usage"], sums["angle"], sums["top"], sums["count"]
        self.seconds = sums["seconds"].tolist()
        return before.done

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.engine.remove()

    @torch.no_grad()
    def see(self, batch: Batch) -> None:
        self._group = self.loaded.tokens.of(batch.inputs["input_ids"]).long().reshape(-1)
        self._real = batch.inputs["attention_mask"].bool().reshape(-1)
        nowhere = torch.zeros_like(batch.answer)  # questions and answers are one text here
        with self.engine.using(watch=self._routing), self.engine.answers_at(nowhere):
            model: Any = self.loaded.model
            model(**batch.inputs, use_cache=False, logits_to_keep=1)

    def _routing(self, routing: Routing) -> None:
        group = routing.group.long()
        experts = self.usage.shape[-1]
        flat = routing.experts + group[:, None] * experts
        self.usage[routing.layer] += torch.bincount(flat.reshape(-1), minlength=self.usage[0].numel()).cpu().view(-1, experts)
        self.count[routing.layer] += torch.bincount(group, minlength=len(GROUPS)).cpu()
        self.top[routing.layer].index_add_(0, group.cpu(), routing.pi.amax(-1).double().cpu())

    def _hook(self, block: MoEBlock) -> list[Any]:
        model = self.loaded.model
        moe = model.get_submodule(block.moe)
        layer = model.get_submodule(block.name.split(f".layers.{block.layer}.")[0] + f".layers.{block.layer}")

        def start(*_: Any) -> None:
            _wait(self.loaded.device)
            self._started = time.perf_counter()

        def stop(*_: Any) -> None:
            _wait(self.loaded.device)
            self.seconds[block.index] += time.perf_counter() - self._started

        def moe_done(_module: nn.Module, _args: Any, output: Any) -> None:
            self._update = output if isinstance(output, Tensor) else output[0]

        def layer_done(_module: nn.Module, _args: Any, output: Any) -> None:
            after = output if isinstance(output, Tensor) else output[0]
            if self._update is not None:
                self._turn(block.index, after, self._update.reshape(after.shape))
                self._update = None

        return [
            *(part.experts.register_forward_pre_hook(start) for part in block.sets),
            *(part.experts.register_forward_hook(stop) for part in block.sets),
            moe.register_forward_hook(moe_done),
            layer.register_forward_hook(layer_done),
        ]

    def _turn(self, layer: int, after: Tensor, update: Tensor) -> None:
        """Angle between the residual stream before and after the block; `after` = before + update in every family."""
        after, update = after.double().flatten(0, 1), update.double().flatten(0, 1)
        cosine = nn.functional.cosine_similarity(after - update, after, dim=-1).clamp(-1, 1)
        degrees = cosine.arccos().rad2deg()[self._real].cpu()
        self.angle[layer].index_add_(0, self._group[self._real].cpu(), degrees)

    def layer(self, block: MoEBlock) -> LayerProfile:
        i = block.index
        present = [(g, name) for g, name in enumerate(SKIPPABLE) if self.count[i, g] > 0]
        return LayerProfile(
            layer=block.layer,
            expert_usage_entropy={name: _entropy(self.usage[i, g]) for g, name in present},
            update_angle={name: float(self.angle[i, g] / self.count[i, g]) for g, name in present},
            pi_top1={name: float(self.top[i, g] / self.count[i, g]) for g, name in present},
            seconds=self.seconds[i],
        )

    def tokens(self) -> dict[str, int]:
        found = {name: int(self.count[0, g]) for g, name in enumerate(GROUPS)}
        return {name: count for name, count in found.items() if count or name not in ("decode", "audio")}


def _entropy(counts: Tensor) -> float:
    """Entropy of expert use over its maximum, log E: 0..1."""
    p = counts.double() / counts.sum()
    return float(-(p * p.clamp_min(1e-300).log()).sum() / math.log(max(counts.numel(), 2)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
