"""What every format shares: what is known of the weights, real images to compare on, and the rule
that a file is compared before it gets its name.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from ssl_xcit.files import flush, write_json
from ssl_xcit.models.weights import model_name
from ssl_xcit.models.xcit import XCiT

Run = Callable[[Float[Tensor, "B in_chans H W"]], Any]  # to (B, C), or (B, C) and (B, C, h, w)
SIZES = ((2, 64, 64), (1, 96, 160), (3, 75, 52), (1, 224, 224))  # images, height, width
PRETRAINED = "pretrained"  # the row of results that is of the weights
CLOSE = 1e-5  # largest difference of a feature, over the largest feature where that is above 1


@dataclass(frozen=True)
class Weights:
    """What is exported.

    Args:
        backbone: in eval mode.
        name: of the run or of the file, for the names of what is written.
        about: plain data: model, file and its SHA-256, versions, the run's numbers.
        resize: short side in pixels at which the run was measured.
        size: of the central square.
        traced: programs of the backbone that several formats start from, by names of tensors.
    """

    backbone: XCiT
    name: str
    about: Mapping[str, Any]
    resize: int = 256
    size: int = 224
    traced: dict[tuple[str, ...], Any] = field(default_factory=dict, compare=False, repr=False)

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


@dataclass
class Difference:
    """Of another form of the weights from the backbone.

    Args:
        largest: of a feature, over the largest feature where that is above 1.
        cosine: the least between class tokens of an image.
    """

    largest: float = 0.0
    cosine: float = 1.0


def difference(weights: Weights, run: Run, patches: bool = False) -> Difference:
    """On real images of several sizes, one and several at once.

    Args:
        weights: what it is compared with.
        run: the other form, images to class tokens, or with `patches` to those and patch tokens.
        patches: compare these too.

    Raises:
        UserError: the weights themselves give features that are not finite.
        RunFailed: the others are not, or have other shapes.
    """
    found = Difference()
    with torch.inference_mode():
        for images in real_images(weights):
            backbone = weights.backbone
            ours = backbone.forward_features(images) if patches else (backbone(images),)
            out = run(images)
            theirs = out if isinstance(out, tuple) else (out,)
            shapes = [[tuple(t.shape) for t in tensors] for tensors in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise RunFailed(f"features {shapes[1]} came out, not {shapes[0]}")
            if not all(t.isfinite().all() for t in ours):
                raise UserError(
                    "these weights give features that are not finite: take an earlier checkpoint, "
                    "ckpt=RUN/checkpoints/step-....ckpt"
                )
            if not all(t.isfinite().all() for t in theirs):
                raise RunFailed("features came out that are not finite: nothing is exported")
            for one, other in zip(ours, theirs, strict=True):
                scale = max(1.0, one.abs().max().item())
                apart = (other.float() - one).abs().max().item() / scale
                found.largest = max(found.largest, apart)
            cosine = torch.cosine_similarity(ours[0], theirs[0].float()).min().item()
            found.cosine = min(found.cosine, cosine)
    return found


def compare(weights: Weights, run: Run, close: float = CLOSE, patches: bool = False) -> str:
    """How far another form of the weights is from the backbone, in words; see `difference`.

    Raises:
        RunFailed: it is further off than `close`.
    """
    found = difference(weights, run, patches)
    if found.largest > close:
        raise RunFailed(
            f"features differ by {found.largest:.1e}, more than {close:.0e}: nothing is exported; "
            "please report this with the versions of the libraries"
        )
    what = "class or patch feature" if patches else "feature"
    return f"largest difference of a {what} {found.largest:.1e} on photographs of {sizes()}"


def sizes() -> str:
    """Of the images that are compared."""
    return ", ".join(f"{h} x {w}" for _, h, w in SIZES)


def tell(weights: Weights, path: Path, **more: Any) -> Path:
    """`path`, a JSON file with all that is known of what was exported."""
    kept = {"architecture": weights.architecture, "preprocess": weights.how.of_weights()}
    write_json({**kept, **weights.about, **more}, path)
    return path


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
def beside(out: Path, ours: Collection[str] = ()) -> Iterator[Path]:
    """A name to write a file or a folder under, which takes the place of `out` at the end, or is
    removed. What gets the name is on the disk.

    Args:
        out: the name.
        ours: files of a folder; one with others in it is not replaced.

    Raises:
        UserError: there is something else of that name.
    """
    if out.is_dir() and (others := sorted(p.name for p in out.iterdir() if p.name not in ours)):
        raise UserError(
            f"{out} holds {others[0]}, which is not of this command: move it, or name another out="
        )
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    remove(part)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        for path in (*part.rglob("*"), part):
            flush(path)
        if out.is_dir():
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
    return results.get(PRETRAINED, {}), intervals.get(PRETRAINED, {})
