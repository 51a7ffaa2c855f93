"""Show what the prototypes of a projection head stand for: the images that each takes most of.

For every image the teacher's probabilities over its K prototypes, softmax((logits - center) /
temperature) as in training (DINO, arXiv:2104.14294, section 3.1). A prototype's share is the mean
of its probability over the images. Differs from training: the middle of each image instead of
random crops; the center is the one of the checkpoint and stays.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from omegaconf import OmegaConf
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.models.checkpoint_files import read_checkpoint
from ssl_xcit.models.head import DINOHead
from ssl_xcit.models.weights import center_of, load_strictly
from ssl_xcit.objectives.dino import Center
from ssl_xcit.objectives.temperature import LinearInStairs

from ..checkpoints import folder_of
from .dataset import ImageFeatures
from .grids import GridCell, GridRow

CHUNK = 1 << 24  # probabilities at once
HEAD = "teacher.head."
REGION = "ssl_xcit.objectives.esvit.Region"  # whose prototypes are of patches
PLAN = ("teacher_temp_start", "teacher_temp", "teacher_temp_epochs", "steps_per_epoch")


class Teacher(NamedTuple):
    """Head and center, which make probabilities over K prototypes from class tokens."""

    head: DINOHead
    center: Center
    temperature: float

    def probabilities(self, features: Float[Tensor, "n C"]) -> Float[Tensor, "n K"]:
        """Probabilities of the prototypes; rows sum to 1."""
        return self.center.targets(self.head(features)[None], self.temperature)[0]


class Shares(NamedTuple):
    """Shares of K prototypes in N images."""

    mass: Float[Tensor, " K"]  # shares of all probability; they sum to 1
    firsts: Int64[Tensor, " K"]  # number of images that it is the most probable of
    top: Float[Tensor, "K n"]  # probabilities of the images that it takes most of, descending
    images: Int64[Tensor, "K n"]  # rows of those images

    def effective(self) -> float:
        """Effective number of prototypes: exp of the entropy of the shares."""
        return torch.special.entr(self.mass).sum().exp().item()

    def used(self) -> int:
        """Number of prototypes that are the most probable one of some image."""
        return int((self.firsts > 0).sum())


def load_teacher(path: Path, which: str, temperature: float | None) -> Teacher:
    """Head and center of a checkpoint of ours, with the softmax's temperature (None: the run's,
    from `run.json` and the step). Only the teacher's head is compared with the center. Raises
    UserError where the file has no head, or nothing tells the temperature.
    """
    if which != "teacher":
        raise UserError(
            f"prototypes: which={which} has no center, only the teacher has; set which=teacher"
        )
    content = read_checkpoint(path)
    state = content.get("state_dict", {})
    term = term_of(state, folder_of(path))
    prefix = f"{HEAD}{term}." if term else HEAD
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    center = state.get(f"objective.terms.{term}.center.center") if term else center_of(state)
    if "last_layer.weight_v" not in weights or center is None:
        raise UserError(
            f"prototypes: {path} has no head with prototypes; attention, pca, channels and "
            "neighbours need none"
        )
    hidden, width = weights["mlp.0.weight"].shape
    number, bottleneck = weights["last_layer.weight_v"].shape
    head = DINOHead(width, number, hidden, bottleneck)
    load_strictly(head, weights, path)
    running = Center(number)
    running.center.copy_(center)
    if temperature is None:
        temperature = temperature_of(path, int(content.get("global_step", 0)), term)
    return Teacher(head.eval(), running, temperature)


def term_of(state: Mapping[str, Any], run_dir: Path) -> str:
    """The first term of a sum of objectives that has prototypes of class tokens; empty: no sum."""
    last = re.compile(re.escape(HEAD) + r"([^.]+)\.last_layer\.weight_v")
    terms = [found[1] for key in state if (found := last.fullmatch(key))]
    file = run_dir / "config.yaml"
    settings = OmegaConf.load(file) if terms and file.is_file() else OmegaConf.create()
    kinds = {term: OmegaConf.select(settings, f"objective.terms.{term}._target_") for term in terms}
    return next((term for term in terms if kinds[term] != REGION), "")


def temperature_of(path: Path, step: int, term: str = "") -> float:
    """The teacher's temperature in step `step` of a run, from its plan, or a term's part of it;
    raises UserError where `run.json` is not there, or does not tell.
    """
    file = folder_of(path) / "run.json"
    try:
        plan = json.loads(file.read_text())["plan"]
        plan |= plan.get(term, {})
        start, end, epochs, steps_per_epoch = (float(plan[key]) for key in PLAN)
        stair = float(plan.get("teacher_temp_stair", steps_per_epoch))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"prototypes: {file} does not tell the teacher's temperature; set it by "
            "teacher_temp=0.04, or the value of the run"
        ) from error
    return LinearInStairs(start, end, epochs * steps_per_epoch, stair)(max(0, step - 1))


@torch.inference_mode()
def prototype_shares(
    teacher: Teacher,
    features: Float[np.ndarray, "N C"],
    num_top: int,
    device: torch.device | str = "cpu",
) -> Shares:
    """Shares over all images in one pass; `num_top` images (at most N) are kept of each."""
    teacher.head.to(device)
    teacher.center.to(device)
    K = len(teacher.center.center)
    mass = torch.zeros(K, dtype=torch.float64, device=device)
    firsts = torch.zeros(K, dtype=torch.int64, device=device)
    top, images = mass.new_zeros(0, K), firsts.new_zeros(0, K)
    at_once = max(1, CHUNK // K)
    for start in range(0, len(features), at_once):
        part = torch.from_numpy(np.array(features[start : start + at_once], dtype=np.float32))
        exact = teacher.probabilities(part.to(device)).double()
        mass += exact.sum(dim=0)
        firsts += exact.argmax(dim=1).bincount(minlength=K)
        here = torch.arange(start, start + len(exact), device=device)[:, None].expand(-1, K)
        top, images = torch.cat((top, exact)), torch.cat((images, here))
        top, order = top.topk(min(num_top, len(top)), dim=0)
        images = images.gather(0, order)
    mass /= mass.sum()
    return Shares(mass.cpu(), firsts.cpu(), top.T.cpu(), images.T.cpu())


def prototype_rows(
    bank: ImageFeatures, shares: Shares, most: int
) -> tuple[list[GridRow], dict[str, Any]]:
    """A row of images for each prototype of the largest shares, and the same in numbers."""
    rows, largest = [], []
    for prototype in shares.mass.argsort(descending=True, stable=True)[:most].tolist():
        mass, firsts = shares.mass[prototype].item(), int(shares.firsts[prototype])
        heading = (
            f"prototype {prototype}: {mass:.1%} of the probability, first choice of {firsts:,} "
            f"image{'s' * (firsts != 1)}"
        )
        cells, images = [], []
        for i, value in zip(
            shares.images[prototype].tolist(), shares.top[prototype].tolist(), strict=True
        ):
            own = bank.class_of(i)
            words = f"{value:.2f} {own or ''}".rstrip()
            cells.append(GridCell(bank.picture(i), words, bank.short_name(i)))
            images.append({"image": bank.name(i), "probability": round(value, 6), "class": own})
        rows.append(GridRow(heading, None, cells))
        largest.append(
            {"prototype": prototype, "share": round(mass, 6), "first_of": firsts, "images": images}
        )
    return rows, {
        "images": len(bank),
        "prototypes": len(shares.mass),
        "used": shares.used(),
        "effective": round(shares.effective(), 3),
        "largest": largest,
    }
