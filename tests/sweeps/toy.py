"""A trial without training: `toy.py pretrain lr=0.1 out=DIR name=NAME [steps=N] [fail=1]`.

It writes what a run writes, saves and ends with 75 on SIGTERM, goes on where it was, and notes
every step that it takes.
"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ssl_xcit.sweeps.job import IN_USE, PARENT, end_with
from ssl_xcit.utils.locks import InUse, exclusive

words = (word.partition("=") for word in sys.argv[2:])
settings = {k.lstrip("+").removeprefix("trainer."): v.strip("'") for k, _, v in words}
folder = Path(settings["out"]) / settings["name"]
total = int(settings.get("steps", 8))
lr = float(settings.get("lr") or settings.get("optim.lr"))
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _: received.append(n))
if PARENT in os.environ:
    end_with(int(os.environ[PARENT]), signal.SIGTERM)
if settings.get("fail") == "1":
    sys.exit("ssl-xcit: optim.lr=huge: a number below 10")
if settings.get("fail") == "9":
    os.kill(os.getpid(), signal.SIGKILL)

held = ExitStack()
try:
    held.enter_context(exclusive(folder / ".lock", str(folder)))
except InUse as error:
    print(f"ssl-xcit: {error}", flush=True)
    sys.exit(IN_USE)
(folder / "run.json").write_text(json.dumps({"plan": {"total_steps": total}}))
taken = folder / "steps.txt"
done = len(taken.read_text().split()) if taken.exists() else 0
metrics = folder / "metrics.csv"
if not metrics.exists():
    metrics.write_text("step,loss,knn_k20\n")
for step in range(done + 1, total + 1):
    time.sleep(float(settings.get("sleep", 0.02)))
    with taken.open("a") as file:
        file.write(f"{step}\n")
    value = 100 - abs(lr - 3) * 10 - (total - step)
    with metrics.open("a") as file:
        file.write(f"{step},{1 / step},{value}\n")
    if received:
        sys.exit({signal.SIGTERM: 75, signal.SIGINT: 130}[received[0]])
time.sleep(float(settings.get("rest", 0)))
results = {"random weights": {"knn_k20": 1.0}, "pretrained": {"knn_k20": 100 - abs(lr - 3) * 10}}
facts = {
    "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "threads": os.environ.get("OMP_NUM_THREADS"),
}
summary = {"results": results, "intervals": {}, "last": {"step": total}, **facts}
(folder / "summary.json").write_text(json.dumps(summary))
