"""Features extracted by several ranks, against those of a single process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_xcit.data.decode import RGB
from ssl_xcit.data.sets import Arrays
from ssl_xcit.eval.evaluators.knn import knn_predict
from ssl_xcit.eval.features.extract import extract
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.models.xcit import XCiT

NUM_IMAGES, BATCH = 37, 4  # neither divides among ranks


def extracted(ranks):
    torch.manual_seed(0)
    backbone = XCiT(16, 2, 2, 8)
    images = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 24, 24, 3), np.uint8)
    source = Arrays(images, "noise")
    extractor = FeatureExtractor(backbone, RGB, "cpu", BATCH, 0, ranks=ranks > 1)
    return extract(extractor, source, 24, 24, ("cls", "patch"))


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    np.savez(f"{folder}/{rank}.npz", **extracted(ranks)[0])
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_extract_what_one_does_to_the_last_bit(ranks, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, rows = extracted(1)
    torch.set_num_threads(before)
    assert rows.tolist() == list(range(NUM_IMAGES))
    mp.get_context("forkserver").set_forkserver_preload(["torch", "jaxtyping"])
    mp.start_processes(work, (ranks, str(tmp_path)), nprocs=ranks, start_method="forkserver")
    labels = np.arange(NUM_IMAGES) % 5
    for rank in range(ranks):
        made = np.load(tmp_path / f"{rank}.npz")
        for part, features in whole.items():
            assert np.array_equal(made[part], features)
        assert np.array_equal(
            knn_predict(made["cls"], labels, made["patch"], 5),
            knn_predict(whole["cls"], labels, whole["patch"], 5),
        )
