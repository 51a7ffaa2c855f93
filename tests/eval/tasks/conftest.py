"""A small backbone, and what extracts its features."""

import pytest
import torch

from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.models.xcit import XCiT


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return XCiT(32, 1, 2, patch_size=8)


@pytest.fixture(scope="module")
def extractor(backbone):
    return FeatureExtractor(backbone, batch_size=5, num_workers=0, show=True)
