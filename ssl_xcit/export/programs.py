"""The network as a program that needs no code of ours: ONNX, torch.export's, and ONNX in int8.

Images of any number, height and width, float32, normalised; class tokens `features` (B, C), and on
demand `patches` (B, C, h, w). Exported programs hold the direct form of cross-covariance attention,
which is right for any number of tokens.
"""

import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.export.exported import (
    KNN,
    Made,
    Run,
    Weights,
    accuracy,
    beside,
    compare,
    needs,
    real_images,
    remove,
    with_ending,
)
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


def any_size() -> tuple[dict[int, Any], ...]:
    """Of batch, height and width."""
    dynamic = torch.export.Dim.DYNAMIC
    return ({0: dynamic, 2: dynamic, 3: dynamic},)


def an_input(weights: Weights) -> Tensor:
    """Of no special size: sides that are neither equal nor 1."""
    return torch.zeros(2, weights.architecture["in_chans"], 48, 64)


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


def write_onnx(weights: Weights, path: Path, patches: bool) -> None:
    """One file, which says of itself how images are fed."""
    import onnx

    outputs = ["features", *(["patches"] if patches else [])]
    network = Outputs(weights.backbone, patches).eval()
    with quiet():
        program = torch.onnx.export(
            network, (an_input(weights),), dynamo=True, dynamic_shapes=any_size(),
            input_names=["images"], output_names=outputs, opset_version=OPSET, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
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
    onnx.save(model, path)


def session(path: Path) -> Run:
    """onnxruntime on the CPU, as a function of tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B C"]:
        return torch.from_numpy(made.run(["features"], {"images": images.numpy()})[0])

    return run


def use_of(path: Path) -> str:
    """Lines that run it."""
    return (
        f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}")\n'
        '(features,) = session.run(["features"], {"images": images})  # float32, normalised'
    )


def onnx(weights: Weights, out: Path, patches: bool = False) -> Made:
    """`NAME.onnx`."""
    needs("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    path = with_ending(out, ".onnx")
    with beside(path) as part:
        write_onnx(weights, part, patches)
        checked = compare(weights, session(part))
    words = f"run by onnxruntime {onnxruntime.__version__}: {checked}"
    return Made([path], words, use_of(path), [f"opset {OPSET}; any batch, height and width"])


def program(weights: Weights, out: Path, patches: bool = False) -> Made:
    """`NAME.pt2`, by torch.export."""
    path = with_ending(out, ".pt2")
    with beside(path) as part, quiet():
        network = Outputs(weights.backbone, patches).eval()
        exported = torch.export.export(network, (an_input(weights),), dynamic_shapes=any_size())
        torch.export.save(exported, part)
        loaded = torch.export.load(part).module()
        checked = compare(weights, (lambda x: loaded(x)[0]) if patches else loaded)
    load = f'import torch\nbackbone = torch.export.load("{path}").module()'
    use = f"{load}\nfeatures = backbone(images)"
    return Made([path], f"loaded back by torch {torch.__version__}: {checked}", use)


def int8(weights: Weights, out: Path, knn: KNN | None = None) -> Made:
    """`NAME-int8.onnx`: weights of linear layers in 8 bits, their inputs quantised as they come;
    convolutions and softmax stay float32. Says what that costs.
    """
    needs("onnx", "onnx", "onnxscript", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = with_ending(out, "-int8.onnx")
    whole, folded = (with_ending(path, f".{name}.onnx") for name in ("whole", "folded"))
    try:
        with beside(path) as part:
            write_onnx(weights, whole, patches=False)
            with quiet():
                # layer scale times weights becomes weights, which alone are quantised
                quant_pre_process(whole, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
                quantize_dynamic(
                    folded, part, weight_type=QuantType.QInt8, per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm"],
                )  # fmt: skip
            plain, low = session(whole), session(part)
            checked = compare(weights, low, close=None)
            size = part.stat().st_size / whole.stat().st_size
            speed = times_as_fast(weights, plain, low)
            cost = accuracy(weights, {"float32": weights.backbone, "int8": low}, knn)
    finally:
        remove(whole)
        remove(folded)
    notes = [f"{size:.2f} of the size of float32, {speed:.2f} times as fast here on 224 x 224"]
    return Made([path], f"run by onnxruntime: {checked}", use_of(path), [*notes, cost])


def times_as_fast(weights: Weights, one: Run, two: Run, rounds: int = 7) -> float:
    """The median of one's time over two's, interleaved, on four large images."""
    *_, large = real_images(weights)
    images = large.repeat(4, 1, 1, 1)
    ratios = []
    for _ in range(rounds):
        seconds = []
        for run in (one, two):
            started = time.perf_counter()
            run(images)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
