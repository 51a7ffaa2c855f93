"""How much work the logistic regression of the standard evaluation is, on the features of a run.

    python benchmarks/logistic.py [CKPT=runs/demo]

Runs `ssl-xcit eval` with nothing but the logistic regression, and prints for each row (random
weights, colour histogram, the backbone) how often the loss was evaluated, over all strengths and
kinds of features, and the seconds of it. Writes benchmarks/results/logistic.json.
"""

import os
import sys
import time
from typing import Any

from measure import save

from ssl_xcit import cli
from ssl_xcit.eval import runner
from ssl_xcit.eval.evaluators import logistic
from ssl_xcit.utils.hardware import processor

OTHERS = ("knn", "few_shot", "linear", "clustering", "retrieval", "several_labels", "regression")


def main(ckpt: str) -> None:
    results: dict[str, Any] = {}
    loss, measure_features = logistic.softmax_loss, runner.measure_features
    evaluations = 0

    def counted(*arguments: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        return loss(*arguments)

    def measured(evaluation: Any, row: str, *others: Any) -> None:
        nonlocal evaluations
        evaluations, began = 0, time.perf_counter()
        measure_features(evaluation, row, *others)
        seconds = time.perf_counter() - began
        results[row] = {"evaluations": evaluations, "seconds": seconds, "cpu": processor()}

    logistic.softmax_loss, runner.measure_features = counted, measured
    cli.main(["eval", f"ckpt={ckpt}", *(f"evaluation.evaluators.{name}=null" for name in OTHERS)])
    print(f"{processor()}, {os.cpu_count()} cores")
    for row, found in results.items():
        print(f"{row:<20}{found['evaluations']:>8,} evaluations{found['seconds']:>8.1f} s")
    save("logistic", results)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
