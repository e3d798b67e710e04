"""`modes bench`: what skipping saves in time."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options
from modes_cli.commands.evaluate import model_of
from modes_cli.errors import BadOption

if TYPE_CHECKING:
    from modes_cli.artifacts import Bench
    from modes_cli.data.sample import DataSpec

DEFAULT_BATCHES = (1, 8)


def bench(
    bundle: options.BundleOption = None,
    target: options.Target = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size to time. Repeatable.  (default: 1 and 8)", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each case; the median counts.")] = 15,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Time a random decoder instead: qwen3-vl-30b-a3b, or tiny.", show_default=False),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of that decoder.  (default: all)", show_default=False)
    ] = None,
    stock: Annotated[
        bool | None,
        typer.Option(
            "--stock/--no-stock",
            help="Also the same model exported with ONNX Runtime's own operators.  (default: with --bundle)",
            show_default=False,
        ),
    ] = None,
    device: options.DeviceOption = options.Device.auto,
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
        columns = image_column, question_column, answer_column
        if shape is None:
            if layers is not None:
                raise BadOption(f"`--layers {layers}` says how many layers `--shape` has", hint="give `--shape` too")
            spec = options.evaluation_data(model_of(run, bundle), data, split, samples, seed, columns)
        else:
            if stock:
                raise BadOption("`--stock` means nothing with `--shape`", hint="a shape is timed in PyTorch only")
            spec = _random_data(seed, bundle=bundle, target=target, data=data, split=split, samples=samples)
        from modes_cli.benchmark import bench as measure
        from modes_cli.requests import BenchRequest

        batches = tuple(dict.fromkeys(batch or DEFAULT_BATCHES))
        outcome = measure(
            BenchRequest(spec, run, bundle, target, batches, repeats, shape, layers, device.value, fresh, out.progress, stock)
        )
        out.show(result(outcome.artifact), *tables(outcome.artifact), f"written: {outcome.path}", artifact=outcome.path)


def _random_data(seed: int, **others: object) -> "DataSpec":
    """For a shape, whose tokens are random: nothing else may say what the data or the model is."""
    for name, value in others.items():
        if value is not None:
            raise BadOption(
                f"`--{name} {value}` means nothing with `--shape`", hint="a shape has random weights and random tokens"
            )
    from modes_cli.data.sample import DataSpec

    return DataSpec("random", None, None, seed)


def result(found: "Bench") -> dict[str, Any]:
    """What scripts get of a benchmark; `over_stock` of a case where stock operators were measured."""
    return {"cases": [case.model_dump(exclude_none=True) for case in found.cases], "machine": found.machine.model_dump()}


def tables(found: "Bench") -> list[Any]:
    """What people get of a benchmark."""
    columns = ["phase", "tokens", "batch", "runtime", "skipped", "seconds", "speedup", "of the limit"]
    rows: list[list[Any]] = [
        [c.phase, c.tokens, c.batch, c.runtime, c.skip_ratio, c.seconds, f"{c.speedup:.2f}x", f"{c.limit_fraction:.0%}"]
        for c in found.cases
    ]
    if any(c.over_stock is not None for c in found.cases):
        columns.append("over stock")
        for row, c in zip(rows, found.cases, strict=True):
            row.append("" if c.over_stock is None else f"{c.over_stock:.2f}x")
    machine = found.machine
    limits = f"{machine.peak_flops / 1e9:,.0f} GFLOP/s, {machine.read_bandwidth / 1e9:,.1f} GB/s"
    return [
        console.table("Time", columns, rows),
        f"{machine.cpu}, {machine.threads} threads, {machine.device}: measured limits {limits}",
        *(f"note: {note}" for note in found.notes),
    ]
