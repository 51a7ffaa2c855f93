"""Semantic segmentation from frozen patch features: a linear classifier of patches, and k-NN.

After DINOv2's linear protocol (arXiv:2304.07193, section 7.4): class logits of every patch from its
last features, normalised without learnt gains, upsampled bilinearly to the mask. Differs: images
are squeezed to a square once, without augmentation; the classifier is a logistic regression on a
sample of patches, each with the label that most of its pixels have, its L2 strength chosen on
held-out training images. k-NN asks a bank of those patches, with votes exp(cosine / temperature)
(arXiv:2104.14294, section 4.1), upsampled likewise.

IoU of a class = hits / (predicted + true - hits) over the pixels of all validation images; mIoU is
its mean over the classes that masks or predictions have.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, normalize, one_hot

from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import Count, Positive, Text

from ..evaluators.logistic import Problem, softmax_loss
from ..evaluators.protocol import Fraction, OneOrMore, Seed, Task, as_list
from ..features.extractor import FeatureExtractor
from ..statistics import Estimate
from .masks import (
    IGNORED,
    NUM_INDICES,
    Directory,
    Mask,
    Pair,
    check_side,
    find_pairs,
    finite,
    read_batches,
    resize_mask,
)

log = logging.getLogger(__name__)
NUMBERS = 2**25  # at once: 128 MiB
Head = Callable[[Float[Tensor, "M C"]], Float[Tensor, "M K"]]  # patches -> a score for each class
Counts = Int64[np.ndarray, "Q 3 K"]  # of each image: pixels hit, predicted, true by class


@dataclass(frozen=True)
class Patches:
    """Labelled patches of the training images."""

    features: Float[Tensor, "N C"]  # after the backbone's last norm
    classes: Int64[Tensor, " N"]  # places in `indices`
    owner: Int64[Tensor, " N"]  # which image each is from
    indices: UInt8[np.ndarray, " K"]  # what the masks call the classes


def miou(counts: Counts, weights: Float[np.ndarray, " Q"]) -> float:
    """Percent: mean IoU over the classes that masks or predictions have."""
    hits, predicted, true = np.tensordot(weights, counts, axes=1)
    union = predicted + true - hits
    there = union > 0
    return 100.0 * float(np.mean(hits[there] / union[there]))


def pixel_accuracy(counts: Counts, weights: Float[np.ndarray, " Q"]) -> float:
    """Percent of labelled pixels that are right."""
    hits, _, true = np.tensordot(weights, counts, axes=1).sum(axis=1)
    return 100.0 * float(hits / true)


def count(predicted: Mask, mask: Mask) -> Int64[np.ndarray, "3 indices"]:
    """Pixels hit, predicted and true of every index, where the mask has a label."""
    labelled = mask != IGNORED
    predicted, true = predicted[labelled], mask[labelled]
    parts = (true[true == predicted], predicted, true)
    return np.stack([np.bincount(part, minlength=NUM_INDICES) for part in parts])


def patch_labels(mask: Mask, grid: tuple[int, int], patch_size: int) -> Int64[Tensor, " N"]:
    """The index that most pixels of each patch have, row by row; the lowest of several."""
    h, w = grid
    pixels = torch.from_numpy(resize_mask(mask, h * patch_size, w * patch_size).astype(np.int64))
    pixels = pixels.view(h, patch_size, w, patch_size).transpose(1, 2)
    return pixels.reshape(h * w, patch_size * patch_size).mode(dim=1).values


def upsampled_argmax(values: Float[Tensor, "K h w"], size: tuple[int, int]) -> Int64[Tensor, "H W"]:
    """The class of the highest value after bilinear interpolation, in strips of bounded memory."""
    rows, columns = (
        interpolate(torch.eye(few, device=values.device)[None], many, mode="linear")[0]
        for few, many in zip(values.shape[1:], size, strict=True)
    )  # (h, H), (w, W): what each pixel takes from each patch
    wide = values @ columns  # (K, h, W)
    strips = rows.split(max(1, NUMBERS // wide[:, 0].numel()), dim=1)
    return torch.cat([torch.einsum("kix,iy->kyx", wide, strip).argmax(0) for strip in strips])


def logistic_path(
    x: Float[Tensor, "N C"],
    classes: Int64[Tensor, " N"],
    num_classes: int,
    strengths: Sequence[float],
    iterations: int,
) -> Iterator[tuple[Float[Tensor, "K C"], Float[Tensor, " K"]]]:
    """Weights and biases with the least mean cross-entropy + strength / 2 |W|^2, one pair a
    strength, each from the last one's.
    """
    problem, model = Problem(x, classes, softmax_loss, num_classes), None
    for strength in strengths:
        model = problem.solve(strength, model, iterations)
        yield model


def fit_linear(
    patches: Patches, strengths: Sequence[float], iterations: int, held_fraction: float, seed: int
) -> tuple[Head, float]:
    """A linear classifier of standardised features, and the L2 strength that was chosen: that with
    the lowest cross-entropy on the patches of held-out images. Then all images train it.
    """
    mean, std = patches.features.mean(0), patches.features.std(0).clamp_min(1e-6)
    x, classes, num_classes = (patches.features - mean) / std, patches.classes, len(patches.indices)
    generator = torch.Generator().manual_seed(seed)
    images = torch.unique(patches.owner)
    num_held = min(max(1, round(held_fraction * len(images))), len(images) - 1)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    held = torch.isin(patches.owner, images[order[:num_held]])
    path = sorted(strengths, reverse=True)
    losses = [
        float(cross_entropy(x[held] @ weight.T + bias, classes[held]))
        for weight, bias in logistic_path(x[~held], classes[~held], num_classes, path, iterations)
    ]
    chosen = int(np.argmin(losses))
    *_, (weight, bias) = logistic_path(x, classes, num_classes, path[: chosen + 1], iterations)
    return lambda queries: (queries - mean) / std @ weight.T + bias, path[chosen]


def bank_head(patches: Patches, k: int, temperature: float, max_bank: int, seed: int) -> Head:
    """Share of the votes of the k nearest among at most `max_bank` patches."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(patches.features), generator=generator)[:max_bank]
    rows = rows.to(patches.features.device)
    bank = normalize(patches.features[rows])
    voters = one_hot(patches.classes[rows], len(patches.indices)).to(bank.dtype)  # (N, K)

    def votes(queries: Tensor) -> Tensor:
        parts = []
        for block in normalize(queries).split(max(1, NUMBERS // len(bank))):
            cosine, places = (block @ bank.T).topk(min(k, len(bank)), dim=1)
            parts.append(
                torch.einsum("mk,mkc->mc", (cosine / temperature).softmax(1), voters[places])
            )
        return torch.cat(parts)

    return votes


class Segmentation(Task):
    """mIoU and pixel accuracy in percent of both heads: `segmentation_linear_miou`,
    `segmentation_linear_accuracy`, `segmentation_knn_miou`, `segmentation_knn_accuracy`; and the
    L2 strength that was chosen: `segmentation_linear_l2`. Raises MissingPath where files are
    missing, UserError where there is one training image only.

    Args:
        root: images and masks of training and validation, see `masks.py`.
        size: side of the square that images are squeezed to, a multiple of the patch size.
        ignore_zero: index 0 is no class, as in ADE20K; 255 never is one.
        max_train_patches: labelled patches to learn from, evenly of all images.
        max_bank: those that k-NN compares with.
        k: neighbours that vote.
        temperature: of the votes.
        strengths: of the L2 penalty, to choose from.
        iterations: of L-BFGS at most, for each strength.
        held_fraction: share of the training images that the choice is made on.
        seed: of samples and held-out images.
    """

    def __init__(
        self,
        root: Directory,
        size: Count = 448,
        ignore_zero: bool = False,
        max_train_patches: Count = 500_000,
        max_bank: Count = 100_000,
        k: Count = 20,
        temperature: Positive = 0.07,
        strengths: OneOrMore[Positive] = (0.1, 0.01, 0.001, 0.0001, 0.00001, 0.000001),
        iterations: Count = 100,
        held_fraction: Fraction = 0.2,
        seed: Seed = 0,
        name: Text = "segmentation",
    ):
        self.train, self.val = find_pairs(root, "train"), find_pairs(root, "val")
        if len(self.train) < 2:
            raise UserError(
                f"root={root}: one training image; a second is needed to choose the strength"
            )
        if not ignore_zero and (Path(str(root)).expanduser() / "annotations").is_dir():
            log.warning("%s looks like ADE20K, where 0 is no class: ignore_zero=true", root)
        self.name = name
        self.root = root
        self.size = size
        self.ignore_zero = ignore_zero
        self.max_train_patches = max_train_patches
        self.bank = (k, temperature, max_bank, seed)
        self.linear = (as_list(strengths), iterations, held_fraction, seed)
        self.seed = seed

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where patches do not tile the images."""
        check_side(self.size, extractor.backbone.patch_size)

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Learn from the training patches, then score both heads on every validation pixel."""
        self.check(extractor)
        patches = self.training_patches(extractor)
        linear, strength = fit_linear(patches, *self.linear)
        heads = {"linear": linear, "knn": bank_head(patches, *self.bank)}
        counts = self.validate(extractor, heads, patches.indices)
        for head in heads:
            yield f"{self.name}_{head}_miou", Estimate(counts[head], miou)
            yield f"{self.name}_{head}_accuracy", Estimate(counts[head], pixel_accuracy)
        yield f"{self.name}_linear_l2", strength

    def labels(self, mask: Mask) -> Mask:
        """The mask, where `ignore_zero` is set with 0 ignored."""
        return np.where(mask == 0, np.uint8(IGNORED), mask) if self.ignore_zero else mask

    def patch_maps(
        self, extractor: FeatureExtractor, pairs: Sequence[Pair], part: str
    ) -> Iterator[tuple[Float[Tensor, "C h w"], Mask]]:
        """Patch features of every image, and its labels."""
        title = f"segmentation: {part}"
        with extractor.inference() as backbone:
            for images, masks, files in read_batches(extractor, pairs, self.size, title):
                maps = finite(backbone.forward_features(images).patches.float(), *files)
                yield from zip(maps, map(self.labels, masks), strict=True)

    def training_patches(self, extractor: FeatureExtractor) -> Patches:
        """A sample of the patches that have a label, the same number of every image."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.train), generator=generator)[: self.max_train_patches]
        pairs = [self.train[i] for i in sorted(order.tolist())]
        per_image = self.max_train_patches // len(pairs)
        features: list[Tensor] = []
        sampled: list[Tensor] = []
        owner: list[Tensor] = []
        for patches, mask in self.patch_maps(extractor, pairs, "train"):
            grid = (patches.shape[1], patches.shape[2])
            labels = patch_labels(mask, grid, extractor.backbone.patch_size)
            labelled = torch.nonzero(labels != IGNORED)[:, 0]
            rows = labelled[torch.randperm(len(labelled), generator=generator)[:per_image]]
            features.append(patches.flatten(1).T[rows.to(patches.device)])
            sampled.append(labels[rows])
            owner.append(torch.full_like(rows, len(owner)))
        indices, classes = np.unique(torch.cat(sampled).numpy(), return_inverse=True)
        if len(indices) < 2:
            raise UserError(
                f"root={self.root}: the training masks have {len(indices)} classes (indices "
                f"{indices.tolist()}); segmentation needs two"
            )
        return Patches(
            torch.cat(features),
            torch.from_numpy(classes.astype(np.int64)).to(extractor.device),
            torch.cat(owner).to(extractor.device),
            indices.astype(np.uint8),
        )

    def validate(
        self,
        extractor: FeatureExtractor,
        heads: dict[str, Head],
        indices: UInt8[np.ndarray, " classes"],
    ) -> dict[str, Counts]:
        """Counts of each head, of the classes that occur, by validation image with a label."""
        counts: dict[str, list[np.ndarray]] = {name: [] for name in heads}
        for patches, mask in self.patch_maps(extractor, self.val, "val"):
            if (mask == IGNORED).all():
                continue
            for name, head in heads.items():
                values = head(patches.flatten(1).T).T.unflatten(1, patches.shape[1:])
                places = upsampled_argmax(values, (mask.shape[0], mask.shape[1]))
                counts[name].append(count(indices[places.cpu().numpy()], mask))
        if not all(counts.values()):
            raise UserError(f"root={self.root}: no pixel of the validation masks has a label")
        stacked = {name: np.stack(rows) for name, rows in counts.items()}
        return {name: rows[..., rows.any(axis=(0, 1))] for name, rows in stacked.items()}
