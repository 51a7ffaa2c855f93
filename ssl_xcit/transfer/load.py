"""Load what `ssl-xcit finetune` has trained: the backbone with the head of its task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from ssl_xcit.errors import UserError
from ssl_xcit.models.backbone_location import Which, unwrapped
from ssl_xcit.models.checkpoint_files import checkpoint_path, read_weights
from ssl_xcit.models.weights import backbone_in
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.kinds import KINDS
from ssl_xcit.transfer.record import transfer_record
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.validation import Checker
from ssl_xcit.utils.words import first_few

SIZE = 224  # of images for weights of others, as published


def load_task(
    path: str | Path,
    which: Which = "teacher",
    class_names: Sequence[str] | None = None,
    size: int | None = None,
) -> Task:
    """The task in a checkpoint of `ssl-xcit finetune`, or a classification of the classifier in
    other weights, such as the published ones; in eval mode, on the CPU.

    Args:
        path: see `ssl_xcit.models.checkpoint_files.checkpoint_path`.
        which: `teacher`: the average of the weights where the run kept one, else the weights;
            `student`: the weights as trained.
        class_names: of such other weights; None: numbers from 0.
        size: of their images in pixels; None: 224.

    Raises:
        MissingPath: no such file.
        UserError: unreadable, without a head; or `class_names` are of another number, or it or
            `size` are given for a file that holds them.
    """
    file = checkpoint_path(path)
    content = read_weights(file)
    record = transfer_record(content)
    if record is None:
        return classifier_in(content, file, which, class_names, size)
    given = {"class_names": class_names, "size": size}
    if taken := next((key for key, value in given.items() if value is not None), None):
        raise UserError(
            f"{taken} is for weights of others, and {file} says its own: leave {taken} out"
        )
    return task_in(content, record, file, which)


def classifier_in(
    content: Mapping[str, Any],
    file: Path,
    which: Which,
    class_names: Sequence[str] | None,
    size: int | None,
) -> Task:
    """The classifier in a file of others; see `load_task`."""
    backbone = backbone_in(content, file, which)
    K = backbone.architecture["num_classes"]
    if K == 0:
        raise UserError(
            f"{file} is a backbone without a head: ssl-xcit finetune ckpt={file} data.root=DIR "
            "trains one, with transfer=classification, segmentation or detection"
        )
    names = [str(k) for k in range(K)] if class_names is None else class_names
    if len(names) != K:
        raise UserError(f"class_names has {len(names):,} names, and {file} {K:,} classes")
    task: Any = Classification(backbone, names, size=size or SIZE).eval()
    return cast(Task, task)


def task_in(
    content: Mapping[str, Any], record: Mapping[str, Any], file: Path, which: Which = "teacher"
) -> Task:
    """The task in a file that was read; see `load_task`."""
    backbone = backbone_in(content, file, which)
    state = unwrapped(content["state_dict"])
    averaged = which == "teacher" and any(key.startswith("teacher.") for key in state)
    prefix = "teacher." if averaged else "task."
    if record["kind"] not in KINDS:
        raise UserError(f"{file}: this version of ssl_xcit has no task {record['kind']}")
    kind = KINDS[record["kind"]].task
    settings = {**record["settings"], "class_names": record["class_names"]}
    checked: Any = Checker({}).target(
        {"_target_": f"{kind.__module__}.{kind.__name__}", **settings}, "transfer"
    )
    task: nn.Module = kind(backbone, **{k: v for k, v in checked.items() if k != "_target_"})
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    own.pop("n_averaged", None)
    missing, unexpected = task.load_state_dict(own, strict=False)
    if missing or unexpected:
        raise UserError(
            f"{file} does not hold the {record['kind']} task that it names: missing "
            f"{first_few(missing) or 'nothing'}, unexpected {first_few(unexpected) or 'nothing'}"
        )
    loaded: Any = task.eval()
    return loaded
