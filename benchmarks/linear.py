"""Fifty linear heads against one, and against one trained the usual way, in interleaved runs.

python benchmarks/linear.py [--rounds 7] [--only features|images]

features: on 10,000 x 384 features of 20 classes, one epoch of batches of 128. The usual way is a
DataLoader over the features, nn.Linear, cross_entropy and torch.optim.SGD. images: DINO's protocol,
which augments each image and takes it through the backbone (nano_12_p16 at 224 pixels).
"""

import argparse

import measure
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from ssl_xcit.data.photos import labelled_photos
from ssl_xcit.data.sources import LabelledPair, Subset
from ssl_xcit.eval.evaluators.linear import train_heads
from ssl_xcit.eval.evaluators.linear_heads import HeadSetting
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.tasks.linear_augmented import AugmentedProbe
from ssl_xcit.models.xcit import create_model

RATES = np.geomspace(1e-4, 10, 50).tolist()


def usual(x: torch.Tensor, y: torch.Tensor, num_classes: int) -> None:
    head = torch.nn.Linear(x.shape[1], num_classes)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    steps = -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch, classes in DataLoader(TensorDataset(x, y), 128, shuffle=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(batch), classes).backward()
        optimizer.step()
        schedule.step()


def features(rounds: int) -> dict[str, dict]:
    generator = torch.Generator().manual_seed(0)
    K = 20
    y = torch.randint(K, (10_000,), generator=generator)
    x = torch.randn(K, 384, generator=generator)[y] + torch.randn(10_000, 384, generator=generator)

    def ours(rates: list[float]) -> None:
        settings = [HeadSetting("cls", lr, 0.0) for lr in rates]
        train_heads({"cls": x}, y, K, settings, epochs=1, batch_size=128, seed=0)

    sides = {
        "fifty": lambda: ours(RATES),
        "one": lambda: ours(RATES[:1]),
        "one, usual": lambda: usual(x, y, K),
    }
    return report("features", measure.interleaved(sides, rounds), ["one", "one, usual"])


def images(rounds: int) -> dict[str, dict]:
    pair = labelled_photos()
    few = [Subset(part, np.arange(0, len(part), 12)) for part in (pair.train, pair.test)]
    frozen = FeatureExtractor(
        create_model("xcit_nano_12_p16"), pair=LabelledPair(*few, "a few", 256, 224), num_workers=1
    )

    def ours(rates: list[float]) -> None:
        dict(AugmentedProbe("dino", rates, epochs=2, batch_size=32)(frozen))

    sides = {"fifty": lambda: ours(RATES), "one": lambda: ours(RATES[:1])}
    return report("images", measure.interleaved(sides, rounds), ["one"])


def report(title: str, seconds: dict[str, list[float]], peers: list[str]) -> dict[str, dict]:
    results = {}
    for peer in peers:
        pair = {name: seconds[name] for name in ("fifty", peer)}
        found = measure.compared(pair, peer, "fifty")  # the ratio is fifty's time over one's
        results[f"{title}: fifty heads over {peer}"] = found
        print(f"{title}: fifty heads over {peer}: {measure.line(found)}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("features", "images"))
    given = parser.parse_args()
    for part in (features, images):
        if given.only in (None, part.__name__):
            measure.save("linear", part(given.rounds))
