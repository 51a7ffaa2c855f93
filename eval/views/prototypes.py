"""What the prototypes of a projection head stand for: the images that each takes most of.

For every image the teacher's probabilities over its K prototypes, softmax((logits - center) /
temperature) as in training (DINO, arXiv:2104.14294, section 3.1). A prototype's share is the mean
of its probability over the images. Differs from training: the middle of each image instead of
random crops; the center is the one of the checkpoint and stays.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.weights import load_strictly, read_checkpoint
from ssl_xcit.objectives.dino import Center
from ssl_xcit.training.schedules import LinearByEpoch

from ..run import folder_of
from .data_set import Shelf
from .grids import Cell, Row

CHUNK = 1 << 24  # probabilities at once
HEAD = "teacher.head."
PLAN = ("teacher_temp_start", "teacher_temp", "teacher_temp_epochs", "steps_per_epoch")


class Teacher(NamedTuple):
    """What makes probabilities over K prototypes from class tokens."""

    head: DINOHead
    center: Center
    temperature: float

    def probabilities(self, features: Float[Tensor, "n C"]) -> Float[Tensor, "n K"]:
        """Rows sum to 1."""
        return self.center.targets(self.head(features)[None], self.temperature)[0]


class Shares(NamedTuple):
    """What K prototypes take of N images.

    Args:
        mass: (K,) shares of all probability; they sum to 1.
        firsts: (K,) how many images each is the most probable of.
        top: (K, n) of each the probabilities of the images that it takes most of, the highest
            first.
        images: (K, n) those images.
    """

    mass: Float[Tensor, " K"]
    firsts: Int64[Tensor, " K"]
    top: Float[Tensor, "K n"]
    images: Int64[Tensor, "K n"]

    def effective(self) -> float:
        """exp of the entropy of the shares: how many prototypes with equal ones tell as much."""
        return torch.special.entr(self.mass).sum().exp().item()

    def used(self) -> int:
        """Prototypes that are the most probable one of some image."""
        return int((self.firsts > 0).sum())


def load_teacher(path: Path, which: str, temperature: float | None) -> Teacher:
    """Head and center of a checkpoint of ours, with the temperature of its step.

    Args:
        path: the file.
        which: of the networks; only the teacher's head is compared with the center.
        temperature: of the softmax; None: the run's, from `run.json` and the step.

    Raises:
        UserError: the file has no head, or nothing tells the temperature.
    """
    others = "attention, pca, channels and neighbours need none"
    if which != "teacher":
        raise UserError(f"prototypes: which={which}, and a center has only the teacher")
    content = read_checkpoint(path)
    state = content.get("state_dict", {})
    inside = {k.removeprefix(HEAD): v for k, v in state.items() if k.startswith(HEAD)}
    if "last_layer.weight_v" not in inside or "center.center" not in state:
        raise UserError(f"prototypes: {path} has no projection head; {others}")
    hidden, width = inside["mlp.0.weight"].shape
    number, bottleneck = inside["last_layer.weight_v"].shape
    head = DINOHead(width, number, hidden, bottleneck)
    load_strictly(head, inside, path)
    center = Center(number)
    center.center.copy_(state["center.center"])
    if temperature is None:
        temperature = temperature_of(path, int(content.get("global_step", 0)))
    return Teacher(head.eval(), center, temperature)


def temperature_of(path: Path, step: int) -> float:
    """The teacher's temperature in the last of so many steps of a run.

    Raises:
        UserError: `run.json` is not there, or does not tell.
    """
    file = folder_of(path) / "run.json"
    try:
        plan = json.loads(file.read_text())["plan"]
        start, end, epochs, steps_per_epoch = (float(plan[key]) for key in PLAN)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"prototypes: {file} does not tell the teacher's temperature: teacher_temp=0.04, or "
            "what the run had"
        ) from error
    return LinearByEpoch(start, end, epochs, steps_per_epoch)(max(0, step - 1))


def chunks(
    teacher: Teacher, features: Float[np.ndarray, "N C"], device: torch.device | str
) -> Iterator[tuple[int, Float[Tensor, "n K"]]]:
    """Where each part of the images begins, and their probabilities."""
    at_once = max(1, CHUNK // len(teacher.center.center))
    for start in range(0, len(features), at_once):
        part = np.array(features[start : start + at_once], dtype=np.float32)
        yield start, teacher.probabilities(torch.from_numpy(part).to(device))


@torch.inference_mode()
def shares(
    teacher: Teacher,
    features: Float[np.ndarray, "N C"],
    num_top: int,
    device: torch.device | str = "cpu",
) -> Shares:
    """Of all images, in one pass over them.

    Args:
        teacher: of K prototypes.
        features: (N, C) class tokens.
        num_top: images kept of each prototype; at most N.
        device: where it is computed.
    """
    teacher.head.to(device)
    teacher.center.to(device)
    K = len(teacher.center.center)
    mass = torch.zeros(K, dtype=torch.float64, device=device)
    firsts = torch.zeros(K, dtype=torch.int64, device=device)
    top, images = mass.new_zeros(0, K), firsts.new_zeros(0, K)
    for start, found in chunks(teacher, features, device):
        exact = found.double()
        mass += exact.sum(dim=0)
        firsts += exact.argmax(dim=1).bincount(minlength=K)
        here = torch.arange(start, start + len(exact), device=device)[:, None].expand(-1, K)
        top, images = torch.cat((top, exact)), torch.cat((images, here))
        top, order = top.topk(min(num_top, len(top)), dim=0)
        images = images.gather(0, order)
    mass /= mass.sum()
    return Shares(mass.cpu(), firsts.cpu(), top.T.cpu(), images.T.cpu())


def drawn(bank: Shelf, found: Shares, most: int) -> tuple[list[Row], dict[str, Any]]:
    """A row of images for each of the prototypes with the largest shares, and the same in
    numbers.
    """
    rows, told = [], []
    order = found.mass.argsort(descending=True, stable=True)[:most]
    for prototype in order.tolist():
        share, firsts = found.mass[prototype].item(), int(found.firsts[prototype])
        heading = (
            f"prototype {prototype}: {share:.1%} of the probability, first choice of {firsts:,} "
            f"image{'s' * (firsts != 1)}"
        )
        cells, images = [], []
        near = zip(found.images[prototype].tolist(), found.top[prototype].tolist(), strict=True)
        for i, value in near:
            has = bank.class_of(i)
            words = f"{value:.2f} {has or ''}".rstrip()
            cells.append(Cell(bank.picture(i), words, bank.short_name(i)))
            images.append({"image": bank.name(i), "probability": round(value, 6), "class": has})
        rows.append(Row(heading, None, cells))
        told.append(
            {"prototype": prototype, "share": round(share, 6), "first_of": firsts, "images": images}
        )
    numbers = {
        "images": len(bank),
        "prototypes": len(found.mass),
        "used": found.used(),
        "effective": round(found.effective(), 3),
        "largest": told,
    }
    return rows, numbers
