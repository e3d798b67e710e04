"""`modes doctor`: versions, devices, and which kernels will run and why."""

from typing import Any

from modes_cli import console, options


def doctor(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """Show versions, devices, and which kernels will run and why."""
    with console.session(json=json, quiet=quiet, debug=debug) as out:
        from modes_cli.doctor import diagnose

        found = diagnose()
        out.show(found, *tables(found))


def tables(found: dict[str, Any]) -> list[Any]:
    """What people get of a diagnosis."""
    return [
        console.table(
            "Versions", ["package", "version"], [[name, value or "not installed"] for name, value in found["versions"].items()]
        ),
        console.table("Devices", ["device", "what it is"], [[one["device"], one["detail"]] for one in found["devices"]]),
        console.table(
            "Kernels",
            ["kernel", "available", "why"],
            [[k["name"], "yes" if k["available"] else "no", k["reason"]] for k in found["kernels"]],
        ),
    ]
