"""How many steps fit into a given time: from the speed of the first steps, by networks of their
own, and from what the evaluation of the baselines takes.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch

from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.training.datamodule import TrainingData
from ssl_xcit.training.lr_range import MOST_STEPS
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.pace import LEFT_OUT, MARGIN, Pace
from ssl_xcit.training.progress import ProgressBar
from ssl_xcit.training.run_dir import about_run, disk_trouble
from ssl_xcit.training.settings import PretrainSettings, TrainerSettings
from ssl_xcit.training.trainer import trial_trainer
from ssl_xcit.utils.files import write_json
from ssl_xcit.utils.hardware import resident_bytes, seconds_since_start
from ssl_xcit.utils.terminal import duration_in_words, say

BASELINES = "baselines.json"  # in the run folder
RANDOM = "random weights"  # the baseline that takes as long as the backbone
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TRIAL = 0.04  # of the budget, for measuring the speed
FEWEST, MOST = 5, 200  # steps that are measured
FEWEST_STEPS = 20  # of a run
REPORT = 6.0  # seconds for the report and what else comes after the evaluation
PICTURE = 1.5  # steps that pictures of a moment of the run take


class Trial(NamedTuple):
    """What steps on trial take."""

    step_seconds: float
    memory: int  # bytes: of a GPU what was allocated at most, else of the process
    checkpoint: int  # bytes


class Speed(NamedTuple):
    """What was measured before a run."""

    step_seconds: float
    evaluation_seconds: float  # of the backbone's row
    online_seconds: float = 0.0  # of one online evaluation


def parse_budget(text: str) -> float:
    """Seconds of `90s`, `10m`, `2h`, `1.5d`.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(
            f"budget={text}: a number with s, m, h or d, such as 90s, 10m, 2h; max_steps=N gives "
            "a number of steps"
        )
    return float(match[1]) * UNITS[match[2]]


class Stopwatch(lightning.Callback):
    """When each step ended; ends the trial after some seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: object) -> None:
        """Wait for the step, and note the time."""
        module.output.loss.item()
        self.ends.append(time.perf_counter())
        measured = len(self.ends) - LEFT_OUT
        passed = self.ends[-1] - self.ends[0]
        trainer.should_stop = measured >= FEWEST and passed >= self.seconds

    def step_seconds(self) -> float:
        """Mean of all but the first steps."""
        first = min(LEFT_OUT, len(self.ends) - 1) - 1
        return (self.ends[-1] - self.ends[first]) / max(1, len(self.ends) - 1 - first)


def measure_speed(
    settings: TrainerSettings,
    module: Pretraining,
    data: TrainingData[Any],
    run_dir: Path,
    budget: float,
) -> Trial:
    """Seconds of a step, waiting for data included, and what it needs.

    Args:
        settings: of the trainer.
        module: a fresh one; it is of no use afterwards.
        data: of `MOST` steps.
        run_dir: of the run.
        budget: of the run, in seconds.
    """
    watch, bar = Stopwatch(TRIAL * budget), ProgressBar(lines=2)
    bar.said = True  # it ends by time, and nothing early can be said of its steps
    trainer = trial_trainer(settings, [watch, bar], data.total_steps, run_dir)
    trainer.fit(module, datamodule=data)
    device = trainer.strategy.root_device
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else resident_bytes(peak=True)
    kept = [
        *module.state_dict().values(),
        *(each for state in trainer.optimizers[0].state.values() for each in state.values()),
    ]
    checkpoint = sum(each.nbytes for each in kept if isinstance(each, torch.Tensor))
    return Trial(watch.step_seconds(), memory, checkpoint)


def steps_within(
    text: str, speed: Speed, callbacks: Mapping[str, Any], first_steps: float = 0.0
) -> int:
    """Steps that end, with evaluation and report, when the budget does.

    Args:
        text: the budget.
        speed: as measured.
        callbacks: settings of what takes time beside the steps.
        first_steps: that are taken before the run, by a range test.

    Raises:
        UserError: hardly any; says the least budget.
    """
    budget = parse_budget(text)
    passed = seconds_since_start()
    snapshots = callbacks.get("snapshots") or {}
    beside = first_steps + PICTURE * snapshots.get("moments", 0)
    around = passed + speed.evaluation_seconds + REPORT + beside * speed.step_seconds
    left = budget * (1.0 - MARGIN) - around
    left -= online_seconds(callbacks.get("online"), speed, left)
    steps = int(left / speed.step_seconds)
    if steps < FEWEST_STEPS:
        least = (around + FEWEST_STEPS * speed.step_seconds) / (1.0 - MARGIN)
        raise UserError(
            f"budget={text}: the start has taken {passed:.0f} s, evaluation and report take about "
            f"{speed.evaluation_seconds + REPORT:.0f} s, and a step {speed.step_seconds:.2g} s: "
            f"give at least budget={1.1 * least:.0f}s"
        )
    return steps


def online_seconds(callback: Mapping[str, Any] | None, speed: Speed, training: float) -> float:
    """Of online evaluation, in so many seconds of training; after the first one its `eval_budget`
    holds.
    """
    one = speed.online_seconds
    every = (callback or {}).get("every_steps")
    if every is None or one == 0.0:
        return 0.0
    count = int(training / (every * speed.step_seconds + one))
    share = callback.get("eval_budget") if callback else None
    allowed = count if share is None else max(1, int(share * training / one))
    return min(count, allowed) * one


def steps_in_budget(
    settings: PretrainSettings,
    module: Pretraining,
    data: TrainingData[Any],
    evaluate: Callable[..., Any],
    pair: LabelledPair | None,
    run_dir: Path,
    device: str,
    made_with: Mapping[str, Any],
) -> int:
    """Measure what a step and an evaluation take; the baselines, which do not change, are evaluated
    for that and kept in `RUN/baselines.json`.
    """
    evaluation_seconds = extraction_seconds = 0.0
    if pair is not None:
        options = {
            "cache": False,  # features of random weights from there would seem to cost nothing
            "num_workers": settings.num_workers,
            "device": device,
            "max_pixels": data.dataset.preprocess.max_pixels,
        }
        first = evaluate(module.teacher.backbone, pair, baselines_only=True, **options)
        if RANDOM not in first.seconds:  # no baseline is a network
            first = evaluate(module.teacher.backbone, pair, baselines=None, **options)
        row = RANDOM if RANDOM in first.seconds else next(iter(first.seconds), None)
        if row:
            evaluation_seconds = sum(first.seconds[row].values())
            extraction_seconds = first.seconds[row]["features"]
        kept = {"results": first.results, "intervals": first.intervals, "chosen": first.chosen}
        with disk_trouble(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            write_json({**made_with, **(kept if row == RANDOM else {})}, run_dir / BASELINES)
    trial = measure_speed(
        settings.trainer, module, data, run_dir, parse_budget(str(settings.budget))
    )
    thinned = 0.0
    if pair is not None and (online := settings.callbacks.get("online")):
        most = online.get("max_images", math.inf)
        parts = (len(pair.train), len(pair.test))
        thinned = sum(min(most, part) for part in parts) / sum(parts)
        thinned *= len(online.get("networks", [1]))
    speed = Speed(trial.step_seconds, evaluation_seconds, thinned * extraction_seconds)
    first_steps = MOST_STEPS if settings.optim.lr == "auto" else 0  # of the range test
    steps = steps_within(str(settings.budget), speed, settings.callbacks, first_steps)
    with disk_trouble(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        Pace.begin(run_dir, evaluation_seconds + REPORT)
    memory = f"{trial.memory / 1e9:.1f} GB of memory; " if trial.memory else ""
    free = shutil.disk_usage(run_dir).free
    say(
        f"budget={settings.budget}: {steps:,} steps of {trial.step_seconds:.2g} s are about "
        f"{duration_in_words(steps * trial.step_seconds)}; {evaluation_seconds:.0f} s for the "
        f"evaluation; {memory}{trial.checkpoint / 1e6:.0f} MB a "
        f"checkpoint, {free / 1e9:.1f} GB free"
    )
    return steps


def baselines_made_with(settings: PretrainSettings, digests: Mapping[str, str]) -> dict[str, Any]:
    """What decides what the baselines have."""
    made_with = {"evaluation": settings.evaluation, "data_sha256": dict(digests)}
    plain: dict[str, Any] = json.loads(json.dumps({"made_with": made_with}, default=str))
    return plain


def baselines_before(settings: PretrainSettings, run_dir: Path) -> dict[str, Any]:
    """Numbers of the baselines that were measured before the run, with the same evaluation."""
    if settings.budget is None:
        return {}
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        before = json.loads((run_dir / BASELINES).read_text())
    now = baselines_made_with(settings, about_run(run_dir).get("data_sha256") or {})
    same = before.pop("made_with", None) == now["made_with"]
    return before if same and before.get("results") else {}
