"""What `ssl-xcit pretrain` adds to its step: the whole command against the step alone, interleaved.

    python benchmarks/overhead.py [--rounds 7] [--steps 40] [--words "model=xcit_nano_12_p16 ..."]

Each round trains on the built-in photographs without evaluation or report, with the command's
logging, health, checkpoint and loader, and then takes as many steps alone, on random pixels, in
the same process. `around`: seconds from one step's start to the next over seconds inside the step,
which is what the trainer does between steps, waiting for data included. `whole`: seconds from one
step's start to the next over a step alone, which has the crops' share of the processor in it, too.
Writes benchmarks/results/overhead.json.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

from measure import save
from real_step import step_of

import ssl_xcit
from ssl_xcit.training.module import Pretraining

FIRST = 5  # steps that are not counted


class Clock:
    """Starts and ends of every step of a run."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []

    def around(self, step: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            self.starts.append(time.perf_counter())
            output = step(*arguments)
            self.ends.append(time.perf_counter())
            return output

        return timed


def command(words: list[str], steps: int) -> tuple[float, float]:
    """(seconds from start to start, seconds inside a step), means of a run."""
    clock, step = Clock(), Pretraining.step
    Pretraining.step = clock.around(step)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            without = {"eval_data": "none", "report": None, "out": folder, "max_steps": steps}
            ssl_xcit.pretrain(**dict(word.split("=", 1) for word in words), **without)
    finally:
        Pretraining.step = step  # type: ignore[method-assign]
    count = len(clock.starts) - 1 - FIRST
    inside = sum(clock.ends[FIRST:-1]) - sum(clock.starts[FIRST:-1])
    return (clock.starts[-1] - clock.starts[FIRST]) / count, inside / count


def alone(words: list[str], steps: int) -> float:
    """Seconds of a step."""
    step = step_of(words)
    for _ in range(FIRST):
        step()
    started = time.perf_counter()
    for _ in range(steps - FIRST):
        step()
    return (time.perf_counter() - started) / (steps - FIRST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--words", default="")
    args = parser.parse_args()
    words = ["experiment=photos", "trainer=cpu", *args.words.split()]
    around, whole, seconds = [], [], []
    for _ in range(args.rounds):
        total, inside = command(words, args.steps)
        bare = alone(words, args.steps)
        around.append(total / inside)
        whole.append(total / bare)
        seconds.append(bare)
        print(f"step {bare:.3f} s, around {around[-1]:.3f}, whole {whole[-1]:.3f}", flush=True)
    title = args.words or "the built-in photographs"
    result = {
        "step": statistics.median(seconds),
        **{
            name: {"median": statistics.median(v), "range": [min(v), max(v)]}
            for name, v in (("around", around), ("whole", whole))
        },
    }
    print(
        f"{title}: step {result['step']:.3f} s; around {statistics.median(around):.3f} "
        f"({min(around):.3f} to {max(around):.3f}), whole {statistics.median(whole):.3f} "
        f"({min(whole):.3f} to {max(whole):.3f})"
    )
    save("overhead", {title: result})


if __name__ == "__main__":
    main()
