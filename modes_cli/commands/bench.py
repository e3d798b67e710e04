"""`modes bench`: what skipping saves in time."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options
from modes_cli.commands.evaluate import model_of

if TYPE_CHECKING:
    from modes_cli.artifacts import Bench


DEFAULT_BATCHES = (1, 8)


def bench(
    bundle: options.BundleOption = None,
    target: options.Target = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size to time. Repeatable.  (default: 1 and 8)", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each case; the median counts.")] = 15,
    data: options.Data = None,
    split: options.Split = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    image_column: options.ImageColumn = None,
    question_column: options.QuestionColumn = None,
    answer_column: options.AnswerColumn = None,
    run: options.RunDir = None,
    fresh: options.Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Time prefill and decode, full and skipped, against other runtimes and the machine's limit."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        if target is not None:
            options.require_share("--target", target)
        spec = options.evaluation_data(
            model_of(run, bundle), data, split, samples, seed, (image_column, question_column, answer_column)
        )
        from modes_cli.benchmark import bench as measure
        from modes_cli.requests import BenchRequest

        outcome = measure(
            BenchRequest(
                spec, run, bundle, target, tuple(dict.fromkeys(batch or DEFAULT_BATCHES)), repeats, fresh, out.progress
            )
        )
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)


def result(found: "Bench") -> dict[str, Any]:
    """What scripts get of a benchmark."""
    return {"cases": [case.model_dump() for case in found.cases], "machine": found.machine.model_dump()}


def tables(found: "Bench") -> list[Any]:
    """What people get of a benchmark."""
    columns = ["phase", "tokens", "batch", "runtime", "skipped", "seconds", "speedup", "of the limit"]
    rows = [
        [c.phase, c.tokens, c.batch, c.runtime, c.skip_ratio, c.seconds, f"{c.speedup:.2f}x", f"{c.limit_fraction:.0%}"]
        for c in found.cases
    ]
    machine = found.machine
    limits = f"{machine.peak_flops / 1e9:,.0f} GFLOP/s, {machine.read_bandwidth / 1e9:,.1f} GB/s"
    return [
        console.table("Time", columns, rows),
        f"{machine.cpu}, {machine.threads} threads, {machine.device}: measured limits {limits}",
    ]
