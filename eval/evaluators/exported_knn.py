"""k-NN accuracy of exported weights beside the backbone's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ssl_xcit.data.crop_dataset import plain_loader
from ssl_xcit.data.labels import label_kind
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.data.sources import LabelledPair, Source
from ssl_xcit.errors import UserError
from ssl_xcit.export.comparison import Run
from ssl_xcit.export.description import Weights
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import track
from ssl_xcit.utils.validation import Count

from ..features.extract import FeatureSet
from .knn import KNN


@dataclass(frozen=True)
class ExportedKNN:
    """Accuracy in percent on labelled images: k-NN by the protocol of the evaluation, and of a
    classifier the share of the test images that it is right about.
    """

    pair: LabelledPair
    k: Count = 20  # neighbours
    batch_size: Count = 64  # images at once
    accuracies: dict[Run, float] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, weights: Weights, runs: Mapping[str, Run]) -> dict[str, float]:
        """Accuracy of each function from images to features, measured once; raises UserError where
        the labels are no classes, or there are too few images.
        """
        if label_kind(self.pair.train.labels) != "classes":
            raise UserError("it needs images of one class each")
        for name, run in runs.items():
            if run not in self.accuracies:  # float32 stands beside each of several formats
                self.accuracies[run] = self.accuracy(weights, run, name)
        return {name: self.accuracies[run] for name, run in runs.items()}

    def accuracy(self, weights: Weights, run: Run, name: str) -> float:
        """Accuracy of one function: k-NN by its features, or of its logits."""
        if weights.num_classes:
            logits, labels = self.features(weights, run, self.pair.test, name)
            return 100.0 * float((logits.argmax(axis=1) == labels).mean())
        sources = dict.fromkeys((self.pair.train, self.pair.test))
        parts = [self.features(weights, run, source, name) for source in sources]
        scores = dict(KNN(k=[self.k])(FeatureSet(*parts[0], *parts[-1])))
        return float(scores[f"knn_k{self.k}"])

    def features(
        self, weights: Weights, run: Run, source: Source, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, C) and labels of all readable images."""
        assert source.labels is not None
        preprocess = weights.preprocess
        loader = plain_loader(
            source, weights.resize, weights.size, self.batch_size, None, preprocess
        )
        features, readable = [], []
        with torch.inference_mode():
            for pixels, good in track(loader, f"{name}: features", show=shown_in_terminal()):
                features.append(run(normalise(pixels, preprocess)).float()[good].numpy())
                readable.append(good.numpy())
        labels = np.asarray(source.labels)[np.flatnonzero(np.concatenate(readable))]
        return np.concatenate(features), labels
