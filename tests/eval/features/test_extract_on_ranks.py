"""Features extracted and searched by several ranks, against those of a single process."""

import numpy as np
import pytest
import torch
from ranks import on_ranks

from ssl_xcit.data.picture import RGB
from ssl_xcit.data.sets import Arrays
from ssl_xcit.eval.evaluators.knn import KNN, knn_predict
from ssl_xcit.eval.features.extract import FeatureSet, extract
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.features.neighbors import nearest, shards
from ssl_xcit.models.xcit import XCiT

NUM_IMAGES, BATCH = 37, 4  # neither divides among ranks


def extracted(ranks):
    torch.manual_seed(0)
    backbone = XCiT(16, 2, 2, 8)
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 24, 24, 3), np.uint8)
    source = Arrays(images, "noise")
    extractor = FeatureExtractor(backbone, RGB, "cpu", BATCH, 0, ranks=ranks > 1)
    return extract(extractor, source, 24, 24, ("cls", "patch"))


def rows_with_repeats():
    """A bank of five shards, where most rows have equals in other shards, and queries."""
    generator = np.random.default_rng(1)
    different = generator.standard_normal((30_000, 8), dtype=np.float32)
    bank = different[generator.integers(0, 30_000, 140_001)]
    return bank, different[:301] + np.float32(0.01)


def work(rank, ranks):
    bank, queries = rows_with_repeats()
    similarity, indices = nearest(bank, queries, 20, ranks=True)
    found = {"similarity": similarity, "indices": indices}
    itself = np.arange(300)
    found["others"] = nearest(bank, bank[:300], 20, itself, ranks=True)[1]
    labels = np.arange(len(bank)) % 7
    together = FeatureSet(bank, labels, queries, labels[: len(queries)], ranks=True)
    found["knn"] = np.array([float(value) for _, value in KNN((3, 20))(together)])
    return extracted(ranks)[0] | found


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_extract_and_find_what_one_does_to_the_last_bit(ranks, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, rows = extracted(1)
    assert rows.tolist() == list(range(NUM_IMAGES))
    of_ranks = on_ranks(ranks, tmp_path, work, ranks)
    bank, queries = rows_with_repeats()
    assert len(list(shards(bank))) == 5
    similarity, indices = nearest(bank, queries, 20)
    others = nearest(bank, bank[:300], 20, np.arange(300))[1]
    classes = np.arange(len(bank)) % 7
    alone = dict(KNN((3, 20))(FeatureSet(bank, classes, queries, classes[: len(queries)])))
    torch.set_num_threads(before)
    labels = np.arange(NUM_IMAGES) % 5
    for made in of_ranks:
        assert np.array_equal(made["similarity"], similarity)
        assert np.array_equal(made["indices"], indices)
        assert np.array_equal(made["others"], others)
        assert made["knn"].tolist() == [float(value) for value in alone.values()]
        for part, features in whole.items():
            assert np.array_equal(made[part], features)
        assert np.array_equal(
            knn_predict(made["cls"], labels, made["patch"], 5),
            knn_predict(whole["cls"], labels, whole["patch"], 5),
        )
