"""Progress that a person reads: a live bar in a terminal, a plain line now and then in a file."""

import sys
import time
from typing import Any

import lightning
from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn

from ssl_xcit.training.datamodule import data_of
from ssl_xcit.utils.terminal import PlainColumn, duration_in_words, say
from ssl_xcit.utils.validation import Count

EARLY = 10.0  # seconds after which the first plain line says how long it will take


class ProgressBar(lightning.Callback):
    """Steps, epochs, loss, images a second, remaining time, and the latest online numbers.

    Args:
        lines: how many plain lines a run prints where there is no terminal, and an early one.
    """

    def __init__(self, lines: Count = 20):
        self.lines = lines
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.started = 0.0
        self.first_step = 0
        self.said = False

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Begin at the step that the run begins with."""
        self.started, self.first_step = time.perf_counter(), trainer.global_step
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        self.progress = Progress(
            PlainColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            PlainColumn("{task.fields[news]}"),
            TimeRemainingColumn(),
            refresh_per_second=4,
        )
        self.progress.start()
        self.task = self.progress.add_task(
            "training", total=trainer.max_steps, completed=self.first_step, news=""
        )

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Advance; the loss is only read when it is shown."""
        step = trainer.global_step
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step, total=trainer.max_steps)
            if self.progress.live.is_started and step % 5 == 0:
                self.progress.update(self.task, news=self.news(trainer, module))
        elif trainer.is_global_zero:
            every = max(1, trainer.max_steps // self.lines)
            early = not self.said and time.perf_counter() - self.started > EARLY
            if early or step % every == 0 or step == trainer.max_steps:
                self.said = True
                left = (trainer.max_steps - step) * self.seconds_per_step(step)
                say(
                    f"step {step}/{trainer.max_steps}  {self.news(trainer, module)}  "
                    f"{duration_in_words(left)} left"
                )

    def seconds_per_step(self, step: int) -> float:
        """Since this process began."""
        return (time.perf_counter() - self.started) / max(1, step - self.first_step)

    def news(self, trainer: lightning.Trainer, module: Any) -> str:
        """One line of numbers."""
        data = data_of(trainer)
        images = data.batch_size * trainer.world_size
        parts = [
            f"epoch {data.passes(trainer.global_step):.1f}",
            f"loss {module.output.loss.item():.3f}",
            f"{images / self.seconds_per_step(trainer.global_step):.0f} images/s",
        ]
        parts += [f"{k} {v.item():.1f}" for k, v in trainer.callback_metrics.items()]
        health = getattr(module, "health", None)
        parts += [health.verdict] if health is not None else []
        return "  ".join(parts)

    def teardown(self, *_: object, **__: object) -> None:
        """Leave the bar as it stands."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
