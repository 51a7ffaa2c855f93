"""The command `predict`: tables and pictures of what a fine-tuned network says of images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from annotated_types import Ge
from hydra.core.hydra_config import HydraConfig
from torch import nn

from ssl_xcit.data.folders import named_images
from ssl_xcit.data.order import evenly_spaced
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.checkpoint_files import checkpoint_path, folder_of
from ssl_xcit.models.devices import placed
from ssl_xcit.models.weights import model_name
from ssl_xcit.training.run_dir import versions
from ssl_xcit.transfer.annotated import lines_of
from ssl_xcit.transfer.kinds import KINDS
from ssl_xcit.transfer.load import load_task
from ssl_xcit.transfer.outputs import Job
from ssl_xcit.transfer.predict import FORMATS, RECORD, Outcome, outputs_of, predict
from ssl_xcit.transfer.task import Task
from ssl_xcit.utils.files import (
    remove_partial,
    sha256_of,
    writable_folder,
    writable_or_here,
    written_to,
)
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say
from ssl_xcit.utils.validation import Count, Network, Share, Text, Words, Workers

log = logging.getLogger(__name__)
Format = Literal["coco", "masks"]
IN_LINE = 6  # classes


@dataclass(frozen=True)
class PredictSettings:
    """`conf/predict.yaml`."""

    main: str
    ckpt: Text
    images: Annotated[
        Text | Sequence[Text], Words("a file, a folder, a pattern or a list of these")
    ]
    which: Network
    max_images: Count | None
    threshold: Share
    formats: Annotated[Format | Sequence[Format], Words(f"some of {', '.join(FORMATS)}")]
    class_names: Text | None
    size: Count | None
    max_pictures: Annotated[int, Ge(0)]
    largest: Count
    batch_size: Count | None
    num_workers: Workers
    max_pixels: Count
    device: Text
    out: Text | None


def main(settings: PredictSettings) -> None:
    """`ssl-xcit predict`: writes tables, pictures and `predict.json`."""
    s = settings
    path = checkpoint_path(str(s.ckpt))
    task = load_task(path, s.which, names_in(s.class_names), s.size)
    KINDS[task.kind].presentation.lower_threshold_(task, s.threshold)
    formats = [s.formats] if isinstance(s.formats, str) else list(dict.fromkeys(s.formats))
    outputs = outputs_of(task, formats)
    files = files_of(s)
    device = placed(cast(nn.Module, task), str(s.device))[0]
    out = make_folder(s.out, path)
    only = Path(str(s.images)).expanduser()
    root = only if not isinstance(s.images, list) and only.is_dir() else None
    job = Job(task, files, root, out, s.threshold, s.max_pixels, s.max_pictures, s.largest)
    about = {
        "weights": {"file": str(path), "sha256": sha256_of(path)},
        "model": model_name(task.backbone.architecture),
        "kind": task.kind,
        "which": s.which,
        "class_names": list(task.class_names),
        "threshold": s.threshold,
        "overrides": list(HydraConfig.get().overrides.task),
        "versions": versions(),
    }
    say(f"{path}: {about['model']}, {task.kind}, {len(task.class_names):,} classes")
    with written_to(out):
        outcome = predict(
            job, outputs, about, s.batch_size, s.num_workers, device, shown_in_terminal()
        )
    conclude(task, outcome, out, s.threshold)


def names_in(file: Text | None) -> list[str] | None:
    """Class names, a line each; raises UserError where the file cannot be read."""
    if file is None:
        return None
    path = Path(str(file)).expanduser()
    if not path.is_file():
        raise MissingPath(f"class_names={file}: no such file; a text file with a name a line")
    return lines_of(path)


def files_of(settings: PredictSettings) -> list[Path]:
    """The images; raises UserError for an empty list, MissingPath for what is not there."""
    if settings.images == []:
        raise UserError("images=[]: name files, folders or patterns")
    files = named_images(settings.images, settings.out)
    chosen = evenly_spaced(len(files), settings.max_images or len(files))
    if len(chosen) < len(files):
        log.warning(
            "%d of %d images are taken: max_images=%d", len(chosen), len(files), settings.max_images
        )
    return [files[i] for i in chosen]


def make_folder(out: Text | None, path: Path) -> Path:
    """The folder of results, without partial files; raises UserError where none can be written."""
    if out is None:
        folder = writable_or_here(folder_of(path), "predict")
    else:
        folder = Path(str(out)).expanduser()
        try:
            writable_folder(folder)
        except UserError as error:
            raise UserError(f"out={error}; name a folder that can be written") from error
    for place in (folder, folder / "pictures", folder / "masks"):
        remove_partial(place)
    return folder


def conclude(task: Task, outcome: Outcome, out: Path, threshold: float) -> None:
    """Say what was found, what could not be read, and where the results are."""
    presentation = KINDS[task.kind].presentation
    title = presentation.summary.format(threshold=threshold)
    words = [f"{k} {presentation.number.format(v)}" for k, v in outcome.classes.items()]
    more = f" and {len(words) - IN_LINE:,} more" if len(words) > IN_LINE else ""
    images = f"{outcome.num_read:,} image{'s' * (outcome.num_read != 1)}"
    say(f"  {images}; {title}: {', '.join(words[:IN_LINE]) or 'none'}{more}")
    if outcome.bad:
        name, reason = next(iter(outcome.bad.items()))
        plural = "s" * (len(outcome.bad) != 1)
        say(
            f"  {len(outcome.bad):,} image{plural} could not be read and left out, such as {name} "
            f"({reason}): all are in {out / RECORD}"
        )
    folders = {name.partition("/")[0] + "/" for name in outcome.files if "/" in name}
    plain = [name for name in outcome.files if "/" not in name]
    say(f"written: {', '.join([*plain, *sorted(folders)])} in {out}")
