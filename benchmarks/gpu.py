"""Everything that has to be measured on a first GPU, in ten minutes; one JSON file.

    python benchmarks/gpu.py [--out gpu.json] [--minutes 10]
    python benchmarks/gpu.py --toy          on the CPU, at toy size, in a minute

Parts: the device; a forward pass against the CPU's in float32; a training step by model, precision
and `compile` (milliseconds, peak memory against what `plan=true` expects); where a step waits for
the device; the optimizer, fused and not; the loader; the commands `pretrain` and `eval`; faiss;
two ranks. A part that fails leaves its error in the file and the rest goes on; what is
left when the time is over is skipped.
"""

import argparse
import csv
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import interleaved
from real_step import composed, expected, step_of

from ssl_xcit.data.picture import RGB
from ssl_xcit.training.datamodule import multi_crop_data
from ssl_xcit.utils.hardware import machine, memory_of

MODELS = {"nano_12_p8": 64, "nano_12_p16": 256, "small_12_p16": 64}  # images a step
PRECISIONS = ("32-true", "bf16-mixed")
TOY = ["experiment=photos", "model.embed_dim=32", "model.depth=1", "model.num_heads=2"]
SHORT = [
    "evaluation.evaluators.linear=null", "evaluation.evaluators.few_shot=null",
    "evaluation.evaluators.logistic=null", "evaluation.evaluators.clustering=null",
    "evaluation.evaluators.retrieval=null",
]  # fmt: skip


def words_of(model: str, precision: str, compiled: bool = False) -> list[str]:
    """Settings of a step."""
    how = [f"trainer.precision={precision}", f"compile={str(compiled).lower()}"]
    if ARGS.toy:
        return [*TOY, "batch_size=4", *how]
    size = [f"model=xcit_{model}", f"batch_size={MODELS[model]}"]
    return ["experiment=none", "objective=dino", "data=photos", *size, *how]


def synchronise() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def facts() -> dict[str, Any]:
    """The device and the libraries."""
    found = {
        **machine(), "python": platform.python_version(), "torch": torch.__version__,
        "memory": memory_of(torch.device(DEVICE)), "float32 products": precision_settings(),
    }  # fmt: skip
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }  # fmt: skip
    return found


def precision_settings() -> dict[str, Any]:
    """Whether float32 products may be TF32."""
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
    }


def parity() -> dict[str, Any]:
    """Largest and mean difference of class tokens to the CPU's in float32, over their norm."""
    found = {}
    for model in MODELS:
        module = composed(words_of(model, "32-true"))[1]
        backbone = module.student.backbone.eval()
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            reference = backbone(images)
            backbone.to(DEVICE)
            for name, tf32, low in (
                ("float32", False, False), ("TF32", True, False), ("bfloat16", True, True),
            ):  # fmt: skip
                with tf32_allowed(tf32), torch.autocast(DEVICE, torch.bfloat16, enabled=low):
                    ours = backbone(images.to(DEVICE)).float().cpu()
                off = (ours - reference).norm(dim=-1) / reference.norm(dim=-1)
                found[f"{model} {name}"] = {"largest": off.max().item(), "mean": off.mean().item()}
    return found


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Products and convolutions in TF32, or in float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def steps() -> dict[str, Any]:
    """Time and memory of a step; first without `compile`."""
    rows = [(m, p, c) for c in (False, not ARGS.toy) for m in MODELS for p in PRECISIONS]
    found: dict[str, Any] = {}
    for model, precision, compiled in dict.fromkeys(rows):
        name = f"{model} {precision}" + " compiled" * compiled
        found[name] = guarded(lambda m=model, p=precision, c=compiled: one_step(m, p, c))
    return found


def one_step(model: str, precision: str, compiled: bool) -> dict[str, Any]:
    """Median milliseconds of a step, and bytes at its peak against those expected."""
    words = words_of(model, precision, compiled)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    began = time.perf_counter()
    step = step_of(words, DEVICE)
    step()
    synchronise()
    first, seconds = time.perf_counter() - began, []
    for _ in range(2 if ARGS.toy else 12):
        began = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - began)
    images = composed(words)[0].batch_size
    found: dict[str, Any] = {
        "first_s": round(first, 2), "ms": round(1000 * statistics.median(seconds), 2),
        "images_per_second": round(images / statistics.median(seconds), 1),
    }  # fmt: skip
    if DEVICE == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated() - before
        found["reserved"] = torch.cuda.max_memory_reserved()
    if not compiled:
        found["expected"] = guarded(lambda: expected(words, DEVICE)._asdict())
        found["expected_total"] = sum(v for v in found["expected"].values() if type(v) is int)
    return found


def synchronisations() -> dict[str, int]:
    """Where three steps wait for the device, by torch's warnings; one a step is meant."""
    step = step_of(words_of("nano_12_p16", "bf16-mixed"), DEVICE)
    step()
    synchronise()
    if DEVICE != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(3):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found))


def optimizer() -> dict[str, Any]:
    """Seconds of AdamW's step, fused and by foreach, interleaved."""
    sides: dict[str, Callable[[], object]] = {}
    for name in ("fused", "foreach"):
        module = composed(words_of("small_12_p16", "32-true"))[1].to(DEVICE)
        weights = [p for p in module.student.parameters() if p.requires_grad]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        made = torch.optim.AdamW(weights, 1e-4, **{name: True})
        sides[name] = lambda made=made: (made.step(), synchronise())
    return {k: statistics.median(v) for k, v in interleaved(sides, 10, warm_up=3).items()}


def loader() -> dict[str, Any]:
    """Images a second of the built-in photographs as crops of 224 and 96 pixels, on the device."""
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        cfg = compose("pretrain", ["experiment=none", "data=photos"])
    count, batch = (4, 8) if ARGS.toy else (40, 128)
    source, augment = instantiate(cfg.data.source), instantiate(cfg.augment)
    data = multi_crop_data(source, augment, batch, count, 0, RGB, 1 if ARGS.toy else None)
    began, total = 0.0, 0
    for number, crops in enumerate(data.train_dataloader()):
        if number == 1:  # the processes have started
            began = time.perf_counter()
        parts = [p.to(DEVICE, non_blocking=True) for p in (crops.global_crops, crops.local_crops)]
        total += len(parts[0]) * (number > 0)
    synchronise()
    rate = total / (time.perf_counter() - began)
    pinned = crops.global_crops.is_pinned() if DEVICE == "cuda" else False
    return {"images_per_second": rate, "workers": data.num_workers, "pinned": pinned}


def command_line() -> dict[str, Any]:
    """A short run and its evaluation, as a person types them."""
    with tempfile.TemporaryDirectory() as folder:
        small = [*TOY[1:], "augment.global_size=32"] if ARGS.toy else []
        run = ["pretrain", "name=first", f"epochs={0.2 if ARGS.toy else 5}", *small, *SHORT]
        plan = ssl_xcit(folder, *run, "plan=true")
        found = {"plan": plan, "pretrain": ssl_xcit(folder, *run, "report=null")}
        with (Path(folder) / "runs/first/metrics.csv").open() as file:
            found["metrics"] = list(csv.DictReader(file))[-1]
        found["eval"] = ssl_xcit(folder, "eval", "ckpt=runs/first", *SHORT)
        return found


def ssl_xcit(folder: str, *words: str) -> dict[str, Any]:
    """Exit code, seconds and the last lines of a command."""
    here = (
        [] if DEVICE == "cuda" else (["trainer=cpu"] if words[0] == "pretrain" else ["device=cpu"])
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ssl_xcit", *words, *here], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()[-30:]
    return {"code": done.returncode, "seconds": time.perf_counter() - began, "output": lines}


def faiss() -> dict[str, Any]:
    """Whether there is a faiss for GPUs, and its search against torch's."""
    if importlib.util.find_spec("faiss") is None:
        return {"skipped": "no faiss"}
    import faiss as library

    count = getattr(library, "get_num_gpus", lambda: 0)()
    if not count:
        return {"version": library.__version__, "skipped": "this faiss sees no GPU"}
    rows = torch.nn.functional.normalize(torch.randn(20_000, 384)).numpy()
    index = library.index_cpu_to_all_gpus(library.IndexFlatIP(384))
    index.add(rows)
    _, ours = index.search(rows[:100], 20)
    wanted = (torch.from_numpy(rows[:100]) @ torch.from_numpy(rows).T).topk(20).indices.numpy()
    return {"version": library.__version__, "GPUs": count, "equal": float((ours == wanted).mean())}


def two_ranks() -> dict[str, Any]:
    """A short run on two GPUs."""
    if torch.cuda.device_count() < 2:
        return {"skipped": f"{torch.cuda.device_count()} GPUs"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["trainer=ddp", "trainer.devices=2", "epochs=2", "report=null", *SHORT]
        return ssl_xcit(folder, "pretrain", "name=two", *words)


def guarded(part: Callable[[], Any]) -> Any:
    """What a part finds, or its error."""
    if time.perf_counter() - BEGAN > 60 * ARGS.minutes:
        return {"skipped": "the time is over"}
    try:
        return part()
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "where": traceback.format_exc().splitlines()[-6:],
        }


PARTS = [
    facts, parity, synchronisations, command_line, steps, optimizer, loader, faiss, two_ranks,
]  # fmt: skip


def main() -> None:
    found: dict[str, Any] = {}
    for part in PARTS:
        began = time.perf_counter()
        found[part.__name__] = guarded(part)
        seconds = time.perf_counter() - began
        print(
            f"{part.__name__}: {seconds:.1f} s", json.dumps(found[part.__name__])[:300], flush=True
        )
        ARGS.out.write_text(json.dumps({"toy": ARGS.toy, **found}, indent=2, default=str) + "\n")
    print(f"written: {ARGS.out}")


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("gpu.json"))
parser.add_argument("--minutes", type=float, default=10.0)
parser.add_argument("--toy", action="store_true")

if __name__ == "__main__":
    ARGS, BEGAN = parser.parse_args(), time.perf_counter()
    if not ARGS.toy and not torch.cuda.is_available():
        sys.exit("there is no GPU: --toy runs everything on the CPU, at toy size")
    if ARGS.toy:
        MODELS, PRECISIONS = {"toy": 4}, ("32-true",)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    DEVICE = "cpu" if ARGS.toy else "cuda"
    main()
