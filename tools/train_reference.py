"""Trains a small model and writes it, its processor and its training log.

python tools/train_reference.py                 # the built-in model `digits`, to modes_cli/reference/; one thread, 80 minutes
python tools/train_reference.py --images 2000   # a trial
python tools/train_reference.py --task tiles --model kimi_vl --out FOLDER   # the second model; one thread, 30 minutes
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from reference.model import experts_of
from reference.packing import VISION_TOKENS, question_batch
from safetensors.torch import load_file
from torch import Tensor, nn
from train_models import MODELS, Trained
from train_tasks import TASKS, Task

DENSE_LAYER, SUMMARY_LAYER = 1, 4  # whose outputs the training-only heads read
BUILT_IN = Path(__file__).parent.parent / "modes_cli" / "reference"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=TASKS, default="digits")
    p.add_argument("--model", choices=MODELS, default="qwen3_vl_moe")
    p.add_argument("--images", type=int, help="canvases to train on; 8 questions each")
    p.add_argument("--questions", type=int, default=8)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--balance", type=float, help="weight of the expert balance loss")
    p.add_argument("--bias-rate", type=float, help="what a step moves the bias of an expert's choice by, where there is one")
    p.add_argument("--flat", type=float, help="weight of the loss that keeps a token's top-k weights comparable")
    p.add_argument("--evidence", type=float, help="weight of the loss that says where to look; 0 for qwen3_vl_moe, without one")
    p.add_argument("--drop", type=float, help="share of rows that lose the first routed layer's experts")
    p.add_argument("--second-stage", type=int, help="canvases after which the summary heads join")
    p.add_argument("--start", type=Path, help="a checkpoint of this script at the end of its first stage, to go on from")
    p.add_argument("--every", type=int, default=100, help="steps between progress lines")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    recipe, model = TASKS[args.task].recipe, MODELS[args.model]
    defaults = {"images": recipe.images, "balance": model.balance, "bias_rate": model.bias_rate, "flat": recipe.flat}
    defaults |= {"drop": recipe.drop, "second_stage": recipe.second_stage, "evidence": recipe.evidence}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out is None:
        if (args.task, args.model) != ("digits", "qwen3_vl_moe"):
            p.error("--out is needed: only the built-in model has a place of its own")
        args.out = BUILT_IN
    return args


class TrainingHeads(nn.Module):
    """Used in training only; without them it sits on plateaus.

    On each vision token: the attributes, row and column of its cell. On the token that closes the image: what there is, and
    how many of each group.
    """

    def __init__(self, task: Task, hidden: int) -> None:
        super().__init__()
        self.task = task
        self.cells = nn.ModuleList([nn.Linear(hidden, n) for n in task.cell_classes])
        self.present = nn.Linear(hidden, task.present)
        self.counts = nn.Linear(hidden, task.groups * 10)

    def cells_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [B, 36, H], labels [4, B, 36]."""
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        losses = [F.cross_entropy(head(hidden).flatten(0, 1), labels[i].flatten()) for i, head in enumerate(self.cells)]
        return torch.stack(losses).sum()

    def summary_loss(self, hidden: Tensor, scenes: list[Any]) -> Tensor:
        """hidden [B, H]."""
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        present, counts = self.task.summary_labels(scenes)
        found = F.binary_cross_entropy_with_logits(self.present(hidden), present) * 10
        return found + F.cross_entropy(self.counts(hidden).view(-1, 10), counts.view(-1)) * self.task.groups / 2


def make_optimizer(model: nn.Module, heads: nn.Module, lr: float) -> torch.optim.Optimizer:
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others + list(heads.parameters()), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def probe(task: Task, trained: Trained, split: str, count: int, seed: int) -> dict[str, float]:
    """Exact match per kind of question. Teacher forcing is enough: greedy text is exact iff every argmax is right."""
    model = trained.model.eval()
    rows = list(islice(task.samples(split, seed), count))
    right: dict[str, list[bool]] = {kind: [] for kind in task.kinds}
    for start in range(0, count, 110):
        chunk = rows[start : start + 110]
        batch = trained.packer.pack([(scene, [question]) for scene, question in chunk])
        predicted, wanted = model(**batch.inputs).logits[:, :-1].argmax(-1), batch.labels[:, 1:]
        exact = ((predicted == wanted) | (wanted == -100)).all(1).tolist()
        for (_, question), ok in zip(chunk, exact, strict=True):
            right[question.kind].append(ok)
    model.train()
    per_kind = {kind: sum(oks) / len(oks) for kind, oks in right.items()}
    return {"all": sum(sum(oks) for oks in right.values()) / count, **per_kind}


@torch.no_grad()
def importance(task: Task, trained: Trained) -> list[float]:
    """KL at answer tokens when one layer's routed experts are off, normalised over the layers."""
    model = trained.model.eval()
    batch = trained.packer.pack([(s, [q]) for s, q in islice(task.samples("validation", 3), 110)])
    answer = batch.labels[:, 1:] != -100

    def run() -> Tensor:
        return model(**batch.inputs).logits[:, :-1][answer].log_softmax(-1)

    full, damage = run(), []
    for experts in experts_of(model):
        experts.limit = 0
        damage.append(F.kl_div(run(), full, log_target=True, reduction="batchmean").item())
        experts.limit = trained.top_k
    model.train()
    return [d / sum(damage) for d in damage]


def with_limit(task: Task, trained: Trained, limit: int, split: str, count: int, seed: int) -> float:
    for experts in experts_of(trained.model):
        experts.limit = limit
    accuracy = probe(task, trained, split, count, seed)["all"]
    for experts in experts_of(trained.model):
        experts.limit = trained.top_k
    return accuracy


def main() -> None:
    args = parse()
    options = {name: value for name, value in vars(args).items() if name not in ("out", "start", "every")}
    task, polish, flatter = TASKS[args.task], TASKS[args.task].recipe.polish, TASKS[args.task].recipe.flatter
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    trained = MODELS[args.model](task.corpus())
    packer, model = trained.packer, trained.model
    # Left alone, the first layer takes most of the importance; rows that train without it make later layers share the work.
    experts_of(model)[0].drop = args.drop
    seen_hidden: dict[int, Tensor] = {}
    for number in (DENSE_LAYER, SUMMARY_LAYER):
        layer = trained.layers[number]
        layer.register_forward_hook(lambda _m, _i, out, n=number: seen_hidden.__setitem__(n, out))
    heads = TrainingHeads(task, trained.hidden)
    optimizer = make_optimizer(model, heads, args.lr)
    weights = {kind: task.recipe.first_weights.get(kind, 0.8) for kind in task.kinds}
    bank, rng = task.bank(args.seed), Random(args.seed)
    log: list[dict[str, object]] = []
    started, seen, step, next_probe, average = time.time(), 0, 0, args.images // task.recipe.probes, None
    second_stage, stage_step, cells_loss, looked = False, 0, 0.0, 0.0
    if args.start:
        state = load_file(args.start / "model.safetensors")
        model.load_state_dict(trained.state_of(state))
        before = json.loads((args.start / "training.json").read_text())
        log, seen, step = before["log"], before["images"], before["log"][-1]["step"]
        started -= before["log"][-1]["seconds"]
        accuracy = before["log"][-1]["validation"]
        weights = {k: 0.4 + 2.5 * (1 - accuracy[k]) for k in task.kinds}
        next_probe += seen
    polishes = 0  # begun
    while polishes < len(polish) and seen >= args.images + sum(polish[: polishes + 1]):
        polishes += 1
    while seen < args.images + sum(polish):
        begin = args.images + sum(polish[:polishes])
        if polishes < len(polish) and seen >= begin:
            # A short polish of what is still the weakest, with flatter top-8 weights each time.
            polish_from, polish_for = begin, polish[polishes]
            polishes, stage_step, rng = polishes + 1, 0, Random(args.seed + 2 + polishes)
            optimizer = make_optimizer(model, heads, args.lr)
            weights = {k: 0.2 + 8 * (1 - log[-1]["validation"][k]) for k in task.kinds}
        if args.second_stage <= seen < args.images and not second_stage:
            # By now cells are read but not yet searched; the summary heads teach that, with a fresh optimiser.
            second_stage, stage_step, rng = True, 0, Random(args.seed + 1)
            heads = TrainingHeads(task, trained.hidden)
            optimizer = make_optimizer(model, heads, args.lr)
        progress = seen / args.images
        size = 16 if polishes else next(size for until, size in task.recipe.batches if progress < until)
        for group in optimizer.param_groups:  # warm up, hold, fall linearly over the last 55%
            group["lr"] = (
                args.lr * min(1, (stage_step + 1) / task.recipe.warm_up) * (0.02 + 0.98 * min(1, max(0, 1 - progress) / 0.55))
            )
            if polishes:
                left = 1 - (seen - polish_from) / polish_for
                group["lr"] = 0.4 * args.lr * min(1, (stage_step + 1) / 100) * left
        scenes = [task.draw(bank, rng) for _ in range(size)]
        rows = question_batch(scenes, args.questions, weights, rng, task.ask)
        batch = packer.pack(rows)
        for experts in experts_of(model):
            experts.rows = size
        answer, real = batch.labels[:, 1:] != -100, batch.real.reshape(-1)
        loss = F.cross_entropy(trained.answers(batch, answer), batch.labels[:, 1:][answer])
        balance, flat = trained.router_losses(real)
        total = loss + args.balance * balance + args.flat * flatter[polishes] * flat
        start = packer.first_vision
        if progress < task.recipe.helped:
            vision = seen_hidden[DENSE_LAYER][:, start : start + VISION_TOKENS]
            cells_loss = heads.cells_loss(vision, task.cell_labels(scenes))
            total = total + 0.5 * (1 - progress / task.recipe.helped) * cells_loss
            if args.evidence:
                looked = trained.evidence_loss(answer, [question.cells for _, own in rows for question in own])
                total = total + args.evidence * (1 - progress / task.recipe.helped) * looked
        if second_stage and progress < 0.85:
            summary = seen_hidden[SUMMARY_LAYER][:, start + VISION_TOKENS]  # the token that closes the image
            total = total + 0.5 * (1 - progress / 0.85) * heads.summary_loss(summary, scenes)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        uneven = trained.after_step(real, args.bias_rate * min(1, optimizer.param_groups[0]["lr"] / args.lr * 4))
        optimizer.zero_grad(set_to_none=True)
        step, stage_step, seen = step + 1, stage_step + 1, seen + size
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % args.every == 0:
            seconds = time.time() - started
            print(f"{step} steps {seen} images {seconds:.0f}s loss {average:.4f} flat {flat:.3f}", end=" ")
            print(f"uneven {uneven} cells {cells_loss:.3f} looked {looked:.3f}", flush=True)
        if seen >= next_probe:
            next_probe += args.images // task.recipe.probes
            accuracy = probe(task, trained, "validation", 40 * len(task.kinds), 77)
            if accuracy["all"] > task.recipe.adapt_from and not polishes:  # from here on, ask more of what is not known yet
                weights = {k: 0.4 + 2.5 * (1 - accuracy[k]) for k in task.kinds}
            entry = {
                "step": step,
                "images": seen,
                "seconds": round(time.time() - started),
                "loss": average,
                "flat": flat.item(),
                "validation": accuracy,
            }
            if accuracy["all"] > 0.5 and task.recipe.watch:
                entry["top_k"] = {k: with_limit(task, trained, k, "validation", 20 * len(task.kinds), 78) for k in (1, 0)}
                entry["importance"] = importance(task, trained)
            log.append(entry)
            print(json.dumps(entry), flush=True)
            write(args.out, trained, {"options": options, "images": seen, "log": log})
    final = {
        "test": probe(task, trained, "test", 200 * len(task.kinds), 99),
        "top_k": {k: with_limit(task, trained, k, "test", 100 * len(task.kinds), 99) for k in (trained.top_k, 4, 2, 1, 0)},
        "importance": importance(task, trained),
        "seconds": round(time.time() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(final), flush=True)
    write(args.out, trained, {"options": options, "images": seen, "log": log, "final": final})


def write(out: Path, trained: Trained, record: dict[str, object]) -> None:
    """The checkpoint, the processor beside it, and the log."""
    trained.save(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
