"""docs/pipeline as it stands, on `digits`: the jobs of both CI systems run here, with few samples and a key of our own.

Signing needs model_signing, in an environment of its own: `make signing`. Where it is missing the pipeline runs with SIGN=none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ci.jobs import ACTION, PIPELINE, ROOT, Runner, parse
from tests.once import once

SMALL = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # A policy that skips at random does harm enough for a gate: about half of the answers.
    "TARGET": "0.85",
    "CALIBRATE_OPTIONS": "--samples 8 --device cpu",
    "SEARCH_OPTIONS": "--policy topk --no-frontier --device cpu",
    "EVALUATE_OPTIONS": "--samples 22 --max-new-tokens 4 --device cpu",
}
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
SIGNER = ROOT / ".venv-sign" / "bin" if (ROOT / ".venv-sign" / ".setup").exists() else None
needs_signer = pytest.mark.skipif(SIGNER is None, reason="model_signing is not installed: `make signing`")


def environment(**more: str) -> dict[str, str]:
    return SMALL | {"PATH": f"{SIGNER}{os.pathsep}{PATH}" if SIGNER else PATH} | more


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job `build` of github.yml makes: first stopped by the gate, then continued with another one."""

    def make(folder: Path) -> None:
        folder.mkdir()
        stopped = Runner(folder, environment()).github("build")
        assert stopped.code == 3, stopped.said
        assert "of the accuracy is retained, less than `0.97`" in stopped.said
        assert sorted(path.name for path in (stopped.folder / "modes-run").iterdir()) == [
            "calibration.json", "calibration.safetensors", "evaluation.json", "thresholds.json",
        ]  # fmt: skip
        assert not (folder / "store").exists()
        ended = Runner(folder, environment(MIN_RETAINED="0.1")).github("build")
        assert ended.code == 0, ended.said

    return once(tmp_path_factory.getbasetemp(), "pipeline-built", make)


@pytest.fixture
def work(built: Path, tmp_path: Path) -> Path:
    """Where another job may start: what `build` has uploaded."""
    shutil.copytree(built / "store", tmp_path / "store")
    return tmp_path


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    assert SIGNER is not None
    folder = tmp_path_factory.mktemp("keys")
    code = (
        "import sys; from cryptography.hazmat.primitives.asymmetric import ec\n"
        "from cryptography.hazmat.primitives import serialization as s\n"
        "for name in sys.argv[1:]:\n"
        "    key = ec.generate_private_key(ec.SECP256R1())\n"
        "    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())\n"
        "    public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)\n"
        "    open(name + '.pem', 'wb').write(private), open(name + '.pub', 'wb').write(public)\n"
    )
    subprocess.run([SIGNER / "python", "-c", code, folder / "ours", folder / "other"], check=True)
    return {"SIGN": "key", "SIGNING_KEY": f"{folder}/ours.pem", "VERIFYING_KEY": f"{folder}/ours.pub"}


def deliver(store: Path, server: Path) -> Path:
    """What a server gets of the uploaded things: bundle and signature beside each other."""
    shutil.copytree(store / "bundle", server / "modes-run" / "bundle")
    if (store / "signature").exists():
        shutil.copy(store / "signature" / "bundle.sig", server / "modes-run")
    return server / "modes-run" / "bundle"


def check(server: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return step("check", server, **variables)


def step(name: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PIPELINE / "deploy.sh", name],
        cwd=folder,
        env={**os.environ, **environment(**variables)},
        text=True,
        capture_output=True,
    )


# -- unsigned, and asked to be ------------------------------------------------------------------------------------------


def test_a_bundle_that_passed_the_gate_is_uploaded(built: Path) -> None:
    names = {path.name for path in (built / "store" / "bundle").iterdir()}
    assert {"bundle.json", "decoder.onnx", "thresholds.safetensors"} <= names
    assert (built / "store" / "evaluation" / "evaluation.json").is_file()


def test_nothing_is_unsigned_by_accident(work: Path) -> None:
    deliver(work / "store", work)
    for name in ("sign", "check"):
        for variables in ({}, {"SIGN": "yes"}, {"SIGN": ""}):
            ended = step(name, work, **variables)
            assert ended.returncode == 2
            assert "error: SIGN is `" in ended.stderr
    assert not (work / "modes-run" / "bundle.sig").exists()


def test_unsigned_when_asked_to_be(work: Path) -> None:
    """The log says so at both ends; a changed file is still refused by its digest."""
    bundle = deliver(work / "store", work)
    ended = step("sign", work, SIGN="none")
    assert (ended.returncode, ended.stderr) == (0, "SIGN=none: the bundle is not signed\n")
    assert not (work / "modes-run" / "bundle.sig").exists()
    ended = check(work, SIGN="none")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("SIGN=none: no signature is checked\n")
    flip(bundle / "decoder.onnx")
    ended = check(work, SIGN="none")
    assert ended.returncode == 1
    assert "decoder.onnx" in ended.stdout + ended.stderr


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# -- signed ---------------------------------------------------------------------------------------------------------------


@needs_signer
def test_signed_by_github(work: Path, keys: dict[str, str]) -> None:
    """From build's upload to a server; then everything that must not pass there."""
    signed = Runner(work, environment(**keys)).github("sign")
    assert signed.code == 0, signed.said
    server = work / "server"
    bundle = deliver(work / "store", server)
    ended = check(server, **keys)
    assert ended.returncode == 0, ended.stderr
    assert "digests" in ended.stdout  # `modes verify` ran too

    flip(bundle / "decoder.onnx")
    ended = check(server, **keys)
    assert ended.returncode == 1
    assert "decoder.onnx" in ended.stdout + ended.stderr
    assert "digests" not in ended.stdout  # stopped at the signature
    flip(bundle / "decoder.onnx")

    (bundle / ".gitignore").write_text("*")  # git's own files count as well
    assert check(server, **keys).returncode == 1
    (bundle / ".gitignore").unlink()
    other = keys | {"VERIFYING_KEY": keys["VERIFYING_KEY"].replace("ours", "other")}
    assert check(server, **other).returncode == 1
    (server / "modes-run" / "bundle.sig").unlink()
    assert check(server, **keys).returncode != 0


@needs_signer
def test_signed_by_gitlab(work: Path, keys: dict[str, str]) -> None:
    """The job `sign`, on what `build` of the other system has made: both call the same script with the same variables."""
    shutil.copytree(work / "store" / "bundle", work / "store" / "build" / "modes-run" / "bundle")
    signed = Runner(work, environment(**keys)).gitlab("sign")
    assert signed.code == 0, signed.said
    shutil.copytree(work / "store" / "bundle", work / "server" / "modes-run" / "bundle")
    shutil.copy(work / "store" / "sign" / "modes-run" / "bundle.sig", work / "server" / "modes-run")
    model, key = work / "server" / "modes-run" / "bundle", keys["VERIFYING_KEY"]
    assert SIGNER is not None
    verify = [SIGNER / "model_signing", "verify", "key", model, "--signature", f"{model}.sig", "--public_key", key]
    assert subprocess.run(verify, capture_output=True).returncode == 0
    flip(model / "decoder.onnx")
    assert subprocess.run(verify, capture_output=True).returncode == 1


@needs_signer
def test_a_signature_that_does_not_hold_is_not_kept(work: Path, keys: dict[str, str]) -> None:
    deliver(work / "store", work)
    mixed = keys | {"VERIFYING_KEY": keys["VERIFYING_KEY"].replace("ours", "other")}
    assert step("sign", work, **mixed).returncode == 1
    assert not (work / "modes-run" / "bundle.sig").exists()


# -- the files ------------------------------------------------------------------------------------------------------------


def commands(name: str, job: str) -> list[str]:
    tree = parse(name)
    steps = tree["jobs"][job]["steps"] if name == "github.yml" else tree[job]["script"]
    return [line if isinstance(line, str) else line["run"] for line in steps if isinstance(line, str) or "run" in line]


def test_both_files_call_the_same_script() -> None:
    github, gitlab = parse("github.yml"), parse("gitlab.yml")
    for job in ("build", "sign"):
        script = f"docs/pipeline/deploy.sh {job}"
        for name in ("github.yml", "gitlab.yml"):
            assert commands(name, job)[-1] == script
    assert commands("github.yml", "sign") == commands("gitlab.yml", "sign")
    assert list(github["jobs"]) == gitlab["stages"] == ["build", "sign"]
    assert github["env"].keys() == gitlab["variables"].keys()
    assert {k: v for k, v in github["env"].items() if "IDENT" not in k} == {
        k: v for k, v in gitlab["variables"].items() if "IDENT" not in k
    }
    assert github["env"]["SIGN"] == "sigstore"
    described = (PIPELINE / "deploy.sh").read_text("utf-8")
    assert [name for name in github["env"] if name not in described] == []


def test_actions_are_pinned_and_rights_are_few() -> None:
    github = parse("github.yml")
    text = (PIPELINE / "github.yml").read_text("utf-8")
    uses = [line for line in text.splitlines() if "uses:" in line]
    assert len(uses) == 8
    for line in uses:
        assert re.search(rf"uses: {ACTION.pattern} # v\d+\.\d+\.\d+$", line), line
    for step in (step for job in github["jobs"].values() for step in job["steps"]):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False
    assert github["permissions"] == {"contents": "read"}
    assert "permissions" not in github["jobs"]["build"]
    assert github["jobs"]["sign"]["permissions"] == {"contents": "read", "id-token": "write"}
    assert "id_tokens" not in parse("gitlab.yml")["build"]
    # What is installed there is what is tested here.
    (install,) = [line for line in commands("github.yml", "sign") if line.startswith("pip install ")]
    assert install.removeprefix("pip install ") in (ROOT / "Makefile").read_text("utf-8")
