"""Tokenizers, processors and chat templates that reach further than they should. No code of a folder is ever run."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from modes_cli.errors import BadArtifact, BadData, BadModel, ModesError
from modes_cli.models.checkpoint import REFERENCE_FOLDER, check_settings
from modes_cli.models.processor import load_processor
from modes_cli.models.templates import prompting

TEMPLATES = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a module": ("{% import 'os' as os %}", "no loader"),
    "a loop without end": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "other messages": ("{{ messages.append(1) }}", "SecurityError"),
    "no template": ("{% for", "TemplateSyntaxError"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reference model's settings beside code that says when it was run."""
    for path in REFERENCE_FOLDER.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nclass Evil: pass\n")
    return tmp_path


def ask(folder: Path, question: str = "q") -> object:
    processor = load_processor(folder)
    chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    with prompting("`q`"):
        return processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates(folder: Path, kind: str) -> None:
    template, word = TEMPLATES[kind]
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises((BadModel, BadData), match=word):
        ask(folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("processor_config.json", {"processor_class": "evil.Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}),
        ("preprocessor_config.json", {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    ],
)
def test_code_of_a_folder(folder: Path, name: str, settings: dict[str, object]) -> None:
    (folder / name).write_text(json.dumps(settings))
    with contextlib.suppress(ModesError):
        load_processor(folder)
    assert not (folder / "RAN").exists()


def test_a_pattern_that_takes_exponential_time(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(BadModel, match=r"the tokenizer breaks down: .*retry-limit"):
        ask(folder, "a" * 40 + "b")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("tokenizer.json", '{"a":' * 100_000, "not JSON"),
        ("tokenizer_config.json", '{"a": 1', "not JSON"),
        ("processor_config.json", "[]", "not an object"),
        ("generation_config.json", "9" * 5000, "not JSON"),
    ],
)
def test_settings_that_are_none(folder: Path, name: str, text: str, word: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(BadArtifact, match=word):
        check_settings(folder)
