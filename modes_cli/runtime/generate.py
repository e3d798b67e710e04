"""`modes generate`: one answer from a bundle, in ONNX Runtime or in PyTorch."""

from PIL import Image

from modes_cli.data import check_image_file
from modes_cli.errors import BadOption
from modes_cli.requests import Generated, GenerateRequest
from modes_cli.runtime.answers import Answers

RUNTIMES = ("ort", "torch")


def generate(request: GenerateRequest) -> Generated:
    """Answer a question about images.

    Raises:
        BadData: an image cannot be read.
        BadArtifact: the bundle is damaged; nothing was loaded.
        BadOption: no such runtime or device, or a threshold that makes no sense.
        KernelError: there are no kernels for the device.
    """
    if request.runtime not in RUNTIMES:
        raise BadOption(f"no runtime `{request.runtime}`", hint=f"runtimes are {' and '.join(RUNTIMES)}")
    if request.max_new_tokens < 1:
        raise BadOption(f"`--max-new-tokens {request.max_new_tokens}` leaves nothing to generate")
    answers = _answer(request, [check_image_file(path) for path in request.images])
    seconds = (answers.prefill_seconds, answers.decode_seconds)
    return Generated(answers.texts[0], len(answers.tokens[0]), answers.skip_ratio, *seconds)


def _answer(request: GenerateRequest, images: list[Image.Image]) -> Answers:
    if request.runtime == "ort":
        from modes_cli.runtime.ort_model import OrtModel

        ort = OrtModel(request.bundle, request.device)
        return ort.generate([images], [request.prompt], request.max_new_tokens, request.tau)
    from modes_cli.requests import ModelSpec
    from modes_cli.runtime.torch_model import open_model

    model = open_model(ModelSpec(str(request.bundle), device=request.device), None)
    return model.generate([images], [request.prompt], request.max_new_tokens, request.tau)
