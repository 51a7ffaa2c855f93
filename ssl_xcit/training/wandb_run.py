"""Weights & Biases as a run uses it: Lightning's logger, with the settings as nested keys, panels
by subject, and what the run leaves at its end as artifacts.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from ssl_xcit.models.checkpoint_files import checkpoints_of

# by how names begin; all others, such as loss and knn_k20, are in the first panel
PANELS = {
    "schedule": ("lr", "weight_decay", "ema", "teacher_temp"),
    "gradients": ("grad_norm",),
    "health": (
        "healthy", "rankme", "feature_std", "embedding_", "prototypes_", "patch_",
        "teacher_entropy", "center_norm", "coding_rate",
    ),
    "speed": (
        "images_per_second", "data_wait", "bad_images", "skipped_steps", "online_s",
    ),
}  # fmt: skip


class WandbRun(WandbLogger):
    """Lightning's arguments, and:

    Args:
        log_report: whether `report.html` becomes an artifact.
        log_model: whether the newest checkpoint, and the best of online evaluation, do.
    """

    def __init__(self, *, log_report: bool = True, log_model: bool = False, **given: Any):
        super().__init__(**given)
        self._wandb_init.pop("anonymous", None)  # of which wandb warns, though it is None
        if self._offline:  # by its mode; Lightning's way sets WANDB_MODE for all later runs
            self._offline = False
            self._wandb_init["mode"] = "offline"
        self.log_report, self.log_model = log_report, log_model

    def describe(self, name: str, tags: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Take these where the logger's own settings are null: the run folder's name, without its
        seed as group; tags; the run's settings as config, of absolute paths the last part.
        """
        own = {
            "name": name,
            "group": re.sub(r"_seed-[^_]*", "", name),
            "tags": list(tags),
            "config": without_paths(settings),
        }
        given = {key: value for key, value in self._wandb_init.items() if value is not None}
        self._wandb_init = {**self._wandb_init, **own, **given}

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand on, numbers and pictures, each under its panel."""
        super().log_metrics({panel_of(name) + name: v for name, v in metrics.items()}, step)

    def conclude(self, run_dir: Path) -> None:
        """Final numbers into the run's summary, as ROW/METRIC; files as artifacts."""
        summary = json.loads((run_dir / "summary.json").read_text())
        numbers = {
            f"{row}/{metric}": value
            for row, values in summary["results"].items()
            for metric, value in values.items()
        }
        self.experiment.summary.update(numbers)
        page = run_dir / "report.html"
        if self.log_report and page.is_file():
            self.artifact("report", page)
        if self.log_model:
            best = run_dir / "checkpoints" / "best.ckpt"
            self.artifact("model", checkpoints_of(run_dir)[-1], "last")
            if best.is_file():
                self.artifact("model", best, "best")

    def artifact(self, kind: str, file: Path, *aliases: str) -> None:
        """A version of the run's artifact of this kind."""
        self.experiment.log_artifact(
            str(file), name=f"{kind}-{self.experiment.id}", type=kind, aliases=["latest", *aliases]
        )


def panel_of(name: str) -> str:
    """`PANEL/` of a metric; nothing for those of the first."""
    for panel, beginnings in PANELS.items():
        if name.startswith(beginnings):
            return f"{panel}/"
    return ""


def without_paths(settings: Any) -> Any:
    """Settings with the last part of every absolute path."""
    if isinstance(settings, Mapping):
        return {str(key): without_paths(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [without_paths(value) for value in settings]
    is_path = isinstance(settings, str) and PurePath(settings).is_absolute()
    return PurePath(settings).name if is_path else settings
