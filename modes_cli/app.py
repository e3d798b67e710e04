"""`modes`: the names of the commands, and how the process ends. Imports no torch."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from modes_cli import failures, ranks
from modes_cli.commands import bench, calibrate, demo, doctor, evaluate, export, generate, profile, report, search, verify

app = typer.Typer(
    name="modes",
    help="Run a mixture-of-experts multimodal model faster by skipping the experts that a token does not need.",
    epilog="`modes demo` shows every step on a built-in model.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
STEPS: tuple[Callable[..., None], ...] = (
    profile.profile,
    calibrate.calibrate,
    search.search,
    export.export,
    verify.verify,
    generate.generate,
    evaluate.evaluate,
)
TOOLS: tuple[Callable[..., None], ...] = (bench.bench, report.report, demo.demo, doctor.doctor)
for panel, commands in (("Steps", STEPS), ("Tools", TOOLS)):
    for command in commands:
        app.command(rich_help_panel=panel)(command)


def _show_version(value: bool) -> None:
    if value:
        import modes_cli

        typer.echo(f"modes {modes_cli.__version__}")
        raise typer.Exit


@app.callback()
def modes(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with the documented exit code."""
    # torch's OpenMP threads spin while they wait. On a machine that does something else too, that made 8 seconds of
    # calibration 4 minutes; sleeping threads do not. Read when torch is imported; a user's own setting stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line. Commands report what goes wrong inside them; here end usage errors and the rest."""
    if not arguments:
        arguments = ["--help"]
    flags = set(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    out = sys.stdout if "--json" in flags else None
    try:
        ranks.require_shared(arguments[0])
        code: Any = typer.main.get_command(app).main(args=arguments, prog_name="modes", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # `modes ... | head`: the reader left, which is no error of ours to explain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (Exception, KeyboardInterrupt) as error:  # the last place: whatever it is, the user gets one line
        failure = _usage(error) or failures.describe(error)
        if failures.ours_to_tell(error):
            failures.report(failure, out=out, error=error if "--debug" in flags else None)
        return failure.exit_code


def _usage(error: BaseException) -> failures.Failure | None:
    """A command line that does not parse; None if that is not what happened.

    Typer has had its own exceptions and click's, under several names; all of them can format their message.
    """
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    return failures.usage(error.format_message(), context.command_path if context is not None else "modes")
