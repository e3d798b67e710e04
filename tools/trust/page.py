"""docs/trust.md, from the files of the sections and nothing else: the same files give the same bytes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools.trust import SECTIONS, record

PAGE = record.FOLDER.parent / "trust.md"
Rows = Callable[[str, dict[str, Any]], list[tuple[str, str]]]
HEAD = """# What was tried

What is promised of [files](artifacts.md#rules-for-all-of-them) and [security](security.md) was put to the test and counted.
`python -m tools.trust` does it again and writes this page; parts of it run in CI as tests.
"""


def render(folder: Path = record.FOLDER, rows: Rows = record.rows) -> str:
    """The page. A section that was not measured is said to be missing."""
    table, how = ["| | what | number |", "|---|---|---:|"], []
    for name, title in SECTIONS.items():
        file = record.path(name, folder).name
        tree = record.read(name, folder)
        if tree is None:
            table.append(f"| {title} | not measured: there is no `{file}` | |")
            continue
        found = rows(name, tree["result"])
        if not found:
            raise ValueError(f"the section `{name}` has no rows")
        for number, (what, value) in enumerate(found):
            table.append(f"| {title if number == 0 else ''} | {_cell(what)} | {_cell(value)} |")
        where = f"{_machine(tree['machine'])}; {_versions(tree['versions'])}"
        how.append(f"- **{title}**: `{tree['command']}`, on {where}. [{file}](benchmarks/{file})")
    return "\n".join([HEAD, *table, *(["", "How each part was measured:", "", *how] if how else [])]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _machine(tree: Mapping[str, Any]) -> str:
    """`{"cpu": "X", "cores": 2, "memory": 8000000000}`: X, 2 cores, 8 GB memory. What only a benchmark needs is left out."""
    words = {"cpu": "{}", "cores": "{} cores", "threads": "{} threads", "system": "{}"}
    found = [form.format(tree[key]) for key, form in words.items() if tree.get(key) is not None]
    return ", ".join([*found, *([f"{tree['memory'] / 1e9:.0f} GB memory"] if tree.get("memory") else [])])


def _versions(tree: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in tree.items() if version is not None)


def write(folder: Path = record.FOLDER) -> Path:
    from modes_cli import files

    files.write_bytes(PAGE, render(folder).encode())
    return PAGE
