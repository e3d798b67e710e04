"""A run folder as after every command: the example artifacts, with routing scores and more than one policy and target."""

import numpy as np
import torch
from safetensors.torch import save

from modes_cli import files
from modes_cli.artifacts import Bench, Calibration, Evaluation, Thresholds
from modes_cli.artifacts.evaluation import ChangedAnswer, LeftOut, PolicyAccuracy
from modes_cli.artifacts.thresholds import Alternative, DistinctExperts, FrontierEntry, SearchResult
from modes_cli.calibration.scores import ScoreHistogram
from modes_cli.models.groups import DECODE, GROUPS, SPECIAL, TEXT, VISION
from modes_cli.run_folder import RunFolder
from modes_cli.skipping.measured import Measured
from modes_cli.skipping.policy import Policy, routing_probability
from modes_cli.skipping.registry import policy
from tests import examples

POLICIES = {
    "grouped": 0.4,
    "tempered": 0.6,
    "modes": 1.0,
    "threshold": 1.4,
    "topk": 2.0,
    "a-policy-with-a-long-name": 3.0,
    "random": 40.0,
}
TARGETS = (0.5, 0.67, 0.75, 0.88)
LONG = "Which of these <i>four</i>\nA) one\nB) " + "aVeryLongWordWithoutAnySpaces" * 6


def pairs(layers: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """pi (layers, tokens, k) and the group of each token, (tokens,)."""
    made = torch.Generator().manual_seed(0)
    group = torch.tensor([TEXT] * 60 + [VISION] * 200 + [DECODE] * 20 + [SPECIAL] * 10)
    logits = torch.randn(layers, len(group), top_k, generator=made) * (0.3 + 0.1 * torch.arange(layers)[:, None, None])
    return torch.stack([routing_probability(layer.softmax(1)) for layer in logits]), group


def fill(folder: RunFolder, rule: str = "grouped") -> Calibration:
    """Everything. `rule`: the policy of every result; its thresholds are those that skip half of each group."""
    examples.fill_run(folder.path)
    calibration: Calibration = examples.artifact("calibration")
    pi, group = pairs(calibration.moe_layers, calibration.top_k)
    scores = ScoreHistogram(calibration.moe_layers)
    for layer in range(calibration.moe_layers):
        scores.add(layer, pi[layer], group)
    made = torch.Generator().manual_seed(1)
    norms = torch.rand(calibration.moe_layers, len(GROUPS), calibration.experts, generator=made) + 0.5
    data = save({"score_histogram": scores.counts, "output_norm": norms})
    tensors = folder.write_tensors("calibration.safetensors", data, Calibration)
    tokens = {"text": 60, "vision": 200, "decode": 20, "special": 10}
    calibration = calibration.model_copy(update={"tensors": tensors, "tokens": tokens})
    folder.write(calibration)
    found = thresholds(calibration, folder, policy(rule))
    folder.write(found)
    folder.write(evaluation(files.sha256(folder.file(Thresholds.FILE))))
    bench: Bench = examples.artifact("bench")
    folder.write(bench.model_copy(update={"notes": ["One runtime was not found."]}))
    return calibration


def thresholds(calibration: Calibration, folder: RunFolder, rule: Policy) -> Thresholds:
    given: Thresholds = examples.artifact("thresholds")
    goals = [(target, None) for target in TARGETS] + [(TARGETS[-1], 0.8)]
    results = [result(calibration, folder, rule, target, decode) for target, decode in goals]
    frontier = [
        FrontierEntry(
            target=target,
            policy=name,
            parameters={},
            tau={"text": 0.1, "vision": 0.1},
            skip_ratio=target,
            skip_ratio_per_group={"text": target, "vision": target},
            kl=kl(target, price),
            share=0.5 if target < 0.6 else 1.0,
        )
        for name, price in sorted(POLICIES.items())
        for target in (0.1, 0.3, *TARGETS)
    ]
    digest = files.sha256(folder.file(Calibration.FILE))
    update = {"calibration": digest, "results": results, "frontier": frontier, "groups": list(calibration.groups)}
    return Thresholds.model_validate({**given.model_dump(), **{name: dump(value) for name, value in update.items()}})


def dump(value: object) -> object:
    return [one if isinstance(one, str) else one.model_dump() for one in value] if isinstance(value, list) else value


def kl(target: float, price: float) -> float:
    return 0.0 if target < 0.2 and price < 0.5 else price * 0.002 * float(np.expm1(6 * target))


def result(calibration: Calibration, folder: RunFolder, rule: Policy, target: float, decode: float | None) -> SearchResult:
    """Thresholds that skip half of the pairs of each group, whatever the target; the ratios beside are the example's kind."""
    pi, group = pairs(calibration.moe_layers, calibration.top_k)
    plain = rule.rule(Measured(calibration, folder), {})
    middle = {}
    for name, number in (("text", TEXT), ("vision", VISION), ("decode", DECODE)):
        scales = [plain.score_scale[layer, number].mean() for layer in range(len(pi))]  # of experts, if they have their own
        values = torch.cat([scale * one[group == number].reshape(-1) for scale, one in zip(scales, pi, strict=True)])
        middle[name] = float(values.median())
    ratios = {"text": target - 0.03, "vision": min(1.0, target + 0.05), "decode": decode or target * 0.6}
    middle_layer = (len(calibration.importance) - 1) / 2
    layers = {
        name: {**ratios, "all": target + 0.001 + 0.003 * (place - middle_layer)}
        for place, name in enumerate(calibration.importance)
    }
    damage = kl(target, 0.5)
    others = [
        Alternative(policy=name, parameters={}, tau={"text": 0.1}, skip_ratio=target, kl=damage, kl_selection=damage, share=1.0)
        for name in ("grouped", "modes", "tempered")
    ]
    return SearchResult(
        target=target,
        decode_target=decode,
        policy=rule.name,
        parameters=rule.parameters,
        tau=middle,
        skip_ratio=target + 0.001,
        skip_ratio_per_group=ratios,
        skip_ratio_per_layer=layers,
        kl=damage,
        kl_selection=damage,
        kl_held_out=damage * 1.1,
        predicted_skip_ratio=0.5,  # as they are the same thresholds
        model_passes=12.0,
        distinct_experts=[
            DistinctExperts(batch=batch, full=8.0 * batch**0.3, skipped=5.0 * batch**0.3) for batch in (1, 8, 64)
        ],
        frontier=[{"tau": middle, "skip_ratio": target + 0.001 * step, "kl": damage * (1 + step)} for step in range(4)],
        alternatives=others,
    )


def evaluation(digest: str) -> Evaluation:
    given: Evaluation = examples.artifact("evaluation")
    comparison = []
    for target, decode in [(target, None) for target in TARGETS] + [(TARGETS[-1], 0.8)]:
        for name, price in POLICIES.items():
            retained = max(0.05, 1 - 0.0008 * price * float(np.exp(4 * target)))
            comparison.append(
                PolicyAccuracy(
                    policy=name,
                    parameters={"power": 0.25} if name == "tempered" else {},
                    target=target,
                    decode_target=decode,
                    tau={"text": 0.1},
                    skip_ratio={"all": target, "text": target, "vision": target, "decode": target / 2},
                    kl=kl(target, price),
                    accuracy=retained * given.full,
                    retained=retained,
                    interval=None if name == "topk" else {"low": retained - 0.02, "high": retained + 0.01},
                    ahead=0.0 if name == "grouped" else (retained - 0.99) * given.full,
                    ahead_low=-0.03,
                    ahead_high=-0.01 if price > 1 else 0.01,
                    ties_best=price < 1,
                    chosen=name == "grouped",
                )
            )
    image = next(one.image for one in given.changed if one.image)
    changed = [
        ChangedAnswer(
            id=f"s{i}", task="read", question=LONG if i % 2 else "What?", answer="3", full="3", skipped="", image=image
        )
        for i in range(5)
    ]
    left_out = [LeftOut(policy="mcmoe", target=0.88, decode_target=None, reason="keeps at least one expert of each token")]
    update = {
        "thresholds": digest,
        "target": 0.75,
        "comparison": [one.model_dump() for one in comparison],
        "changed": [*(one.model_dump() for one in changed), *(one.model_dump() for one in given.changed)],
        "left_out": [one.model_dump() for one in left_out],
    }
    return Evaluation.model_validate({**given.model_dump(), **update})
