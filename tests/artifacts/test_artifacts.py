"""Artifact files: what is written is what is read, and whatever else stands in one is refused with its place named."""

import contextlib
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from modes_cli import files, run_folder
from modes_cli.artifacts import SCHEMAS, Calibration, Thresholds
from modes_cli.errors import BadArtifact, MissingArtifact, ModesError, StaleArtifact
from modes_cli.run_folder import RunFolder
from tests import examples

NAMES = sorted(SCHEMAS)


def tree(name: str) -> dict[str, Any]:
    return dict(json.loads(examples.path(name).read_text("utf-8")))


def read(folder: Path, name: str, content: Any) -> Any:
    file = folder / f"{name}.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return run_folder.read_json(file, SCHEMAS[name])


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_come_back_byte_for_byte(name: str) -> None:
    text = examples.path(name).read_text("utf-8")
    assert files.canonical_json(examples.artifact(name).model_dump(mode="json")) == text


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_field_is_refused_at_every_depth(tmp_path: Path, name: str) -> None:
    for parent in ((), ("model",), ("versions",)):
        content = tree(name)
        inner: dict[str, Any] = content
        for key in parent:
            inner = inner[key]
        inner["extra"] = 1
        with pytest.raises(BadArtifact, match=r"field `.*extra`"):
            read(tmp_path, name, content)


# Added after files without them were out there.
NEWER = {"calibration": {"sample_digests"}, "evaluation": {"overlap"}}


@pytest.mark.parametrize("name", NEWER)
def test_files_of_before_are_read(tmp_path: Path, name: str) -> None:
    content = {key: value for key, value in tree(name).items() if key not in NEWER[name]}
    found = read(tmp_path, name, content)
    assert found.model_dump(exclude=NEWER[name]) == examples.artifact(name).model_dump(exclude=NEWER[name])
    assert {getattr(found, field) for field in NEWER[name]} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_needed(tmp_path: Path, name: str) -> None:
    for field in tree(name).keys() - {"schema_version"} - NEWER.get(name, set()):
        content = tree(name)
        del content[field]
        with pytest.raises(BadArtifact, match=f"field `{field}`"):
            read(tmp_path, name, content)


@pytest.mark.parametrize("name", NAMES)
def test_another_schema_version_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadArtifact, match="schema_version"):
        read(tmp_path, name, {**tree(name), "schema_version": 2})


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, constant: str) -> None:
    text = examples.path("evaluation").read_text("utf-8").replace('"full_seconds": 6.2', f'"full_seconds": {constant}')
    with pytest.raises(BadArtifact):
        read(tmp_path, "evaluation", text)


@pytest.mark.parametrize(
    ("name", "change", "names"),
    [
        ("calibration", lambda t: t["importance"]["0"].update(all=0.9), "sums to"),
        ("calibration", lambda t: t["importance"].pop("0"), "moe_layers"),
        (
            "calibration",
            lambda t: [layer.update(all=0, text=0, vision=0) for layer in t["importance"].values()],
            "0 in every layer",
        ),
        ("calibration", lambda t: t["tensors"].update(sha256="abc"), "tensors.sha256"),
        ("calibration", lambda t: t["sample_digests"].pop(), "sample_digests"),
        ("calibration", lambda t: t["sample_digests"].append("x"), "sample_digests"),
        ("thresholds", lambda t: t["results"].reverse(), "rising order"),
        ("thresholds", lambda t: t["results"].append(t["results"][-1]), "rising order"),
        ("thresholds", lambda t: t["results"][0].update(skip_ratio=0.1), "below its target"),
        ("thresholds", lambda t: t["results"][0]["tau"].update(text=-1), "tau"),
        ("thresholds", lambda t: t["results"].clear(), "results"),
        ("evaluation", lambda t: t.update(full=1.01), "full"),
        ("bundle", lambda t: t["files"].append(t["files"][0]), "listed twice"),
        ("bundle", lambda t: t["tau"].update(sound=1.0), "sound"),
        ("bundle", lambda t: t["files"][0].update(path="../../etc/passwd"), "files.0.path"),
        ("bundle", lambda t: t["files"][0].update(path="/etc/passwd"), "files.0.path"),
        ("bundle", lambda t: t["files"][0].update(path="a//b"), "files.0.path"),
        ("bench", lambda t: t["cases"][0].update(phase="warmup"), "cases.0.phase"),
    ],
)
def test_what_does_not_hold_together_is_refused(tmp_path: Path, name: str, change: Any, names: str) -> None:
    content = tree(name)
    change(content)
    with pytest.raises(BadArtifact, match=names):
        read(tmp_path, name, content)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1"),
        (b"\xff\xfe{}", "byte 0"),
        (b"[]", "the whole"),
        (b"null", "the whole"),
        (b"[" * 100_000, "nesting"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number"),
    ],
    ids=["empty", "truncated", "not text", "list", "null", "deep", "long number"],
)
def test_files_that_are_no_artifacts(tmp_path: Path, content: bytes, names: str) -> None:
    (tmp_path / "profile.json").write_bytes(content)
    with pytest.raises(BadArtifact, match=names):
        run_folder.read_json(tmp_path / "profile.json", SCHEMAS["profile"])


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "profile.json").open("wb") as file:
        file.truncate(run_folder.JSON_LIMIT + 1)  # sparse
    with pytest.raises(BadArtifact, match="size"):
        run_folder.read_json(tmp_path / "profile.json", SCHEMAS["profile"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), data=st.data())
def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(examples.path(name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if how == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif how == "insert":
            content[at:at] = data.draw(st.binary(max_size=6))
        else:
            del content[at : at + data.draw(st.integers(1, 40))]
        content = content or bytearray(b" ")
    file = tmp_path / f"{name}.json"
    file.write_bytes(content)
    with contextlib.suppress(ModesError):  # anything else fails the test
        run_folder.read_json(file, SCHEMAS[name])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), data=st.data())
def test_changed_values_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content: Any = tree(name)
    inner = content
    while True:  # walk to a random place
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    inner[key] = data.draw(
        st.recursive(leaf, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some, max_size=3))
    )
    with contextlib.suppress(ModesError):
        read(tmp_path, name, content)


def test_a_missing_artifact_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact) as caught:
        RunFolder(tmp_path).read(Thresholds)
    assert caught.value.hint == f"make it first: `modes search --run {tmp_path}`"


def test_reuse_needs_the_same_identity(tmp_path: Path) -> None:
    run = RunFolder(examples.fill_run(tmp_path))
    same = examples.artifact("calibration").identity()
    assert run.read_if_same(Calibration, same, renew="x") == examples.artifact("calibration")
    for field in same:
        with pytest.raises(StaleArtifact, match=field):
            run.read_if_same(Calibration, {**same, field: "other"}, renew="x")
    with pytest.raises(StaleArtifact, match=r"options\.new"):
        run.read_if_same(Calibration, {**same, "options.new": 1}, renew="x")
    (tmp_path / Calibration.FILE).unlink()
    assert run.read_if_same(Calibration, same, renew="x") is None


def test_tensor_files_are_compared_by_size_and_digest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    ref = run.write_tensors("t.safetensors", b"0123456789", Calibration)
    assert run.check_tensors(ref, Calibration) == tmp_path / "t.safetensors"
    for content, names in ((b"0123456780", "SHA-256"), (b"012345678", "size"), (None, "missing")):
        if content is None:
            (tmp_path / "t.safetensors").unlink()
        else:
            (tmp_path / "t.safetensors").write_bytes(content)
        with pytest.raises(BadArtifact, match=names):
            run.check_tensors(ref, Calibration)
