"""What every format shares: what is known of the weights, real images to compare on, and the rule
that a file is compared before it gets its name.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ssl_xcit.data.decode import RGB, decode
from ssl_xcit.data.photos import photos
from ssl_xcit.data.preprocess import Preprocess, normalise, of_weights
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.weights import model_name
from ssl_xcit.models.xcit import XCiT

Run = Callable[[Float[Tensor, "B in_chans H W"]], Float[Tensor, "B C"]]
SIZES = ((2, 64, 64), (1, 96, 160), (3, 75, 52), (1, 224, 224))  # images, height, width
CLOSE = 1e-5  # largest difference of a feature, times the largest feature where that is above 1


@dataclass(frozen=True)
class Weights:
    """What is exported.

    Args:
        backbone: in eval mode.
        name: of the run or of the file, for the names of what is written.
        about: plain data: model, preprocessing, file and its SHA-256, versions, the run's numbers.
        resize: short side in pixels at which the run was measured.
        size: of the central square.
    """

    backbone: XCiT
    name: str
    about: Mapping[str, Any]
    resize: int = 256
    size: int = 224

    @property
    def how(self) -> Preprocess:
        """From files to the network's input."""
        return of_weights(self.backbone.preprocess)

    @property
    def architecture(self) -> dict[str, Any]:
        """Of what is exported: features, without a classifier."""
        return {**self.backbone.architecture, "num_classes": 0}

    def state(self) -> dict[str, Tensor]:
        """The backbone's tensors, without a classifier."""
        found = self.backbone.state_dict()
        return {k: v.contiguous() for k, v in found.items() if not k.startswith("head.")}


KNN = Callable[[Weights, Mapping[str, Run]], dict[str, float]]  # k-NN in percent by each


@dataclass
class Made:
    """What an export has left.

    Args:
        paths: files and folders.
        checked: how it was compared.
        use: lines that use it.
        notes: other things to know.
    """

    paths: list[Path]
    checked: str
    use: str
    notes: list[str] = field(default_factory=list)


def real_images(weights: Weights) -> Iterator[Float[Tensor, "B in_chans H W"]]:
    """Batches of several sizes from the built-in photographs, normalised as the weights want; other
    numbers of channels take theirs in turn.
    """
    source, how = photos(), weights.how
    channels = np.arange(how.channels) % 3
    for count, height, width in SIZES:
        pictures = []
        for index in range(count):
            pixels = decode(source.read(index * 97), RGB)
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(image)[..., channels].transpose(2, 0, 1))
        yield normalise(torch.from_numpy(np.stack(pictures)), how)


def compare(weights: Weights, run: Run, close: float | None = CLOSE) -> str:
    """How far another form of the weights is from the backbone, in words.

    Args:
        weights: what it must equal.
        run: the other form, images to class tokens.
        close: the most that is borne; None: anything.

    Raises:
        RunFailed: it is further off.
    """
    worst = 0.0
    with torch.inference_mode():
        for images in real_images(weights):
            ours, theirs = weights.backbone(images), run(images)
            if theirs.shape != ours.shape:
                raise RunFailed(f"features {tuple(theirs.shape)} came out, not {tuple(ours.shape)}")
            scale = max(1.0, ours.abs().max().item())
            worst = max(worst, (theirs.float() - ours).abs().max().item() / scale)
    if close is not None and not worst <= close:
        raise RunFailed(
            f"features differ by {worst:.1e}, more than {close:.0e}: nothing is exported; please "
            "report this with the versions of the libraries"
        )
    sizes = ", ".join(f"{h} x {w}" for _, h, w in SIZES)
    return f"largest difference of a feature {worst:.1e} on photographs of {sizes}"


def accuracy(weights: Weights, runs: Mapping[str, Run], knn: KNN | None) -> str:
    """k-NN by each, the last less the first, where there are labelled images."""
    if knn is None:
        return "k-NN was not measured: there are no labelled images (eval_data=folder ...)"
    found = knn(weights, runs)
    told = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    values = list(found.values())
    return f"k-NN 20 in %: {told}, a difference of {values[-1] - values[0]:+.1f}"


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """As safetensors, readable by others as any file is: the library keeps it to the user."""
    save_file(tensors, path, header)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def with_ending(out: Path, ending: str) -> Path:
    """A name may have dots."""
    return out.with_name(out.name + ending)


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A name to write a file or a folder under, which takes the place of `out` at the end, or is
    removed.
    """
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    remove(part)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        if out.is_dir() and part.is_dir():
            remove(out)
        os.replace(part, out)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """A file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def needs(extra: str, *modules: str) -> None:
    """That an optional library is there.

    Raises:
        UserError: it is not; says what to install.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"this format needs {module}: pip install 'ssl-xcit[{extra}]'"
            ) from error


def title(weights: Weights) -> str:
    """`xcit_small_12_p16`, or the numbers."""
    return model_name(weights.backbone.architecture)


def numbers_of(
    about: Mapping[str, Any],
) -> tuple[Mapping[str, float], Mapping[str, Sequence[float]]]:
    """The run's final numbers of the pretrained network, and their intervals."""
    results, intervals = about.get("results") or {}, about.get("intervals") or {}
    last = list(results)[-1] if results else ""
    return results.get(last, {}), intervals.get(last, {})
