"""`modes report`: one HTML page of everything in the run folder."""

from modes_cli import console, options


def report(
    run: options.RunDir = None, json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False
) -> None:
    """Write one self-contained HTML page of everything in the run folder."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        from modes_cli.report import write_report

        path = write_report(run)
        out.show({"report": str(path)}, f"written: {path}", artifact=path)
