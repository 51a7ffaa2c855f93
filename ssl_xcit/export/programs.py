"""Export programs that run without our code: ONNX, torch.export's, and ONNX in int8.

They take normalised float32 images; see `networks.py` for what they return. Exported programs hold
the direct form of cross-covariance attention, which is right for any number of tokens.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.export.comparison import (
    IMAGES,
    KNN,
    LARGER,
    compare,
    compare_objects,
    compare_rounded,
    difference,
)
from ssl_xcit.export.description import Weights
from ssl_xcit.export.networks import (
    ANY_SIZE,
    AXES,
    THRESHOLD,
    Features,
    ImageLogits,
    ImageSize,
    Network,
    Objects,
    PixelLogits,
    network_of,
)
from ssl_xcit.export.output_files import (
    Exported,
    remove,
    replacing_path,
    require,
    with_ending,
    write_description,
)

OPSET = 20


def traced(weights: Weights, network: Network) -> torch.export.ExportedProgram:
    """The network traced by torch.export; once, for it is slow."""
    key = ("program", *network.outputs, str(network.size))
    if key not in weights.traced:
        # for any size no special one: sides that are neither equal nor 1
        shape = (2, 96, 128) if network.size is None else (1, *network.size)
        images = torch.zeros(shape[0], weights.architecture["in_chans"], *shape[1:])
        example: tuple[Tensor, ...] = (images,)
        any_size: Any = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
        if isinstance(network, Objects):
            example, any_size = (images, torch.tensor(network.threshold)), None
        with quiet():
            weights.traced[key] = torch.export.export(
                network.eval(), example, dynamic_shapes=any_size
            )
    return weights.traced[key]


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


def as_onnx(weights: Weights, network: Network) -> Any:
    """The ONNX model, with what is known of it in its metadata; converted once."""
    key = ("onnx", *network.outputs, str(network.size))
    if key not in weights.traced:
        with quiet():
            program = torch.onnx.export(
                traced(weights, network), dynamo=True, input_names=inputs_of(network),
                output_names=network.outputs, opset_version=OPSET, verbose=False,
            )  # fmt: skip
        assert program is not None
        weights.traced[key] = annotated(weights, network, program.model_proto)
    return weights.traced[key]


def inputs_of(network: Network) -> tuple[str, ...]:
    """Names of the inputs."""
    return ("images", THRESHOLD) if isinstance(network, Objects) else ("images",)


def annotated(weights: Weights, network: Network, model: Any) -> Any:
    """Name the axes of any length, add what is known to the metadata, and give thresholds their
    default.
    """
    import onnx

    for value in (*model.graph.input, *model.graph.output):
        for axis, name in zip(value.type.tensor_type.shape.dim, AXES[value.name], strict=False):
            if name is not None and (network.size is None or value.name != "images"):
                axis.dim_param = name
    if isinstance(network, Objects):  # an input with an initial value may be left out
        threshold = np.array(network.threshold, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(threshold, THRESHOLD))
    for key, content in facts(weights, network).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(content)
    onnx.checker.check_model(model, full_check=False)
    return model


def facts(weights: Weights, network: Network) -> dict[str, Any]:
    """Enough to feed the network and to read what it says, as plain data."""
    mean, std = weights.preprocess.statistics()
    return {
        "mean": list(mean), "std": list(std), "resize": weights.resize,
        "size": weights.size if network.size is None else list(network.size),
        "architecture": weights.architecture, **weights.about_task(),
        **({"sizes": network.sizes, "note": network.note} if weights.task else {}),
    }  # fmt: skip


def onnx_function(path: Path, outputs: Sequence[str] | None = None) -> Callable[..., Any]:
    """A file as a function of tensors, run by onnxruntime on the CPU, to all of its outputs or
    those of such names: a tensor, or several.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    # a threshold may be left out
    names += [value.name for value in session.get_overridable_initializers()]

    def run(*inputs: Tensor) -> Any:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        tensors = tuple(map(torch.from_numpy, session.run(outputs, feed)))
        return tensors if len(tensors) > 1 else tensors[0]

    return run


def running(path: Path, network: Network) -> str:
    """Lines that run an ONNX file."""
    names = ", ".join(network.outputs)
    return (
        f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}")\n'
        f"{names if len(network.outputs) > 1 else f'({names},)'} = "
        'session.run(None, {"images": images})  # float32, normalised'
    )


def compare_program(weights: Weights, network: Network, run: Callable[..., Any]) -> str:
    """Compare a program with the network, in words."""
    if isinstance(network, Objects):
        return compare_objects(weights, run, network, network.size, network.threshold)
    shapes = LARGER if isinstance(network, PixelLogits) else IMAGES
    return compare(weights, run, expected=network, name=network.number, shapes=shapes)


def onnx(
    weights: Weights, out: Path, patches: bool = False, size: ImageSize | None = None
) -> Exported:
    """Write `NAME.onnx`, and for a task `NAME.json` with all that is known."""
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    network = network_of(weights, patches, size)
    path = with_ending(out, ".onnx")
    with replacing_path(path) as part:
        onnx.save(as_onnx(weights, network), part)
        checked = compare_program(weights, network, onnx_function(part))
    paths = [path]
    if weights.task is not None:
        about = facts(weights, network)
        paths.append(write_description(weights, with_ending(out, ".json"), **about))
    checked = f"run by onnxruntime {onnxruntime.__version__}: {checked}"
    notes = [f"opset {OPSET}; {network.sizes}", *filter(None, [network.note])]
    return Exported(paths, checked, running(path, network), notes)


def program(
    weights: Weights, out: Path, patches: bool = False, size: ImageSize | None = None
) -> Exported:
    """Write `NAME.pt2` by torch.export."""
    network = network_of(weights, patches, size)
    path = with_ending(out, ".pt2")
    with replacing_path(path) as part, quiet():
        exported = traced(weights, network)
        torch.export.save(exported, part)
        checked = compare_program(weights, network, torch.export.load(part).module())
    load, inputs = f'import torch\nnetwork = torch.export.load("{path}").module()', "images"
    sizes = network.sizes
    if isinstance(network, Objects):
        load = f"import torchvision  # its operators\n{load}"
        inputs = f"images, torch.tensor({network.threshold})"
    else:  # a grid of one row or column would be a program of its own
        least = max(int(bounds.lower) for bounds in exported.range_constraints.values())
        sizes = f"{ANY_SIZE} from {least} pixels"
    use = f"{load}\n{', '.join(network.outputs)} = network({inputs})"
    notes = [sizes, *filter(None, [network.note])]
    return Exported([path], f"loaded back by torch {torch.__version__}: {checked}", use, notes)


def int8(weights: Weights, out: Path, patches: bool = False, knn: KNN | None = None) -> Exported:
    """Write `NAME-int8.onnx`: weights of linear layers in 8 bits, inputs quantised dynamically, the
    rest in float32; `NAME-int8.json` has what the rounding costs.

    Raises:
        UserError: of segmentation and detection, which are mostly convolutions.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    network = network_of(weights, patches, None)
    if not isinstance(network, Features | ImageLogits):
        raise UserError(
            "int8 rounds linear layers, and the heads of dense tasks are convolutions: choose "
            "format=onnx, or head=false for the features of the backbone"
        )
    path = with_ending(out, "-int8.onnx")
    whole, folded = (path.with_name(f".{path.name}.{word}.part") for word in ("whole", "folded"))
    try:
        with replacing_path(path) as part:
            onnx.save(as_onnx(weights, network), whole)
            with quiet():
                # layer scale times weights becomes weights, which alone are quantised
                quant_pre_process(whole, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
                # in 7 of the 8 bits, or products would overflow on CPUs with AVX2 and no VNNI
                quantize_dynamic(
                    folded, part, weight_type=QuantType.QInt8, per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm"], reduce_range=True,
                )  # fmt: skip
            first = network.outputs[:1]
            runs = onnx_function(whole, first), onnx_function(part, first)
            num_bytes = whole.stat().st_size, part.stat().st_size
            rounding = compare_rounded(weights, "int8", runs, num_bytes, knn)
            if patches:  # raises if they are missing or not finite
                difference(weights, onnx_function(part), network)
    finally:
        remove(whole)
        remove(folded)
    about = write_description(weights, path.with_suffix(".json"), int8=rounding.data)
    checked = f"run by onnxruntime {onnxruntime.__version__}: {rounding.checked}"
    return Exported([path, about], checked, running(path, network), rounding.notes)
