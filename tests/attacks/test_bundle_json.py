"""What bundle.json says: paths, thresholds, numbers, and JSON that is none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.attacks.bundles import THRESHOLDS, assert_refused, edit, header_of
from tests.export.bundles import relist


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "..", "", "a//b", "C:\\x", "a\n", ".hidden", "a/./b"]
)
def test_paths_out_of_the_folder(bundle: Path, path: str) -> None:
    edit(bundle, lambda tree: tree["files"][0].update(path=path))
    assert_refused(bundle, "bundle.json", "path")


@pytest.mark.parametrize("value", [-0.1, "NaN", 1e400])
def test_thresholds_in_bundle_json(bundle: Path, value: object) -> None:
    edit(bundle, lambda tree: tree["tau"].update(text=value))
    assert_refused(bundle, "bundle.json")


def every_tau(tree: dict[str, Any], **tau: float) -> None:
    """Of the chosen point, wherever it is told."""
    for point in (tree, *(one for one in tree["points"] if one["target"] == tree["target"])):
        point["tau"].update(tau)


def test_other_thresholds_in_bundle_json(bundle: Path) -> None:
    edit(bundle, lambda tree: every_tau(tree, text=0.5))
    assert_refused(bundle, THRESHOLDS, "`tau`")


def test_thresholds_that_no_point_has(bundle: Path) -> None:
    edit(bundle, lambda tree: tree["tau"].update(text=0.5))
    assert_refused(bundle, "bundle.json", "points")


def test_special_tokens_are_never_skipped(bundle: Path) -> None:
    edit(bundle, lambda tree: every_tau(tree, special=0.5))
    header = header_of(bundle / THRESHOLDS)
    tensors = load_file(bundle / THRESHOLDS)
    tensors["tau"][-1] = 0.5
    save_file(tensors, bundle / THRESHOLDS, header["__metadata__"])
    relist(bundle, THRESHOLDS)
    assert_refused(bundle, "tau", "special")


def test_decode_has_the_threshold_of_text_unless_it_is_named(bundle: Path) -> None:
    edit(bundle, lambda tree: every_tau(tree, decode=tree["tau"]["text"] / 2))
    assert_refused(bundle, THRESHOLDS, "`tau`")


def test_groups_in_another_order(bundle: Path) -> None:
    edit(bundle, lambda tree: tree["groups"].reverse())
    assert_refused(bundle, "bundle.json", "groups")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 200_000, '{"a": NaN}', "null", '{"schema_version": 1}', '{"files": ' + "9" * 5000 + "}"]
)
def test_bundle_json_that_is_none(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    assert_refused(bundle, "bundle.json")


def test_unlisted_parts(bundle: Path) -> None:
    edit(bundle, lambda tree: tree.update(files=[file for file in tree["files"] if file["path"] != THRESHOLDS]))
    assert_refused(bundle, "files", THRESHOLDS)


Change = Callable[[dict[str, Any]], object]


def twice(tree: dict[str, Any], path: str) -> None:
    tree["files"].append({**tree["files"][0], "path": path})


MEANINGLESS: dict[str, tuple[Change, str]] = {
    "itself": (lambda t: twice(t, "bundle.json"), "bundle.json"),
    "two names that are one": (lambda t: twice(t, "Decoder.ONNX"), "one file on some machines"),
    "a file that is a folder": (lambda t: twice(t, "decoder.onnx/weights"), "the folder of"),
    "a name that is not normalised": (lambda t: twice(t, "de\u0301coder.json"), "path"),
    "weights in a folder below": (lambda t: twice(t, "more/model.safetensors"), "own folder"),
    "a graph in a folder below": (lambda t: twice(t, "more/decoder.onnx"), "own folder"),
    "a library in a folder below": (lambda t: twice(t, "more/libmodes_cpu.so"), "own folder"),
    "a library of unknown origin": (lambda t: twice(t, "libother.so"), "provenance.kernels"),
    "a library without a platform": (lambda t: t["provenance"]["kernels"].clear(), "provenance.kernels"),
    "a digest that is none": (lambda t: t["files"][0].update(sha256="0" * 63 + "G"), "sha256"),
    "a digest in capitals": (lambda t: t["files"][0].update(sha256=t["files"][0]["sha256"].upper()), "sha256"),
    "a commit that is none": (lambda t: t["provenance"].update(source={"commit": "HEAD", "dirty": False}), "commit"),
    "no dirty flag": (lambda t: t["provenance"].update(source={"commit": "0" * 40}), "dirty"),
    "layers out of order": (lambda t: t["moe_layers"].reverse(), "moe_layers"),
    "a layer twice": (lambda t: t["moe_layers"].insert(1, t["moe_layers"][0]), "moe_layers"),
    "a layer that the decoder lacks": (lambda t: t["moe_layers"].append(99), "moe_layers"),
    "more experts for a token than there are": (lambda t: t.update(top_k=t["experts"] + 1), "top_k"),
    "padding outside the vocabulary": (lambda t: t.update(pad_token_id=1 << 40), "pad_token_id"),
    "an end outside the vocabulary": (lambda t: t["eos_token_ids"].append(1 << 40), "eos_token_ids"),
    "token ids out of order": (lambda t: t.update(vision_token_ids=[9, 7]), "vision_token_ids"),
    "a negative token": (lambda t: t.update(vision_token_ids=[-1]), "vision_token_ids"),
    "a number of 4,000 digits": (lambda t: t.update(experts=10**4000), "experts"),
    "a size of 2^70": (lambda t: t["files"][0].update(bytes=1 << 70), "bytes"),
    "a parameter of 400 digits": (lambda t: t["parameters"].update(per_modality=10**400), "parameters"),
    "a threshold of 400 digits": (lambda t: t["tau"].update(text=10**400), "tau"),
    "an infinite option": (lambda t: t["provenance"]["search_options"].update(passes=float("1e999")), "Infinity"),
    "points out of order": (lambda t: t["points"].reverse(), "points"),
    "a ratio that was not reached": (lambda t: t["points"][0].update(skip_ratio=0.0), "below its target"),
    "a group twice": (lambda t: t["groups"].append("text"), "groups"),
    "a part that is no object": (lambda t: t.update(provenance=[]), "provenance"),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_what_makes_no_sense(bundle: Path, name: str) -> None:
    change, word = MEANINGLESS[name]
    edit(bundle, change)
    assert_refused(bundle, "bundle.json", word)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('"experts"', '"experts": 1, "experts"', "twice"),  # parsers differ about which of the two counts
        ('"sha256"', '"sha256": "", "sha256"', "twice"),
        ('"experts": 16', '"experts": 16.0000000000000000000001', "experts"),
        ('"experts": 16', '"experts": 1e999', "experts"),
        ('"experts": 16', '"experts": true', "experts"),
        ('"experts": 16', '"experts": "16"', "experts"),
    ],
)
def test_numbers_and_keys_that_readers_differ_about(bundle: Path, old: str, new: str, word: str) -> None:
    path = bundle / "bundle.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert_refused(bundle, "bundle.json", word)
