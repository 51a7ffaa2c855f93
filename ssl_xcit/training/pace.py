"""Keep a run to its budget where steps turn out slower or faster than the first ones: at a few
moments the steps that are left are planned anew, and the schedules go from there to their ends.
"""

import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning

from ssl_xcit.training.run_dir import note_steps
from ssl_xcit.utils.files import read_json, write_json
from ssl_xcit.utils.hardware import seconds_since_start
from ssl_xcit.utils.terminal import say

log = logging.getLogger(__name__)
FILE = "pace.json"  # in the run folder
MOMENTS = (0.2, 0.4, 0.6, 0.8, 0.9)  # of the schedules
GROWTH = 2  # times as many steps as planned first, at most
FEWEST = 10  # steps that tell a speed
LEFT_OUT = 3  # first steps of a process, with the loader's start and what is compiled
EVERY = 5.0  # seconds between two notes of the time
MARGIN = 0.01  # of the budget
WORTH_SAYING = 0.02  # of the steps


class Revision(NamedTuple):
    """A decision about the rest of a run."""

    step: int  # from which it holds
    place: float  # of the schedules there
    last: int  # step that the run ends with


@dataclass
class Timeline:
    """Where the schedules are at a step: at it, as planned, until the first revision; from each one
    on they go evenly to their end at its last step.
    """

    planned: int  # steps, and the place where the schedules end
    revisions: list[Revision] = field(default_factory=list)

    def place(self, step: int) -> float:
        """In [0, planned], for steps up to the last."""
        revision = next((r for r in reversed(self.revisions) if r.step <= step), None)
        if revision is None:
            return step
        share = (step - revision.step) / (revision.last - revision.step)
        return revision.place + share * (self.planned - revision.place)

    @property
    def last(self) -> int:
        """Step that the run ends with."""
        return self.revisions[-1].last if self.revisions else self.planned


class Pace(lightning.Callback):
    """Revises how many steps are left of a run of one device.

    A revision is in `RUN/pace.json` before it holds, so a run that was killed takes it again, at
    the same step; those behind it are made anew, from all the time that the run has taken.

    Args:
        run_dir: of a run whose file `begin` wrote.
        budget: in seconds.
        planned: steps, as planned first.
    """

    def __init__(self, run_dir: Path, budget: float, planned: int):
        self.run_dir, self.budget = run_dir, budget
        content = read_json(run_dir / FILE)
        self.after = content.get("after_seconds")  # None: the file is lost, and no step is revised
        self.before = float(content.get("seconds", 0.0))  # of processes that were stopped
        revisions = [Revision(*revision) for revision in content.get("revisions", [])]
        self.timeline = Timeline(planned, revisions)
        self.last_noted = self.timeline.last
        self.warned = False

    @staticmethod
    def begin(run_dir: Path, after_seconds: float) -> None:
        """Note what evaluation and report will take, of a run that has taken no step."""
        write_json({"after_seconds": after_seconds}, run_dir / FILE)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        """Take the schedules where they are."""
        module.timeline = self.timeline
        self.since = self.first = trainer.global_step
        self.began = self.noted = time.perf_counter()
        self.note(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Revise where it is time."""
        step, timeline, now = trainer.global_step, self.timeline, time.perf_counter()
        if step - self.first <= LEFT_OUT:
            self.since, self.began = step, now
        if now - self.noted > EVERY:
            self.note(trainer)
        made = len(timeline.revisions)
        if (
            self.after is None
            or trainer.world_size > 1  # where each rank has a clock of its own
            or made == len(MOMENTS)
            or timeline.place(step) < MOMENTS[made] * timeline.planned
            or step - self.since < FEWEST
            or step >= timeline.last
            or (made and step <= timeline.revisions[-1].step)
        ):
            return
        module.output.loss.item()  # the step has ended
        now = time.perf_counter()
        seconds = (now - self.began) / (step - self.since)
        self.since, self.began = step, now
        spare = self.budget * (1.0 - MARGIN) - self.spent() - self.after
        planned = timeline.last - step
        # a moment of other work must not decide it all
        left = min(2 * planned, max(math.ceil(planned / 2), round(spare / seconds)))
        last, before = min(step + left, GROWTH * timeline.planned), timeline.last
        timeline.revisions.append(Revision(step, timeline.place(step), last))
        if not self.note(trainer):  # what is not noted must not hold
            timeline.revisions.pop()
            return
        if abs(last - before) > WORTH_SAYING * before:
            say(f"{seconds:.2g} s a step: {last:,} steps instead of {before:,}")
        trainer.fit_loop.epoch_loop.max_steps = last

    def on_train_end(self, trainer: lightning.Trainer, *_: object) -> None:
        """Note the time."""
        self.note(trainer)

    def on_exception(self, trainer: lightning.Trainer, *_: object) -> None:
        """Note the time, also of a run that is asked to stop."""
        self.note(trainer)

    def spent(self) -> float:
        """Seconds that the run has taken."""
        return self.before + seconds_since_start()

    def note(self, trainer: lightning.Trainer) -> bool:
        """Note decisions and time, and in `run.json` the steps for who looks on; whether the disk
        takes it.
        """
        self.noted = time.perf_counter()
        if self.after is None or not trainer.is_global_zero:
            return False
        content = {"after_seconds": self.after, "seconds": round(self.spent(), 2)}
        steps = {"planned_steps": self.timeline.planned, "total_steps": self.timeline.last}
        try:
            write_json({**content, "revisions": self.timeline.revisions}, self.run_dir / FILE)
        except OSError as error:
            if not self.warned:
                log.warning("%s could not be written (%s); training goes on", FILE, error)
            self.warned = True
            return False
        if self.timeline.last != self.last_noted:
            self.last_noted = self.timeline.last
            with suppress(OSError):
                note_steps(self.run_dir, **steps)
        return True
