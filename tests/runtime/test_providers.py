"""A session gets the providers that it asks for, with the operator library for them, or an error that says what to do."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from modes_cli.errors import BadArtifact, BadOption, KernelError, ModesError
from modes_cli.evaluation import evaluate
from modes_cli.export import bundle as exporter
from modes_cli.export import export_bundle
from modes_cli.export.verify import verify_bundle
from modes_cli.options import EVALUATION_SAMPLES, evaluation_data
from modes_cli.requests import EvaluateRequest, ExportRequest, GenerateRequest
from modes_cli.runtime import libraries, providers
from modes_cli.runtime.generate import generate
from modes_cli.runtime.ort_model import OrtModel
from modes_cli.runtime.session import session
from tests.export.bundles import make_run, read, relist, shared_bundle, shared_checkpoint

BOTH = [providers.CUDA, providers.CPU]
needs_provider = pytest.mark.skipif(
    providers.CUDA not in ort.get_available_providers(), reason="this ONNX Runtime is built without CUDA"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def bundle(base: Path) -> Path:
    return shared_bundle(base)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which libraries are installed, instead of the ones that are."""

    def install(**paths: Path | None) -> None:
        monkeypatch.setattr(libraries, "library_path", lambda name=libraries.CPU: paths[name.removesuffix(".so")])

    return install


def devices(monkeypatch: pytest.MonkeyPatch, count: int, status: int = 0, said: bytes = b"") -> list[Path]:
    """Any library finds so many GPUs. Returns the libraries that were asked."""
    asked: list[Path] = []

    def modes_cuda_devices(found: Any, message: Any) -> int:
        found._obj.value, message._obj.text = count, said
        return status

    def open_library(path: Path, *, cuda: bool) -> SimpleNamespace:
        assert cuda
        asked.append(path)
        return SimpleNamespace(modes_cuda_devices=modes_cuda_devices)

    monkeypatch.setattr(libraries, "open_library", open_library)
    return asked


def without_cuda(bundle: Path, folder: Path) -> Path:
    """A copy that was exported where there is no libmodes_cuda.so."""
    made = Path(shutil.copytree(bundle, folder / "bundle"))
    (made / libraries.CUDA).unlink(missing_ok=True)
    found = read(made)
    kept = [file for file in found.files if file.path != libraries.CUDA]
    kernels = [kernel for kernel in found.provenance.kernels if kernel.file != libraries.CUDA]
    more = {"files": kept, "provenance": found.provenance.model_copy(update={"kernels": kernels})}
    (made / "bundle.json").write_text(found.model_copy(update=more).model_dump_json())
    return made


CPU_LIBRARY = libraries.library_path()


def test_the_providers_of_a_device() -> None:
    assert providers.providers_for("cpu") == providers.providers_for("auto") == [providers.CPU]
    assert providers.providers_for("cuda") == BOTH
    with pytest.raises(BadOption, match="no device `tpu`"):
        providers.providers_for("tpu")
    assert not providers.uses_cuda([providers.CPU])
    assert providers.uses_cuda(["CudaPluginExecutionProvider"])


@needs_provider
def test_cuda_without_its_library(bundle: Path, tmp_path: Path, installed: Callable[..., None]) -> None:
    bundle = without_cuda(bundle, tmp_path)
    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=None)
    digits = evaluation_data("digits", None, None, EVALUATION_SAMPLES["digits"], 0, (None, None, None))
    asking: list[Callable[[], object]] = [
        lambda: session(bundle, BOTH),
        lambda: OrtModel(bundle, "cuda"),
        lambda: generate(GenerateRequest(bundle, (), "?", device="cuda")),
        lambda: evaluate(EvaluateRequest(digits, bundle.parent, bundle, device="cuda")),
    ]
    for ask in asking:
        with pytest.raises(KernelError, match=r"libmodes_cuda\.so` is neither installed nor in") as caught:
            ask()
        assert caught.value.hint is not None
        assert "nvcc" in caught.value.hint
        assert "--device cpu" in caught.value.hint
    assert session(bundle).get_providers() == [providers.CPU]


@needs_provider
@pytest.mark.parametrize(("status", "said"), [(0, b""), (9, b"counting the CUDA devices failed")])
def test_cuda_without_a_device(
    bundle: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, status: int, said: bytes
) -> None:
    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=CPU_LIBRARY)
    asked = devices(monkeypatch, 0, status, said)
    with pytest.raises(BadOption, match=said.decode() or "no CUDA device was found") as caught:
        session(bundle, BOTH)
    assert "modes doctor" in str(caught.value.hint)
    assert asked == [CPU_LIBRARY]


@needs_provider
@pytest.mark.skipif(torch.cuda.is_available(), reason="ONNX Runtime may have all that CUDA needs here")
def test_a_provider_that_onnx_runtime_gives_up(
    bundle: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime goes on with the CPU; we do not."""
    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=CPU_LIBRARY)
    devices(monkeypatch, 1)
    with pytest.raises(ModesError, match="CUDA") as caught:
        session(bundle, BOTH)
    assert "--device cpu" in str(caught.value.hint) or isinstance(caught.value, BadArtifact)
    assert capfd.readouterr().out == ""


def test_a_session_that_lost_a_provider() -> None:
    lost = SimpleNamespace(get_providers=lambda: [providers.CPU])
    with pytest.raises(KernelError, match=r"could not set up `CUDAExecutionProvider`, and would run on `CPUExecutionProvider`"):
        providers.require_taken(lost, BOTH)
    providers.require_taken(lost, [providers.CPU])


def test_the_library_of_a_bundle_is_for_machines_that_have_none(
    bundle: Path, tmp_path: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = without_cuda(bundle, tmp_path)
    shutil.copy(made / "libmodes_cpu.so", made / "libmodes_cuda.so")
    found = read(made)
    listed = [*found.files, found.files[0].model_copy(update={"path": "libmodes_cuda.so"})]
    kernels = [*found.provenance.kernels, found.provenance.kernels[0].model_copy(update={"file": "libmodes_cuda.so"})]
    more = {"files": listed, "provenance": found.provenance.model_copy(update={"kernels": kernels})}
    (made / "bundle.json").write_text(found.model_copy(update=more).model_dump_json())
    relist(made, "libmodes_cuda.so")

    asked = devices(monkeypatch, 1)
    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=None)
    copied = providers.operator_library(made, read(made), BOTH)
    assert copied.read_bytes() == (made / "libmodes_cuda.so").read_bytes()
    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=CPU_LIBRARY)
    assert providers.operator_library(made, read(made), BOTH) == CPU_LIBRARY
    assert asked == [copied, CPU_LIBRARY]
    assert providers.operator_library(made, read(made), [providers.CPU]) == CPU_LIBRARY

    (made / "libmodes_cuda.so").write_bytes(b"\x7fELF")
    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=None)
    with pytest.raises(BadArtifact, match=r"libmodes_cuda\.so"):
        providers.operator_library(made, read(made), BOTH)
    assert len(asked) == 2  # nothing of it was loaded


def test_a_bundle_has_the_libraries_of_the_installation(
    base: Path, bundle: Path, tmp_path: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs, which take long, are copied from a bundle of the same checkpoint and thresholds."""
    monkeypatch.setattr(
        exporter, "_graphs", lambda _plan: {graph.name: lambda graph=graph: graph for graph in bundle.glob("*.onnx")}
    )
    monkeypatch.setattr(exporter, "_save", lambda graph, path, _plan: shutil.copy(graph, path))
    assert CPU_LIBRARY is not None
    cuda = tmp_path / "built.so"
    cuda.write_bytes(CPU_LIBRARY.read_bytes() + b"cuda")
    run = make_run(tmp_path / "run", shared_checkpoint(base))

    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=None)
    path = export_bundle(ExportRequest(run=run)).path
    assert not (path / "libmodes_cuda.so").exists()
    stamp = (path / "bundle.json").stat().st_mtime_ns
    export_bundle(ExportRequest(run=run))
    assert (path / "bundle.json").stat().st_mtime_ns == stamp  # nothing has changed

    installed(libmodes_cpu=CPU_LIBRARY, libmodes_cuda=cuda)
    export_bundle(ExportRequest(run=run))
    assert (path / "libmodes_cuda.so").read_bytes() == cuda.read_bytes()
    assert "libmodes_cuda.so" in {file.path for file in read(path).files}
    checks = {check.name: check for check in verify_bundle(path)}
    assert all(check.ok for check in checks.values())
    assert "the installed libmodes_cuda.so is the bundle's" in checks["kernels"].detail

    cuda.write_bytes(cuda.read_bytes() + b"newer")
    checks = {check.name: check for check in verify_bundle(path)}
    assert not checks["kernels"].ok
    assert "libmodes_cuda.so`: SHA-256: differs from that of the installed" in checks["kernels"].detail
    (path / "libmodes_cuda.so").write_bytes(CPU_LIBRARY.read_bytes() + b"evil")
    checks = {check.name: check for check in verify_bundle(path)}
    assert not checks["digests"].ok
    with pytest.raises(BadArtifact, match=r"libmodes_cuda\.so"):
        session(path)


@pytest.mark.gpu
def test_a_bundle_on_a_gpu(bundle: Path) -> None:
    try:
        on_gpu = OrtModel(bundle, "cuda")
    except ModesError as error:
        pytest.skip(f"no session on a GPU here: {error}")
    assert providers.CUDA in on_gpu.decoder.get_providers()
    on_cpu = OrtModel(bundle, "cpu")
    prompts = on_cpu.prompts([[]], ["How many digits?"])
    found, expected = on_gpu.prefilled(prompts, None), on_cpu.prefilled(prompts, None)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-2)
    np.testing.assert_array_equal(found.kept, expected.kept)
    for state, model in ((found, on_gpu), (expected, on_cpu)):
        model.next_token(state, np.array([[9]]), np.array([[1]]), None)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-2)
