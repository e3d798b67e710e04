"""`modes generate`: an answer from an exported bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modes_cli import console, options
from modes_cli.commands.verify import require_bundle
from modes_cli.errors import BadData

if TYPE_CHECKING:
    from modes_cli.requests import Generated


def generate(
    bundle: options.Bundle,
    prompt: Annotated[str, typer.Option(help="The question.", show_default=False)],
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file. Repeatable, in the order the prompt shows them.")
    ] = None,
    runtime: Annotated[
        options.Runtime, typer.Option(help="ort: the exported graphs; torch: the exported weights in transformers.")
    ] = options.Runtime.ort,
    tau: Annotated[
        list[str] | None, typer.Option(metavar="GROUP=TAU", help="Threshold instead of the bundle's own. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    device: options.DeviceOption = options.Device.auto,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Answer a question about an image with an exported bundle."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        thresholds = options.parse_tau(tau)
        for file in image or ():
            if not file.is_file():
                raise BadData(f"`{file}` is not a file", hint="`--image` takes an image file")
        require_bundle(bundle)
        from modes_cli.requests import GenerateRequest
        from modes_cli.runtime.generate import generate as answer

        generated = answer(
            GenerateRequest(bundle, tuple(image or ()), prompt, runtime.value, thresholds, max_new_tokens, device.value)
        )
        out.show(result(generated), generated.text)
        skipped = ", ".join(f"{group} {share:.1%}" for group, share in generated.skip_ratio.items())
        times = f"prefill {generated.prefill_seconds:.3f} s, decode {generated.decode_seconds:.3f} s"
        out.note(f"{generated.tokens} tokens; {times}; skipped: {skipped}")


def result(generated: "Generated") -> dict[str, Any]:
    """What scripts get of an answer."""
    return {
        "text": generated.text,
        "tokens": generated.tokens,
        "skip_ratio": generated.skip_ratio,
        "prefill_seconds": generated.prefill_seconds,
        "decode_seconds": generated.decode_seconds,
    }
