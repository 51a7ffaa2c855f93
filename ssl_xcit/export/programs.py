"""Export programs that run without our code: ONNX, torch.export's, and ONNX in int8.

They take normalised float32 images of any number, height and width, and return class tokens
`features` (B, C), and on demand `patches` (B, C, h, w). Exported programs hold the direct form of
cross-covariance attention, which is right for any number of tokens.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.export.comparison import KNN, Run, compare, compare_rounded, difference
from ssl_xcit.export.description import Weights
from ssl_xcit.export.output_files import (
    Exported,
    remove,
    replacing_path,
    require,
    with_ending,
    write_description,
)
from ssl_xcit.models.xcit import XCiT

OPSET = 20


class Outputs(nn.Module):
    """The backbone, with or without patch features."""

    def __init__(self, backbone: XCiT, patches: bool):
        super().__init__()
        self.backbone, self.patches = backbone, patches

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> Any:
        """Class tokens, and with `patches` the patch tokens too."""
        if not self.patches:
            return self.backbone(images)
        return tuple(self.backbone.forward_features(images))


def output_names(patches: bool) -> tuple[str, ...]:
    """Names of the outputs."""
    return ("features", "patches") if patches else ("features",)


def traced(weights: Weights, patches: bool) -> torch.export.ExportedProgram:
    """The backbone traced by torch.export for any batch, height and width; once, for it is slow."""
    names = output_names(patches)
    if names not in weights.traced:
        any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        # no special size: sides that are neither equal nor 1
        images = torch.zeros(2, weights.architecture["in_chans"], 48, 64)
        with quiet():
            weights.traced[names] = torch.export.export(
                Outputs(weights.backbone, patches).eval(), (images,), dynamic_shapes=(any_size,)
            )
    return weights.traced[names]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def as_onnx(weights: Weights, patches: bool) -> Any:
    """The ONNX model, with the preprocessing in its metadata; converted once."""
    names = ("images", *output_names(patches))
    if names not in weights.traced:
        with quiet():
            program = torch.onnx.export(
                traced(weights, patches), dynamo=True, input_names=names[:1],
                output_names=names[1:], opset_version=OPSET, verbose=False,
            )  # fmt: skip
        assert program is not None
        weights.traced[names] = annotated(weights, program.model_proto)
    return weights.traced[names]


def annotated(weights: Weights, model: Any) -> Any:
    """Name the axes of any length, and add the preprocessing to the metadata."""
    import onnx

    names = {"images": ("batch", None, "height", "width"), "features": ("batch", None)}
    names["patches"] = ("batch", None, "rows", "columns")
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=True):
            if name is not None:
                axis.dim_param = name
    mean, std = weights.preprocess.statistics()
    about = {
        "mean": list(mean), "std": list(std), "resize": weights.resize, "size": weights.size,
        "architecture": weights.architecture,
    }  # fmt: skip
    for key, content in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(content)
    onnx.checker.check_model(model, full_check=False)
    return model


def onnx_function(path: Path, patches: bool = False) -> Run:
    """A file as a function of tensors, run by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Float[Tensor, "B in_chans H W"]) -> Any:
        arrays = session.run(output_names(patches), {"images": images.numpy()})
        return tuple(map(torch.from_numpy, arrays)) if patches else torch.from_numpy(arrays[0])

    return run


def running(path: Path, patches: bool = False) -> str:
    """Lines that run an ONNX file."""
    names = "features, patches" if patches else "(features,)"
    return (
        f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}")\n{names} = '
        'session.run(None, {"images": images})  # float32, normalised'
    )


def onnx(weights: Weights, out: Path, patches: bool = False) -> Exported:
    """Write `NAME.onnx`."""
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    path = with_ending(out, ".onnx")
    with replacing_path(path) as part:
        onnx.save(as_onnx(weights, patches), part)
        checked = compare(weights, onnx_function(part, patches), patches=patches)
    checked = f"run by onnxruntime {onnxruntime.__version__}: {checked}"
    notes = [f"opset {OPSET}; any batch, height and width"]
    return Exported([path], checked, running(path, patches), notes)


def program(weights: Weights, out: Path, patches: bool = False) -> Exported:
    """Write `NAME.pt2` by torch.export."""
    path = with_ending(out, ".pt2")
    with replacing_path(path) as part, quiet():
        exported = traced(weights, patches)
        torch.export.save(exported, part)
        checked = compare(weights, torch.export.load(part).module(), patches=patches)
    # a grid of one row or column would be a program of its own
    least = max(int(bounds.lower) for bounds in exported.range_constraints.values())
    load = f'import torch\nbackbone = torch.export.load("{path}").module()'
    use = f"{load}\n{', '.join(output_names(patches))} = backbone(images)"
    notes = [f"any batch, height and width from {least} pixels"]
    return Exported([path], f"loaded back by torch {torch.__version__}: {checked}", use, notes)


def int8(weights: Weights, out: Path, patches: bool = False, knn: KNN | None = None) -> Exported:
    """Write `NAME-int8.onnx`: weights of linear layers in 8 bits, inputs quantised dynamically, the
    rest in float32; `NAME-int8.json` has what the rounding costs.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = with_ending(out, "-int8.onnx")
    whole, folded = (path.with_name(f".{path.name}.{word}.part") for word in ("whole", "folded"))
    try:
        with replacing_path(path) as part:
            onnx.save(as_onnx(weights, patches), whole)
            with quiet():
                # layer scale times weights becomes weights, which alone are quantised
                quant_pre_process(whole, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
                quantize_dynamic(
                    folded, part, weight_type=QuantType.QInt8, per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm"],
                )  # fmt: skip
            runs = onnx_function(whole), onnx_function(part)
            num_bytes = whole.stat().st_size, part.stat().st_size
            rounding = compare_rounded(weights, "int8", runs, num_bytes, knn)
            if patches:  # raises if they are missing or not finite
                difference(weights, onnx_function(part, patches), patches)
    finally:
        remove(whole)
        remove(folded)
    about = write_description(weights, path.with_suffix(".json"), int8=rounding.data)
    checked = f"run by onnxruntime {onnxruntime.__version__}: {rounding.checked}"
    return Exported([path, about], checked, running(path, patches), rounding.notes)
