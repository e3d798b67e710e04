"""`modes export`: the bundle that deploys."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options

if TYPE_CHECKING:
    from modes_cli.requests import Exported


def export(
    format: Annotated[
        options.Format, typer.Option(help="onnx: weights and graphs; safetensors: weights only.")
    ] = options.Format.onnx,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write.  (default: RUN/bundle)", show_default=False)
    ] = None,
    target: options.Target = None,
    decode_target: options.DecodeTarget = None,
    quantize: Annotated[
        options.Quantize | None,
        typer.Option(help="Expert weights in 8 or 4 bits.  (default: as calibrated)", show_default=False),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    run: options.RunDir = None,
    fresh: options.Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write weights, thresholds, graphs and kernels as one folder that runs."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        for option, share in (("--target", target), ("--decode-target", decode_target)):
            if share is not None:
                options.require_share(option, share)
        from modes_cli.export import export_bundle
        from modes_cli.requests import ExportRequest

        asked = (run, output, target, format.value, trust_remote_code, fresh, out.progress, decode_target)
        exported = export_bundle(ExportRequest(*asked, quantize and quantize.value))
        for note in exported.notes:
            out.note(f"note: {note}")
        out.show(result(exported), *tables(exported), artifact=exported.path / "bundle.json")


def result(exported: "Exported") -> dict[str, Any]:
    """What scripts get of an export."""
    return {"bundle": str(exported.path), "files": [file.path for file in exported.bundle.files], "peak_rss": exported.peak_rss}


def tables(exported: "Exported") -> list[Any]:
    """What people get of an export."""
    rows = [[file.path, f"{file.bytes:,}"] for file in exported.bundle.files]
    return [
        console.table("Bundle", ["file", "bytes"], rows),
        f"written: {exported.path} (peak memory {exported.peak_rss / 1e6:,.0f} MB)",
    ]
