"""An image processor of Qwen's kind as steps of onnxruntime-extensions: decode, resize, normalise, cut into patches."""

from typing import Any

from modes_cli.errors import UnknownLayout

FILE = "vision_processor.json"
_RESAMPLE = {0: "NEAREST", 1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}  # PIL's numbers
_ALWAYS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")


def image_steps(processor: Any) -> dict[str, Any]:
    """From a `Qwen2VLImageProcessor` of transformers; `size` bounds an image's pixels.

    Raises:
        UnknownLayout: it does something that cannot be said in these steps.
    """
    off = [name for name in _ALWAYS if not getattr(processor, name, False)]
    resample = _RESAMPLE.get(int(getattr(processor, "resample", -1)))
    if off or resample is None:
        raise UnknownLayout(f"its image processor has `{off[0]}` off" if off else f"it resamples by `{processor.resample}`")
    patch = {"patch_size": int(processor.patch_size), "merge_size": int(processor.merge_size)}
    resize = {
        "smart_resize": 1,  # keeps the aspect ratio, in whole patches, between so many pixels; width and height do not count
        "width": 1,
        "height": 1,
        "min_pixels": int(processor.size["shortest_edge"]),
        "max_pixels": int(processor.size["longest_edge"]),
        "interpolation": resample,
    }
    mean, std = ([float(value) for value in values] for values in (processor.image_mean, processor.image_std))
    steps = [
        ("decode_image", "DecodeImage", {"color_space": "RGB"}),
        ("convert_to_rgb", "ConvertRGB", {}),
        ("resize", "Resize", resize | patch),
        ("rescale", "Rescale", {"rescale_factor": float(processor.rescale_factor)}),
        # The mark swaps red and blue, which lie the other way round behind ConvertRGB.
        ("normalize", "Normalize", {"mean": mean, "std": std, "qwen3_vl": 1}),
        ("patch_image", "PatchImage", patch | {"temporal_patch_size": int(processor.temporal_patch_size)}),
    ]
    transforms = [
        {"operation": {"name": name, "type": kind} | ({"attrs": attributes} if attributes else {})}
        for name, kind, attributes in steps
    ]
    return {"processor": {"name": "modes_image_processor", "transforms": transforms}}
