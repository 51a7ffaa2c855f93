"""Describe the weights that are exported: network, name, training, measured numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.models.checkpoint_files import checkpoints_of
from ssl_xcit.models.published import TIMM_FILE, results_folder
from ssl_xcit.models.weights import model_name
from ssl_xcit.models.xcit import TASK_LAYERS, XCiT
from ssl_xcit.training.run_dir import versions
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.segmentation.task import Segmentation
from ssl_xcit.utils.files import read_json, sha256_of


@dataclass(frozen=True)
class Weights:
    """The weights that are exported."""

    backbone: XCiT  # in eval mode
    name: str  # of the run or of the file, for the names of exported files
    about: Mapping[str, Any]  # plain data, see `describe`
    resize: int = 256  # short side in pixels at which the run was measured
    size: int = 224  # of the central square
    task: Classification | Segmentation | Detection | None = None  # of it; None: features
    # programs of the backbone that several formats start from, by names of tensors
    traced: dict[tuple[str, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def preprocess(self) -> Preprocess:
        """From files to the network's input."""
        return of_weights(self.backbone.preprocess)

    @property
    def model(self) -> str:
        """`xcit_small_12_p16`, or the numbers where no published size has them."""
        return model_name(self.backbone.architecture)

    @property
    def num_classes(self) -> int:
        """Of a classifier; 0: it has none."""
        return len(self.task.class_names) if isinstance(self.task, Classification) else 0

    @property
    def architecture(self) -> dict[str, Any]:
        """The exported backbone's, which has a classifier if that is the task, and no pyramid."""
        plain = {k: v for k, v in self.backbone.architecture.items() if k != "pyramid"}
        return {**plain, "num_classes": self.num_classes}

    def state(self) -> dict[str, Tensor]:
        """Its tensors."""
        left_out = tuple(set(TASK_LAYERS) - ({"head."} if self.num_classes else set()))
        state = self.backbone.state_dict()
        return {k: v.contiguous() for k, v in state.items() if not k.startswith(left_out)}

    def output(self, x: Float[Tensor, "B in_chans H W"]) -> Float[Tensor, "B outputs"]:
        """Class tokens of normalised images, or a classifier's logits."""
        tokens = self.backbone(x)
        return self.backbone.head(tokens) if self.num_classes else tokens

    def of_backbone(self) -> "Weights":
        """These without a head for dense tasks, which other tools' XCiT has not."""
        return self if self.num_classes else replace(self, task=None)

    @property
    def output_name(self) -> str:
        """Of a number that the network gives."""
        return "feature" if self.task is None else "logit"

    def about_task(self) -> dict[str, Any]:
        """The task as plain data; nothing, where there is none."""
        if self.task is None:
            return {}
        about: dict[str, Any] = {"task": self.task.kind, "class_names": list(self.task.class_names)}
        if isinstance(self.task, Classification):
            about["multi_label"] = self.task.multi_label
        return about

    def left_out(self) -> list[str]:
        """What files of the backbone alone lack, in words."""
        if self.task is None or self.num_classes:
            return []
        return [
            f"the backbone alone, for there is no {self.task.kind} in such a file: format=onnx has "
            "it; the class token took no part in its training, patch features did"
        ]


def export_name(path: Path, run_dir: Path | None, which: str) -> str:
    """A name for exported files, which differs between any two networks."""
    if run_dir is not None:
        name = run_dir.absolute().name
        if path not in checkpoints_of(run_dir)[-1:]:
            name += f"-{path.stem}"
    elif (downloaded := results_folder(path)) is not None:
        name = downloaded.name
    else:
        name = path.absolute().parent.name if path.name == TIMM_FILE else path.stem
    return name + "-student" * (which == "student")


def describe(which: str, path: Path, run_dir: Path | None, model: str) -> dict[str, Any]:
    """Everything that is known of the weights, as plain data.

    Numbers are those of these very weights, or none. Paths are cut to their last part, for exported
    files are given away.
    """
    digest = sha256_of(path)
    run = read_json(run_dir / "run.json") if run_dir else {}
    overrides = run.get("overrides")
    step = re.fullmatch(r"step-(\d+)", path.stem)
    epoch_steps = (run.get("plan") or {}).get("steps_per_epoch")
    return {
        "model": model,
        "file": path.name,
        "sha256": digest,
        "which": which,
        **measurements(which, path, run_dir, digest),
        "objective": (run.get("choices") or {}).get("objective"),
        "overrides": None if overrides is None else [last_parts(str(o)) for o in overrides],
        "steps": int(step[1]) if step else None,
        "epochs": round(int(step[1]) / epoch_steps, 2) if step and epoch_steps else None,
        "versions": versions(),
    }


def measurements(which: str, path: Path, run_dir: Path | None, digest: str) -> dict[str, Any]:
    """The run's numbers of these weights: from its end, and from `ssl-xcit eval`, which win."""
    numbers: dict[str, Any] = {"data": None, "results": {}, "intervals": {}}
    if run_dir is None:
        return numbers
    summary, evaluation = read_json(run_dir / "summary.json"), read_json(run_dir / "results.json")
    last = (summary.get("last") or {}).get("step")
    sources = []
    if which == "teacher" and last is not None and path.stem == f"step-{int(last):06d}":
        sources.append(summary)
    if evaluation.get("weights_sha256") == digest and evaluation.get("which") == which:
        sources.append(evaluation)
    for source in sources:
        if source.get("data"):
            numbers["data"] = last_parts(str(source["data"]))
        for kind in ("results", "intervals"):
            for row, values in (source.get(kind) or {}).items():
                numbers[kind].setdefault(row, {}).update(values)
    return numbers


def last_parts(text: str) -> str:
    """`data.root=/home/me/photos` as `data.root=photos`."""
    return re.sub(r"[^\s=,\[\](){}'\"]*/(?=[^\s/])", "", text)
