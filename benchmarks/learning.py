"""What each objective learns in the same time: k-NN, also of whitened features, and logistic
regression on held-out labelled images, by class token, mean patch and both.

python benchmarks/learning.py [--objectives dino,dino@4,infonce,...] [--seconds 150] [--seeds 0]
    [--data photos | DIR] [--size 48] [--model xcit_micro_4_p8] [--batch 32]
    [--steps 200 | 649,467,...] [--words "augment.num_local=2 ..."] [--teacher runs/demo]
    [--out runs/learning]

NAME@N is an objective with N local crops an image instead of none. A few steps, in turn, tell how
many fit into the time (or `--steps` says it, one number for all or one for each); then each is
`ssl-xcit pretrain` with the recipe of the built-in photographs, of so many steps. DIR has one
folder a class (such as what debian_pictures.py makes); pretraining sees all of its images without
labels, k-NN is measured on each fifth with the other four, regression on one. Random weights, a
colour histogram and raw pixels stand beside them. What is finished is not run again. The time is
that of training steps: loading a batch that is waited for counts, starting and evaluating do not.
"""

import argparse
import csv
import hashlib
import json
import statistics
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from measure import save

from ssl_xcit import cli
from ssl_xcit.data.decode import decode
from ssl_xcit.data.preprocess import of_weights, resize_center_crop
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.eval.evaluators.baselines import colour_histogram, random_weights
from ssl_xcit.eval.evaluators.knn import knn_predict
from ssl_xcit.eval.evaluators.logistic import Logistic
from ssl_xcit.eval.features.cache import extract_pair
from ssl_xcit.eval.features.extract import FeatureSet
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.models.weights import load_backbone

OBJECTIVES = [
    "dino", "dino@4", "infonce", "infonce@4", "simdino", "simdino@4", "swav", "swav@4", "region",
    "ibot", "dinov2",
]  # fmt: skip
KINDS = ["cls", "patch", "cls_patch"]
PROBE_STEPS, TURNS = 20, 2  # to measure how many fit into the time
FOLDS = 5  # of the images of a folder
PIXELS = 16  # side of the image of raw pixels


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def words(args: argparse.Namespace, objective: str, seed: int, steps: int, name: str) -> list[str]:
    pair = labelled(args)
    images = len(pair.train) + len(pair.test) * (args.data != "photos")
    objective, _, num_local = objective.partition("@")
    data = [] if args.data == "photos" else [f"data.root={args.data}", "experiment=photos"]
    return [
        "pretrain", *data, f"objective={objective}", f"model={args.model}", f"seed={seed}",
        f"augment.global_size={args.size}", f"augment.local_size={args.size // 2}",
        f"augment.num_local={num_local or 0}",
        f"batch_size={args.batch}", f"epochs={steps * args.batch / images + 1e-3}",
        f"out={args.out}", f"name={name}", "report=null", "callbacks.online=null",
        "callbacks.snapshots=null", "eval_data=none", "callbacks.metrics.every_steps=5",
        "callbacks.checkpoints.every_steps=100000", *args.words.split(),
        *([f"objective.teacher={args.teacher}"] if objective == "distillation" else []),
    ]  # fmt: skip


def settings_of(args: argparse.Namespace) -> str:
    """A short name of what a run is made with, besides objective, steps and seed."""
    what = (args.data, args.size, args.model, args.batch, args.words, args.teacher)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:6]


def labelled(args: argparse.Namespace) -> LabelledPair:
    """The images with their classes."""
    group = "photos" if args.data == "photos" else "folder"
    sizes = [f"eval_data.resize={args.size}", f"eval_data.size={args.size}"]
    root = [] if args.data == "photos" else [f"eval_data.root={args.data}", *sizes]
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        cfg = compose("pretrain", [f"eval_data={group}", *root])
    pair: LabelledPair = instantiate(cfg.eval_data)
    return pair


def steps_in_the_time(args: argparse.Namespace) -> dict[str, int]:
    """Training steps of each objective that fit into the time, by the speed of a few, which all
    take in turn.
    """
    speeds: dict[str, list[float]] = {objective: [] for objective in args.objectives}
    for turn in range(TURNS):
        for objective in args.objectives:
            name = f"speed-{objective}-{settings_of(args)}-{turn}"
            file = args.out / name / "metrics.csv"
            if not file.is_file():
                cli.main(words(args, objective, 0, PROBE_STEPS, name))
            with file.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
            speeds[objective] += [float(row["images_per_second"]) for row in rows[1:]]
    return {
        objective: max(1, round(args.seconds * statistics.median(of_one) / args.batch))
        for objective, of_one in speeds.items()
    }


def folds(features: FeatureSet, data: str) -> list[FeatureSet]:
    """The photographs' own split, for windows of one side by side would give it away; of a folder,
    each fifth of all images with the rest to learn from.
    """
    if data == "photos":
        return [features]
    rows = np.concatenate((features.train, features.test))
    labels = np.concatenate((features.train_labels, features.test_labels))
    place = np.random.default_rng(0).permutation(len(rows)) % FOLDS
    return [
        FeatureSet(rows[place != n], labels[place != n], rows[place == n], labels[place == n])
        for n in range(FOLDS)
    ]


def measured(features: FeatureSet, data: str) -> dict[str, float]:
    """k-NN 20 and logistic regression by kind of features, in percent."""
    numbers = {}

    def knn(of: FeatureSet) -> float:
        right = [
            knn_predict(part.train, part.train_labels, part.test, 20) == part.test_labels
            for part in folds(of, data)
        ]
        return 100 * float(np.concatenate(right).mean())

    for kind in features.usable(KINDS):
        of = features.of(kind)
        numbers[f"knn {kind}"] = knn(of)
        numbers[f"knn {kind} whitened"] = knn(whitened(of))
        logistic = dict(Logistic(kinds=[kind])(features))["logistic"]
        numbers[f"logistic {kind}"] = float(logistic)
    return numbers


def whitened(features: FeatureSet) -> FeatureSet:
    """Centered, and with the same variance in all directions, by the training images."""
    rows = np.asarray(features.train, np.float64)
    mean = rows.mean(axis=0)
    _, lengths, directions = np.linalg.svd(rows - mean, full_matrices=False)
    scale = (directions.T / (lengths + 1e-3 * lengths[0])) * len(rows) ** 0.5

    def of(part: np.ndarray) -> np.ndarray:
        return ((part - mean) @ scale).astype(np.float32)

    return replace(features, train=of(features.train), test=of(features.test))


def raw_pixels(extractor: FeatureExtractor, pair: LabelledPair) -> FeatureSet:
    """The middle of each image at a few pixels."""

    def of(source: Source) -> np.ndarray:
        crops = (
            resize_center_crop(decode(source.read(i), extractor.preprocess), PIXELS, PIXELS)
            for i in range(len(source))
        )
        return np.stack([crop.reshape(-1) / 255 for crop in crops]).astype(np.float32)

    assert pair.train.labels is not None
    assert pair.test.labels is not None
    return FeatureSet(of(pair.train), pair.train.labels, of(pair.test), pair.test.labels)


def extractor_of(run: Path, pair: LabelledPair) -> FeatureExtractor:
    """Of the teacher of a run."""
    backbone = load_backbone(run)
    return FeatureExtractor(backbone, of_weights(backbone.preprocess), pair=pair, num_workers=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", type=lambda text: text.split(","), default=OBJECTIVES)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--steps", type=integers, help="of each, instead of as many as fit")
    parser.add_argument("--seeds", type=integers, default=[0])
    parser.add_argument("--data", default="photos")
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--model", default="xcit_micro_4_p8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--words", default="")
    parser.add_argument("--teacher", default="runs/demo", help="of --objectives distillation")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    if len(set(args.objectives)) < len(args.objectives):
        parser.error("--objectives: each once")
    pair, rows = labelled(args), dict[str, list[dict[str, float]]]()
    if not args.steps:
        steps, length = steps_in_the_time(args), f"{args.seconds:g}s"
    elif len(args.steps) in (1, len(args.objectives)):
        steps = dict(zip(args.objectives, cycle(args.steps)))
        length = "_".join(map(str, args.steps))
    else:
        parser.error(f"--steps: {len(args.steps)} numbers for {len(args.objectives)} objectives")
    for seed in args.seeds:
        for objective in args.objectives:
            name = f"{objective}-{settings_of(args)}-{steps[objective]}-{seed}"
            cli.main(words(args, objective, seed, steps[objective], name))
            extractor = extractor_of(args.out / name, pair)
            numbers = measured(extract_pair(extractor, KINDS), args.data)
            rows.setdefault(objective, []).append(numbers)
            print(objective, seed, json.dumps(numbers), flush=True)
    rows["random weights"] = [measured(random_weights(extractor, KINDS), args.data)]
    rows["colour histogram"] = [measured(colour_histogram(extractor), args.data)]
    rows["raw pixels"] = [measured(raw_pixels(extractor, pair), args.data)]
    print_table(rows, steps)
    about = {"model": args.model, "words": args.words, "seeds": args.seeds}
    about |= {} if args.steps else {"seconds": args.seconds}
    about |= {"batch": args.batch, "size": args.size}
    results = {
        name: {**about, "steps": steps.get(name), "numbers": numbers}
        for name, numbers in rows.items()
    }
    save(f"learning_{Path(args.data).name}_{length}_{settings_of(args)}", results)


def print_table(rows: dict[str, list[dict[str, float]]], steps: dict[str, int]) -> None:
    """Means over the seeds, and the lowest and highest."""
    columns = list(next(iter(rows.values()))[0])
    print("| | steps | " + " | ".join(columns) + " |")
    print("|---|---:|" + "---:|" * len(columns))
    for name, seeds in rows.items():
        cells = []
        for column in columns:
            values = [numbers[column] for numbers in seeds if column in numbers]
            spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        print(f"| {name} | {steps.get(name, '')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
