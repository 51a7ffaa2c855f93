"""What another form of the weights is worth: k-NN of its features beside the backbone's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.module import plain_loader
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import UserError
from ssl_xcit.export.exported import Run, Weights
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import track

from .features import FeatureSet
from .knn import KNN


@dataclass(frozen=True)
class KNNOf:
    """k-NN in percent on labelled images, by the protocol of the evaluation.

    Args:
        pair: the images.
        k: neighbours.
        batch_size: images at once.
    """

    pair: LabelledPair
    k: int = 20
    batch_size: int = 64
    known: dict[Run, float] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, weights: Weights, runs: Mapping[str, Run]) -> dict[str, float]:
        """By each of the functions from images to features, once.

        Raises:
            UserError: the labels are no classes, or there are too few images.
        """
        if label_kind(self.pair.train.labels) != "classes":
            raise UserError("k-NN needs images of one class each")
        for name, run in runs.items():
            if run not in self.known:  # float32 stands beside each of several formats
                self.known[run] = self.of(weights, run, name)
        return {name: self.known[run] for name, run in runs.items()}

    def of(self, weights: Weights, run: Run, name: str) -> float:
        """One of them."""
        pair = self.pair
        parts = []
        for source in dict.fromkeys((pair.train, pair.test)):
            features, rows = self.features(weights, run, source, name)
            assert source.labels is not None
            parts.append((features, np.asarray(source.labels)[rows]))
        (train, train_labels), (test, test_labels) = parts[0], parts[-1]
        evaluator = KNN(k=[self.k])
        found = dict(evaluator(FeatureSet(train, train_labels, test, test_labels)))
        return float(found[f"knn_k{self.k}"])

    def features(
        self, weights: Weights, run: Run, source: Source, name: str
    ) -> tuple[Float[np.ndarray, "N C"], np.ndarray]:
        """Of all readable images, and which these are."""
        size = (weights.resize, weights.size, self.batch_size, None, weights.how)
        found, readable = [], []
        title, shown = f"{name}: features", shown_in_terminal()
        with torch.inference_mode():
            for pixels, good in track(plain_loader(source, *size), title, show=shown):
                found.append(run(normalise(pixels, weights.how)).float().numpy()[good.numpy()])
                readable.append(good.numpy())
        return np.concatenate(found), np.flatnonzero(np.concatenate(readable))
