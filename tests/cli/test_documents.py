"""docs/security.md and docs/stability.md say what is true of the code."""

import importlib
import re
from pathlib import Path

import click
import onnx
import PIL.Image
import pytest
import typer

import modes_cli
from modes_cli import app, errors
from modes_cli.artifacts import SCHEMAS
from modes_cli.data import images
from modes_cli.data.checked import MOST_BAD
from modes_cli.runtime import interface
from tests.cli.test_output import KEYS

DOCS = Path(__file__).parent.parent.parent / "docs"
SECURITY, STABILITY = ((DOCS / name).read_text("utf-8") for name in ("security.md", "stability.md"))
SETS = {
    "*model*": "--device --device-map --offload --trust-remote-code --run --fresh",
    "*samples*": "--data --split --samples --seed --image-column --question-column --answer-column",
}
SETS["*data*"] = SETS["*samples*"] + " --batch-size"


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    lines = text[text.index(f"## {heading}\n") :].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|")) + 2
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def code(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_limits() -> None:
    rows = table(SECURITY, "Limits")
    assert len(rows) == 15
    for what, said, place in rows:
        module, _, name = place.strip("`").rpartition(".")
        limit = getattr(importlib.import_module(f"modes_cli.{module}"), name)
        assert said.removesuffix(" bytes") == f"{limit:,}", what


def test_images_as_the_document_has_them() -> None:
    assert f"An image may have {PIL.Image.MAX_IMAGE_PIXELS:,} pixels" in SECURITY
    assert f"{', '.join(images.FORMATS[:-1])} and {images.FORMATS[-1]};" in SECURITY
    assert f"More than one unusable sample in {MOST_BAD} " in SECURITY


def commands() -> dict[str, click.Command]:
    (cli,) = (value for value in vars(app).values() if isinstance(value, typer.Typer))
    group = typer.main.get_command(cli)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    found: dict[str, click.Command] = group.commands
    return found


def test_options() -> None:
    found = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands().items()
    }
    rows = table(STABILITY, "Commands and options")
    assert [row[0].strip("`").split()[0] for row in rows] == list(found)
    for name, listed in rows:
        said = code(listed) | {option for word, options in SETS.items() if word in listed for option in options.split()}
        there = {option for option in found[name.strip("`").split()[0]] if option.startswith("-")}
        assert said | {"--json", "--quiet", "-q", "--debug"} == there, name
    for word, options in SETS.items():
        assert word in STABILITY
        assert set(options.split()) <= code(STABILITY)


def test_keys() -> None:
    assert {row[0].strip("`"): code(row[1]) for row in table(STABILITY, "Keys of `--json`")} == {
        line.split()[0]: keys for line, keys in KEYS.items()
    }


def test_kinds_of_errors() -> None:
    text = STABILITY[STABILITY.index("`hint` are for people") : STABILITY.index("## Keys of")]
    kinds = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", value.__name__).lower()
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.ModesError)
    }
    others = {"usage", "interrupted", "out_of_memory", "disk_full", "unexpected"}
    assert code(text) - {"hint"} == kinds - {"modes_error", "elsewhere_failed"} | others


def test_the_operator() -> None:
    from modes_cli.export.operator import DOMAIN, NAME, VERSION

    schema = onnx.defs.get_schema(NAME, VERSION, DOMAIN)
    text = STABILITY[STABILITY.index("## Operator") :]
    inputs = re.search(r"Inputs in order, of which the last five may be left out: ([^.]+)\.", text)
    attributes, outputs = re.search(r"Attributes ([^.]+)\.", text), re.search(r"Outputs ([^.]+)\.", text)
    assert inputs is not None
    assert attributes is not None
    assert outputs is not None
    assert re.findall(r"`(\w+)`", inputs[1]) == [parameter.name for parameter in schema.inputs]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [parameter.option == optional for parameter in schema.inputs] == [False] * 8 + [True] * 5
    assert code(attributes[1]) == set(schema.attributes)
    assert re.findall(r"`(\w+)`", outputs[1]) == [parameter.name for parameter in schema.outputs]
    assert interface.FIELDS[0][0] == "struct_size"


@pytest.mark.parametrize("name", ["security.md", "stability.md", "pipeline.md", "trust.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (DOCS / name).read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert (DOCS / link).exists(), link


def test_names() -> None:
    assert {f"`modes_cli.{name}`" for name in modes_cli.__all__} <= {f"`{name}`" for name in code(STABILITY)}
    assert all("schema_version" in model.model_fields for model in SCHEMAS.values())
