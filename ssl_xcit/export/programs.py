"""The network as a program that needs no code of ours: ONNX, torch.export's, and ONNX in int8.

Images of any number, height and width, float32, normalised; class tokens `features` (B, C), and on
demand `patches` (B, C, h, w). Exported programs hold the direct form of cross-covariance attention,
which is right for any number of tokens.
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

from ssl_xcit.export.exported import (
    Made,
    Run,
    Weights,
    beside,
    compare,
    difference,
    needs,
    remove,
    tell,
    with_ending,
)
from ssl_xcit.export.rounded import KNN, cost
from ssl_xcit.models.xcit import XCiT

OPSET = 20


class Outputs(nn.Module):
    """The backbone with outputs by choice."""

    def __init__(self, backbone: XCiT, patches: bool):
        super().__init__()
        self.backbone, self.patches = backbone, patches

    def forward(self, images: Float[Tensor, "B in_chans H W"]) -> Any:
        """Features, and the patches' where they are wanted."""
        if not self.patches:
            return self.backbone(images)
        return tuple(self.backbone.forward_features(images))


def outputs(patches: bool) -> tuple[str, ...]:
    """Their names."""
    return ("features", "patches") if patches else ("features",)


def traced(weights: Weights, patches: bool) -> torch.export.ExportedProgram:
    """The backbone by torch.export for any batch, height and width; once for all formats, for it
    takes the most time of them.
    """
    names = outputs(patches)
    if names not in weights.traced:
        any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        # of no special size: sides that are neither equal nor 1
        images = torch.zeros(2, weights.architecture["in_chans"], 48, 64)
        with quiet():
            weights.traced[names] = torch.export.export(
                Outputs(weights.backbone, patches).eval(), (images,), dynamic_shapes=(any_size,)
            )
    return weights.traced[names]


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell of their inner life."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def as_onnx(weights: Weights, patches: bool) -> Any:
    """The model, which says of itself how images are fed; made once."""
    names = ("images", *outputs(patches))
    if names not in weights.traced:
        with quiet():
            program = torch.onnx.export(
                traced(weights, patches), dynamo=True, input_names=names[:1],
                output_names=names[1:], opset_version=OPSET, verbose=False,
            )  # fmt: skip
        assert program is not None
        weights.traced[names] = described(weights, program.model_proto)
    return weights.traced[names]


def described(weights: Weights, model: Any) -> Any:
    """Axes that may have any length have names, and the metadata what it takes to feed images."""
    import onnx

    names = {"images": ("batch", None, "height", "width"), "features": ("batch", None)}
    names["patches"] = ("batch", None, "rows", "columns")
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(value.type.tensor_type.shape.dim, names[value.name], strict=True):
            if name is not None:
                axis.dim_param = name
    mean, std = weights.how.statistics()
    about = {
        "mean": list(mean), "std": list(std), "resize": weights.resize, "size": weights.size,
        "architecture": weights.architecture,
    }  # fmt: skip
    for key, content in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(content)
    onnx.checker.check_model(model, full_check=False)
    return model


def session(path: Path, patches: bool = False) -> Run:
    """onnxruntime on the CPU, as a function of tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Float[Tensor, "B in_chans H W"]) -> Any:
        found = made.run(outputs(patches), {"images": images.numpy()})
        return tuple(map(torch.from_numpy, found)) if patches else torch.from_numpy(found[0])

    return run


def use_of(path: Path, patches: bool = False) -> str:
    """Lines that run it."""
    names = "features, patches" if patches else "(features,)"
    return (
        f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}")\n{names} = '
        'session.run(None, {"images": images})  # float32, normalised'
    )


def onnx(weights: Weights, out: Path, patches: bool = False) -> Made:
    """`NAME.onnx`."""
    needs("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    path = with_ending(out, ".onnx")
    with beside(path) as part:
        onnx.save(as_onnx(weights, patches), part)
        checked = compare(weights, session(part, patches), patches=patches)
    words = f"run by onnxruntime {onnxruntime.__version__}: {checked}"
    notes = [f"opset {OPSET}; any batch, height and width"]
    return Made([path], words, use_of(path, patches), notes)


def program(weights: Weights, out: Path, patches: bool = False) -> Made:
    """`NAME.pt2`, by torch.export."""
    path = with_ending(out, ".pt2")
    with beside(path) as part, quiet():
        made = traced(weights, patches)
        torch.export.save(made, part)
        checked = compare(weights, torch.export.load(part).module(), patches=patches)
    # a grid of one row or column would be a program of its own
    least = max(int(bounds.lower) for bounds in made.range_constraints.values())
    load = f'import torch\nbackbone = torch.export.load("{path}").module()'
    use = f"{load}\n{', '.join(outputs(patches))} = backbone(images)"
    notes = [f"any batch, height and width from {least} pixels"]
    return Made([path], f"loaded back by torch {torch.__version__}: {checked}", use, notes)


def int8(weights: Weights, out: Path, patches: bool = False, knn: KNN | None = None) -> Made:
    """`NAME-int8.onnx`: weights of linear layers in 8 bits, their inputs quantised as they come;
    convolutions and softmax stay float32. `NAME-int8.json` has what that costs.
    """
    needs("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = with_ending(out, "-int8.onnx")
    whole, folded = (path.with_name(f".{path.name}.{word}.part") for word in ("whole", "folded"))
    try:
        with beside(path) as part:
            onnx.save(as_onnx(weights, patches), whole)
            with quiet():
                # layer scale times weights becomes weights, which alone are quantised
                quant_pre_process(whole, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
                quantize_dynamic(
                    folded, part, weight_type=QuantType.QInt8, per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm"],
                )  # fmt: skip
            runs = session(whole), session(part)
            num_bytes = whole.stat().st_size, part.stat().st_size
            checked, notes, data = cost(weights, "int8", runs, num_bytes, knn)
            if patches:  # that they are there, and finite
                difference(weights, session(part, patches), patches)
    finally:
        remove(whole)
        remove(folded)
    about = tell(weights, path.with_suffix(".json"), int8=data)
    words = f"run by onnxruntime {onnxruntime.__version__}: {checked}"
    return Made([path, about], words, use_of(path, patches), notes)
