"""The command `eval`: frozen features of a backbone, several evaluators, baselines beside them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig

from ssl_xcit.data.module import check_labelled
from ssl_xcit.data.preprocess import MAX_PIXELS, of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import UserError
from ssl_xcit.files import write_json
from ssl_xcit.models.weights import checkpoint_path, load_backbone, model_name
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.table import Results, print_table

from .features import Evaluator, FeatureSet, extract_pair


def evaluate(
    backbone: XCiT,
    pair: LabelledPair,
    evaluators: Mapping[str, Evaluator | None],
    baselines: Mapping[str, Callable[..., FeatureSet] | None] | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Results:
    """Every evaluator on the backbone's features and on the baselines'.

    Args:
        backbone: frozen; moved to `device`.
        pair: labelled images.
        evaluators: by name; each yields (metric, value).
        baselines: by name; each makes features from (backbone, pair, how, batch_size, num_workers).
        batch_size: images at once.
        num_workers: loader processes; None: one a core, less one.
        device: `auto` takes a GPU when there is one.
        max_pixels: images with more by their header are refused.
    """
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    how = of_weights(backbone.preprocess, max_pixels)
    try:
        backbone.to(where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device}: {reason}; try device=cpu") from error
    results: Results = {}

    def measure(row: str, features: FeatureSet) -> None:
        results[row] = {}
        for evaluator in evaluators.values():
            if evaluator is not None:  # switched off: evaluation.evaluators.linear=null
                results[row].update(evaluator(features))

    for row, make in (baselines or {}).items():
        if make is None:
            continue
        measure(row.replace("_", " "), make(backbone, pair, how, batch_size, num_workers))
    measure(
        "pretrained",
        extract_pair(backbone, pair, how, batch_size, num_workers, where, title="pretrained"),
    )
    return results


def main(cfg: DictConfig) -> None:
    """`ssl-xcit eval`: prints a table and writes `results.json`."""
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    if cfg.batch_size < 1 or (cfg.num_workers or 0) < 0:
        raise UserError(
            f"batch_size={cfg.batch_size}, num_workers={cfg.num_workers}: at least 1 and 0"
        )
    path = checkpoint_path(str(cfg.ckpt))
    backbone = load_backbone(path, cfg.which, expected(cfg))
    pair = instantiate(cfg.eval_data) if cfg.get("eval_data") else None
    if pair is None:
        raise UserError(
            "there are no labelled images: name some with eval_data=folder eval_data.root=DIR"
        )
    check_labelled(pair, of_weights(backbone.preprocess, cfg.max_pixels))
    model = model_name(backbone.architecture)
    print(
        f"{path}: {model}, {cfg.which}; {pair.name}: {len(pair.train):,} train, "
        f"{len(pair.test):,} test images"
    )
    results = instantiate(cfg.evaluation)(
        backbone,
        pair,
        batch_size=cfg.batch_size,
        num_workers=cfg.num_workers,
        device=cfg.device,
        max_pixels=cfg.max_pixels,
    )
    print_table(results, f"{model} on {pair.name}")
    out = Path(cfg.out) if cfg.out else default_out(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "weights": str(path),
        "which": cfg.which,
        "model": model,
        "data": pair.name,
        "train_images": len(pair.train),
        "test_images": len(pair.test),
        "results": results,
    }
    write_json(content, out)
    print(f"written: {out}")


def expected(cfg: DictConfig) -> dict[str, Any] | None:
    """What `model=` asks of the file: the parts of the architecture that weights must fit."""
    if cfg.get("model") is None:
        return None
    architecture = instantiate(cfg.model).architecture
    return {k: v for k, v in architecture.items() if k not in ("layer_scale", "num_classes")}


def default_out(path: Path) -> Path:
    """`results.json` in the run folder, or beside a lone weights file."""
    return (
        path.parent.parent if path.parent.name == "checkpoints" else path.parent
    ) / "results.json"


def data_of_run(ckpt: str) -> LabelledPair | None:
    """The labelled images that a run was measured on, from the choices in its `run.json`.

    Only names of our own options and plain values are taken from the file; nothing in it is
    instantiated by itself.

    Raises:
        UserError: the weights do not lie in a run folder.
    """
    file = default_out(checkpoint_path(ckpt)).with_name("run.json")
    if not file.is_file():
        raise UserError(
            f"ckpt={ckpt} is no run folder, so its evaluation data is unknown: add "
            "eval_data=photos, or "
            "eval_data=folder eval_data.root=DIR"
        )
    run = json.loads(file.read_text())
    overrides = [
        o for o in run["overrides"] if re.match(r"eval_data\.[a-z]\w*=|data\.[a-z]\w*=", o)
    ]
    chosen = [f"{key}={run['choices'][key]}" for key in ("data", "eval_data")]
    cfg = compose("pretrain", overrides=[*chosen, *overrides])
    return instantiate(cfg.eval_data) if cfg.get("eval_data") else None
