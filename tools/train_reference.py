"""Trains the built-in model `digits` and writes it, its processor and its training log to modes_cli/reference/.

python tools/train_reference.py                 # what made the committed weights; one thread, about 80 minutes
python tools/train_reference.py --images 2000   # a trial
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from reference.model import EXPERTS, HIDDEN, TOP_K, build_model, experts_of
from reference.packing import MERGE, PATCH, TEMPORAL, VISION_TOKENS, Packer, augmented_bank, dense_labels, question_batch
from reference.tokenizer import build_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from modes_cli.data import digits_vqa
from modes_cli.models.processor import ImageTextQwen3VLProcessor

PROBES = 30
POLISH = (12_000, 6_000)  # canvases of the last two stages
FLATTER = (1, 10, 60)  # times the weight of the flatness loss: before them, in the first, in the second
FIRST_WEIGHTS = {"read": 3.0, "row": 3.0, "color": 2.0, "name": 1.5, "exists": 1.5, "locate": 2.0, "count_color": 1.5}
DENSE_LAYER, SUMMARY_LAYER = 1, 4  # whose outputs the training-only heads read
OUT = Path(__file__).parent.parent / "modes_cli" / "reference"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=72_000, help="canvases to train on; 8 questions each")
    p.add_argument("--questions", type=int, default=8)
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--balance", type=float, default=0.01, help="weight of the expert balance loss")
    p.add_argument("--flat", type=float, default=0.003, help="weight of the loss that keeps a token's top-8 weights comparable")
    p.add_argument("--drop", type=float, default=0.1, help="share of rows that lose the first layer's routed experts")
    p.add_argument("--second-stage", type=int, default=21_600, help="canvases after which the summary heads join")
    p.add_argument("--start", type=Path, help="a checkpoint of this script at the end of its first stage, to go on from")
    p.add_argument("--every", type=int, default=100, help="steps between progress lines")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=OUT)
    return p.parse_args()


class TrainingHeads(nn.Module):
    """Used in training only; without them it sits on plateaus.

    On each vision token: digit, colour, row and column of its cell. On the token that closes the image: which digits there
    are, and how many of each colour.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.Linear(HIDDEN, n) for n in (11, 7, 3, 3)])
        self.digits = nn.Linear(HIDDEN, 10)
        self.colors = nn.Linear(HIDDEN, len(digits_vqa.COLOR_NAMES) * 10)

    def cells_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [B, 36, H], labels [4, B, 36]."""
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        losses = [F.cross_entropy(head(hidden).flatten(0, 1), labels[i].flatten()) for i, head in enumerate(self.cells)]
        return torch.stack(losses).sum()

    def summary_loss(self, hidden: Tensor, scenes: list[digits_vqa.Scene]) -> Tensor:
        """hidden [B, H]."""
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        present = torch.tensor([[float(d in s.digits) for d in range(10)] for s in scenes])
        filled = [[s.colors[cell] for cell in s.filled] for s in scenes]
        counts = torch.tensor([[colors.count(c) for c in range(len(digits_vqa.COLOR_NAMES))] for colors in filled])
        found = F.binary_cross_entropy_with_logits(self.digits(hidden), present) * 10
        return found + F.cross_entropy(self.colors(hidden).view(-1, 10), counts.view(-1)) * len(digits_vqa.COLOR_NAMES) / 2


def make_optimizer(model: nn.Module, heads: nn.Module, lr: float) -> torch.optim.Optimizer:
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others + list(heads.parameters()), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def router_losses(router_logits: tuple[Tensor, ...], real: Tensor) -> tuple[Tensor, Tensor]:
    """Balance: 1 when every expert is used equally. Flatness: 0 when a token's top-k weights are equal, k - 1 at worst."""
    balance, flat = [], []
    for logits in router_logits:
        probability = logits.float().softmax(-1)[real]
        top, index = probability.topk(TOP_K, -1)
        used = torch.zeros(EXPERTS).index_add_(0, index.reshape(-1), torch.ones(index.numel())) / len(probability)
        balance.append((used * probability.mean(0)).sum() * EXPERTS / TOP_K)
        flat.append((TOP_K * (top / top.sum(-1, keepdim=True)).square().sum(-1) - 1).mean())
    return torch.stack(balance).mean(), torch.stack(flat).mean()


@torch.no_grad()
def probe(model: nn.Module, packer: Packer, split: str, count: int, seed: int) -> dict[str, float]:
    """Exact match per kind of question. Teacher forcing is enough: greedy text is exact iff every argmax is right."""
    model.eval()
    rows = list(islice(digits_vqa.samples(split, seed), count))
    right: dict[str, list[bool]] = {kind: [] for kind in digits_vqa.KINDS}
    for start in range(0, count, 110):
        chunk = rows[start : start + 110]
        batch = packer.pack([(scene, [question]) for scene, question in chunk])
        predicted, wanted = model(**batch.inputs).logits[:, :-1].argmax(-1), batch.labels[:, 1:]
        exact = ((predicted == wanted) | (wanted == -100)).all(1).tolist()
        for (_, question), ok in zip(chunk, exact, strict=True):
            right[question.kind].append(ok)
    model.train()
    per_kind = {kind: sum(oks) / len(oks) for kind, oks in right.items()}
    return {"all": sum(sum(oks) for oks in right.values()) / count, **per_kind}


@torch.no_grad()
def importance(model: nn.Module, packer: Packer) -> list[float]:
    """KL at answer tokens when one layer's routed experts are off, normalised over the layers."""
    model.eval()
    batch = packer.pack([(s, [q]) for s, q in islice(digits_vqa.samples("validation", 3), 110)])
    answer = batch.labels[:, 1:] != -100

    def run() -> Tensor:
        return model(**batch.inputs).logits[:, :-1][answer].log_softmax(-1)

    full, damage = run(), []
    for experts in experts_of(model):
        experts.limit = 0
        damage.append(F.kl_div(run(), full, log_target=True, reduction="batchmean").item())
        experts.limit = TOP_K
    model.train()
    return [d / sum(damage) for d in damage]


def with_limit(model: nn.Module, limit: int, packer: Packer, split: str, count: int, seed: int) -> float:
    for experts in experts_of(model):
        experts.limit = limit
    accuracy = probe(model, packer, split, count, seed)["all"]
    for experts in experts_of(model):
        experts.limit = TOP_K
    return accuracy


def main() -> None:
    args = parse()
    options = {name: value for name, value in vars(args).items() if name not in ("out", "start", "every")}
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    packer, model = Packer(tokenizer), build_model(tokenizer)
    # Left alone, the first layer takes most of the importance; rows that train without it make later layers share the work.
    experts_of(model)[0].drop = args.drop
    seen_hidden: dict[int, Tensor] = {}
    for number in (DENSE_LAYER, SUMMARY_LAYER):
        layer = model.model.language_model.layers[number]
        layer.register_forward_hook(lambda _m, _i, out, n=number: seen_hidden.__setitem__(n, out))
    heads = TrainingHeads()
    optimizer = make_optimizer(model, heads, args.lr)
    weights = {kind: FIRST_WEIGHTS.get(kind, 0.8) for kind in digits_vqa.KINDS}
    bank, rng = augmented_bank(40, args.seed), Random(args.seed)
    log: list[dict[str, object]] = []
    started, seen, step, next_probe, average = time.time(), 0, 0, args.images // PROBES, None
    second_stage, stage_step = False, 0
    if args.start:
        model.load_state_dict(load_file(args.start / "model.safetensors"))
        before = json.loads((args.start / "training.json").read_text())
        log, seen, step = before["log"], before["images"], before["log"][-1]["step"]
        started -= before["log"][-1]["seconds"]
        accuracy = before["log"][-1]["validation"]
        weights = {k: 0.4 + 2.5 * (1 - accuracy[k]) for k in digits_vqa.KINDS}
        next_probe += seen
    polishes = 0  # begun
    while polishes < len(POLISH) and seen >= args.images + sum(POLISH[: polishes + 1]):
        polishes += 1
    while seen < args.images + sum(POLISH):
        begin = args.images + sum(POLISH[:polishes])
        if polishes < len(POLISH) and seen >= begin:
            # A short polish of what is still the weakest, with flatter top-8 weights each time.
            polish_from, polish_for = begin, POLISH[polishes]
            polishes, stage_step, rng = polishes + 1, 0, Random(args.seed + 2 + polishes)
            optimizer = make_optimizer(model, heads, args.lr)
            weights = {k: 0.2 + 8 * (1 - log[-1]["validation"][k]) for k in digits_vqa.KINDS}
        if args.second_stage <= seen < args.images and not second_stage:
            # By now cells are read but not yet searched; the summary heads teach that, with a fresh optimiser.
            second_stage, stage_step, rng = True, 0, Random(args.seed + 1)
            heads = TrainingHeads()
            optimizer = make_optimizer(model, heads, args.lr)
        progress = seen / args.images
        size = 8 if progress < 0.4 else 16 if progress < 0.75 or polishes else 32
        for group in optimizer.param_groups:  # warm up, hold, fall linearly over the last 55%
            group["lr"] = args.lr * min(1, (stage_step + 1) / 300) * (0.02 + 0.98 * min(1, max(0, 1 - progress) / 0.55))
            if polishes:
                left = 1 - (seen - polish_from) / polish_for
                group["lr"] = 0.4 * args.lr * min(1, (stage_step + 1) / 100) * left
        scenes = [digits_vqa.draw_scene(bank, rng) for _ in range(size)]
        batch = packer.pack(question_batch(scenes, args.questions, weights, rng))
        for experts in experts_of(model):
            experts.rows = size
        out = model.model(**batch.inputs, output_router_logits=True, use_cache=False)
        answer = batch.labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][answer]), batch.labels[:, 1:][answer])
        balance, flat = router_losses(out.router_logits, batch.real.reshape(-1))
        total = loss + args.balance * balance + args.flat * FLATTER[polishes] * flat
        start = packer.first_vision
        if progress < 0.7:
            vision = seen_hidden[DENSE_LAYER][:, start : start + VISION_TOKENS]
            total = total + 0.5 * (1 - progress / 0.7) * heads.cells_loss(vision, dense_labels(scenes))
        if second_stage and progress < 0.85:
            summary = seen_hidden[SUMMARY_LAYER][:, start + VISION_TOKENS]  # the token that closes the image
            total = total + 0.5 * (1 - progress / 0.85) * heads.summary_loss(summary, scenes)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, stage_step, seen = step + 1, stage_step + 1, seen + size
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % args.every == 0:
            seconds = time.time() - started
            print(f"{step} steps {seen} images {seconds:.0f}s loss {average:.4f} flat {flat:.3f}", flush=True)
        if seen >= next_probe:
            next_probe += args.images // PROBES
            accuracy = probe(model, packer, "validation", 440, 77)
            if accuracy["all"] > 0.3 and not polishes:  # from here on, ask more of what is not known yet
                weights = {k: 0.4 + 2.5 * (1 - accuracy[k]) for k in digits_vqa.KINDS}
            entry = {
                "step": step,
                "images": seen,
                "seconds": round(time.time() - started),
                "loss": average,
                "flat": flat.item(),
                "validation": accuracy,
            }
            if accuracy["all"] > 0.5:
                entry["top_k"] = {k: with_limit(model, k, packer, "validation", 220, 78) for k in (1, 0)}
                entry["importance"] = importance(model, packer)
            log.append(entry)
            print(json.dumps(entry), flush=True)
            write(args.out, model, tokenizer, {"options": options, "images": seen, "log": log})
    final = {
        "test": probe(model, packer, "test", 2200, 99),
        "top_k": {k: with_limit(model, k, packer, "test", 1100, 99) for k in (8, 4, 2, 1, 0)},
        "importance": importance(model, packer),
        "seconds": round(time.time() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(final), flush=True)
    write(args.out, model, tokenizer, {"options": options, "images": seen, "log": log, "final": final})


def write(out: Path, model: nn.Module, tokenizer: PreTrainedTokenizerFast, record: dict[str, object]) -> None:
    """The checkpoint as `save_pretrained` makes it, the processor beside it, and the log."""
    model.save_pretrained(out)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
        size={"shortest_edge": digits_vqa.SIDE**2, "longest_edge": digits_vqa.SIDE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    ImageTextQwen3VLProcessor(image_processor, tokenizer, tokenizer.chat_template).save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
