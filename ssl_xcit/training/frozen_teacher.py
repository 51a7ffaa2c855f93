"""Networks that are not trained and teach others: any model of timm, a run of ours, a checkpoint.

Weights are read as tensors only, so that a hostile file runs no code.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, read_weights
from ssl_xcit.models.published import TIMM, fetch_released
from ssl_xcit.models.weights import load_backbone
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.utils.validation import PLACE, Count
from ssl_xcit.utils.words import first_few

Compiled = bool | Literal["auto"]
PIP = "pip install 'ssl-xcit[timm]'"


class FrozenNetwork:
    """A network in eval mode without gradients; no module, so that it is in no state dict.

    Args:
        network: takes normalised images.
        preprocess: how it wants images to be normalised.
        size: side of the images that it takes; None: any.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess, size: int | None = None):
        self.network = network.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.size = size

    def prepared(
        self, images: Float[Tensor, "B channels H W"], preprocess: Preprocess
    ) -> Float[Tensor, "B channels _ _"]:
        """Images that were normalised with other statistics as the network wants them, resized
        (bicubic) where it takes another size; it moves to their device.
        """
        parameter = next(self.network.parameters())
        if parameter.device != images.device:
            self.network.to(images.device)
        if preprocess.statistics() != self.preprocess.statistics():
            (mean, std), (its_mean, its_std) = (
                [images.new_tensor(v)[:, None, None] for v in p.statistics()]
                for p in (preprocess, self.preprocess)
            )
            images = (images * std + (mean - its_mean)) / its_std
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            sides = (self.size, self.size)
            images = interpolate(images, sides, mode="bicubic", antialias=True)
        return images

    def sha256(self) -> str:
        """A digest of its weights."""
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class TeacherBackbone(FrozenNetwork):
    """Embeddings of images, and of their patches.

    Args:
        network: an XCiT, or a model of timm without a classifier.
        preprocess: see `FrozenNetwork`.
        size: likewise.
        of_images: how images that it is given are normalised.
        compiled: whether its passes are compiled; auto: on a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        size: int | None,
        of_images: Preprocess,
        compiled: Compiled = False,
    ):
        super().__init__(network, preprocess, size)
        self.of_images = of_images
        own: Any = network
        if isinstance(network, XCiT):
            self.width = network.embed_dim
        else:  # of some networks a layer after the pooling widens it
            self.width = int(getattr(own, "head_hidden_size", None) or own.num_features)
        self.compiled: Compiled = compiled

    @cached_property
    def compiled_features(self) -> Callable[[Tensor], Any]:
        """The network's features by a compiled pass, one program for each size of images."""
        network: Any = self.network
        return torch.compile(network.forward_features, dynamic=False)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "B channels H W"], patches: bool
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B h w D"] | None]:
        """Embeddings of images as the student sees them, in the images' type: on a GPU computed in
        bfloat16, on a CPU as the student is.

        Raises:
            UserError: patches are asked for of a network whose features are no grid.
        """
        network: Any = self.network
        kind = images.device.type
        compiled = kind == "cuda" if self.compiled == "auto" else self.compiled
        extract = self.compiled_features if compiled else network.forward_features
        low = kind == "cuda" or torch.is_autocast_enabled(kind)
        with torch.autocast(kind, torch.bfloat16, enabled=low):
            features = extract(self.prepared(images, self.of_images))
            if isinstance(network, XCiT):
                embeddings, grid = features.cls, features.patches.movedim(1, -1)
            else:
                embeddings = network.forward_head(features, pre_logits=True)
                grid = self.grid_of(features) if patches else None
        grid = None if grid is None or not patches else grid.to(images.dtype)
        return embeddings.to(images.dtype), grid

    def grid_of(self, features: Any) -> Float[Tensor, "B h w D"]:
        """Patch tokens of timm's models in their places: of those with tokens (B, N, D), their
        first `num_prefix_tokens` left out, or with maps (B, D, h, w) or (B, h, w, D).
        """
        network: Any = self.network
        if isinstance(features, Tensor) and features.ndim == 4:
            return (
                features.movedim(1, -1) if features.shape[1] == network.num_features else features
            )
        if isinstance(features, Tensor) and features.ndim == 3:
            with_class = getattr(network, "cls_token", None) is not None
            tokens = features[:, getattr(network, "num_prefix_tokens", int(with_class)) :]
            side = math.isqrt(tokens.shape[1])
            if side > 1 and side * side == tokens.shape[1]:
                return tokens.unflatten(1, (side, side))
        raise UserError(
            "the teacher's features are not a square grid of patches: set local_weight=0 of the "
            "objective"
        )


def load_frozen_teacher(
    name: str,
    file: str | None,
    of_images: Any = None,
    size: Count | None = None,
    compile: Annotated[Compiled, PLACE] = False,
    patches: bool = False,
) -> TeacherBackbone:
    """Load a teacher of features.

    Args:
        name: `timm/NAME` of a model of timm, or what `load_backbone` takes: a run of ours or a
            checkpoint, by path or released name.
        file: weights of a timm model; None: timm's own, which it downloads.
        of_images: a `Preprocess`, how images that it is given are normalised; None: as ImageNet's.
        size: side of the images that the teacher gets; None: the student's, unless the model takes
            only one.
        compile: whether its passes are compiled; auto: on a GPU.
        patches: whether those of patches are wanted, which one image then tries.

    Raises:
        MissingPath: no such file.
        UserError: timm is not installed, knows no such model or cannot download it; the weights
            do not fit; the teacher takes images of other channels, or has no grid of patches.
    """
    given: Preprocess = of_images or Preprocess()
    if name.startswith(TIMM):
        model, path = timm_weights(name, file, "objective.teacher_ckpt")
        network = timm_features(model)
        settings: Any = network.pretrained_cfg
        load_timm(network, name, path, tuple(f"{head}." for head in classifiers_of(network)))
        channels = settings["input_size"][0]
        preprocess = Preprocess(channels, tuple(settings["mean"]), tuple(settings["std"]))
        if size is None and settings.get("fixed_input_size") and not takes_any_size(network):
            size = settings["input_size"][-1]
    elif file is not None:
        raise UserError(
            f"objective.teacher_ckpt={file} is for teachers of timm: name the checkpoint itself "
            f"with objective.teacher={file}"
        )
    else:
        network = load_backbone(name)
        preprocess = of_weights(network.preprocess)
        channels = preprocess.channels
    if channels != given.channels:
        raise UserError(
            f"objective.teacher={name} takes images of {channels} channels, and these have "
            f"{given.channels}: choose another teacher"
        )
    teacher = TeacherBackbone(network, preprocess, size, given, compile)
    if patches and not isinstance(network, XCiT):
        side = size or settings["input_size"][-1]
        with torch.no_grad():
            teacher.grid_of(network.forward_features(torch.zeros(1, channels, side, side)))
    return teacher


def timm_features(model: str) -> Any:
    """A model of timm without classifier, vision transformers for any size of images."""
    import timm

    try:
        return timm.create_model(model, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    except TypeError:  # other networks have no such arguments
        return timm.create_model(model, num_classes=0)


def classifiers_of(network: Any) -> Sequence[str]:
    """Names of the classifiers of a model of timm, such as `head`; some have two, some none."""
    names = network.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else names


def takes_any_size(network: Any) -> bool:
    """Whether a model of timm was made for images of any size."""
    return bool(getattr(network, "dynamic_img_size", False))


def timm_weights(
    name: str, file: str | None, file_setting: str, hint: str = ""
) -> tuple[str, Path]:
    """The name of a model of timm, and a file of its weights.

    Args:
        name: `timm/NAME`.
        file: its weights; None: timm's own, which are downloaded once.
        file_setting: that names `file`, for messages.
        hint: what to say of a model that timm does not have.

    Raises:
        MissingPath: no such file.
        UserError: timm is not installed, knows no such model or cannot download it.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"teacher={name} needs timm: {PIP}") from error
    model = name.removeprefix(TIMM)
    if not timm.is_model(model.partition(".")[0]):
        raise UserError(f"teacher={name}: timm {timm.__version__} has no such model{hint}")
    if file is not None:
        return model, checkpoint_path(file)
    try:
        released = timm.get_pretrained_cfg(model)
        return model, fetch_released((released and released.hf_hub_id) or name)
    except UserError as error:
        raise UserError(f"teacher={name}: {error} (of a teacher: {file_setting}=FILE)") from error


def timm_state(path: Path) -> dict[str, Any]:
    """Tensors under timm's names, of a file of weights alone or of a training script's."""
    content: Mapping[str, Any] = read_weights(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def load_timm(network: nn.Module, name: str, path: Path, without: tuple[str, ...] = ()) -> None:
    """Load a file of weights under timm's names strictly.

    Args:
        network: of timm.
        name: of the teacher, for messages.
        path: of the file.
        without: beginnings of the names of tensors that the network does not have.

    Raises:
        UserError: it does not fit; lists tensors.
    """
    state = {k: v for k, v in timm_state(path).items() if not k.startswith(without)}
    own = network.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is not of shape {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and getattr(state[key], "shape", None) != value.shape
    ]
    if problems:
        raise UserError(f"{path} does not fit teacher={name}: {first_few(problems)}")
    network.load_state_dict(state)
