"""The command `export`: weights as files of other tools, each loaded and compared first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ssl_xcit.data.crop_dataset import check_labelled
from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.comparison import KNN
from ssl_xcit.export.description import Weights, describe, export_name
from ssl_xcit.export.output_files import output_path
from ssl_xcit.models.checkpoint_files import checkpoint_path, read_weights
from ssl_xcit.models.weights import backbone_in, model_name
from ssl_xcit.transfer.load import task_in
from ssl_xcit.transfer.record import transfer_record
from ssl_xcit.utils.files import written_to
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Network, Node, Text


@dataclass(frozen=True)
class ExportSettings:
    """`conf/export.yaml`."""

    main: str
    ckpt: Text
    format: str | Sequence[str]
    which: Network
    head: bool
    out: Text | None
    formats: Mapping[str, Node]
    knn: Node
    eval_data: Node | None = None  # may be left out by ~

    @property
    def chosen(self) -> list[str]:
        """The chosen formats.

        Raises:
            UserError: there is none, or one is not known.
        """
        words = [self.format] if isinstance(self.format, str) else self.format
        chosen = list(dict.fromkeys(word.replace("-", "_") for word in words))
        for word in chosen:
            if word not in self.formats:
                raise UserError(f"format={word} must be one of {', '.join(self.formats)}")
        if not chosen:
            raise UserError(f"format=[] must be one or several of {', '.join(self.formats)}")
        return chosen


def main(settings: ExportSettings) -> None:
    """`ssl-xcit export`: prints the written files, their comparison, and how to use them."""
    formats = settings.chosen
    path = checkpoint_path(str(settings.ckpt))
    content = read_weights(path)
    record = transfer_record(content)
    task: Any = None
    if record is None:
        backbone = backbone_in(content, path, settings.which)
    else:
        loaded: Any = task_in(content, record, path, settings.which)
        backbone, task = loaded.backbone, loaded if settings.head else None
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else None
    name = export_name(path, run_dir, settings.which)
    pair = labelled_pair(settings.eval_data, run_dir, of_weights(backbone.preprocess))
    about = describe(settings.which, path, run_dir, model_name(backbone.architecture))
    sides = (pair.resize, pair.size) if pair else (256, 224)
    weights = Weights(backbone, name, about, *sides_of(task, sides), task=task)
    given = None if settings.out is None else str(settings.out)
    out = output_path(given, path, run_dir, name)
    kind = f", {task.kind} of {len(task.class_names):,} classes" if task else ""
    say(f"{path}: {weights.model}, {settings.which}{kind}")
    if task is None and backbone.architecture["num_classes"]:
        say("its classifier is left out: features are exported")
    knn: KNN | None = None if pair is None else instantiate(settings.knn)(pair)
    failures = []
    for word in formats:
        export = instantiate(settings.formats[word])
        options: dict[str, Any] = {"knn": knn} if "knn" in signature(export.func).parameters else {}
        if shown_in_terminal():  # a large network takes minutes
            say("", f"{word} ...")
        try:
            with written_to(out.parent):
                exported = export(weights, out, **options)
        except (UserError, RunFailed) as error:  # the others are exported all the same
            if len(formats) == 1:
                raise type(error)(f"format={word}: {error}") from error
            say(f"{word}: not exported: {error}")
            failures.append(error)
            continue
        say("", f"{word}: {exported.sizes()}")
        say(*(f"  {line}" for line in (exported.checked, *exported.notes)))
        say(*(f"    {line}" for line in exported.use.splitlines()))
    if failures:
        message = f"{len(failures)} of {len(formats)} formats were not exported, see above"
        raise type(failures[0])(message)


def sides_of(task: Any, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Short side and central square of images as a task is tested on them; of dense tasks both are
    the short side.
    """
    if task is None:
        return otherwise
    prepare = task.prepare
    if task.kind == "classification":
        return prepare.resize, prepare.size
    side = prepare.size if task.kind == "segmentation" else prepare.side
    return side, side


def labelled_pair(
    eval_data: Node | None, run_dir: Path | None, preprocess: Preprocess
) -> LabelledPair | None:
    """Labelled images to measure the accuracy of rounded weights on; None without."""
    of_run = HydraConfig.get().runtime.choices["eval_data"] == "of_run"
    if not eval_data or (of_run and run_dir is None):
        return None
    try:
        pair: LabelledPair | None = instantiate(eval_data)
        if pair is not None:
            check_labelled(pair, preprocess)
    except (UserError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not of_run or not isinstance(cause, UserError):
            raise
        return None  # the run's images may be elsewhere by now
    return pair
