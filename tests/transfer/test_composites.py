import json

import numpy as np
import pytest
from PIL import Image

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.transfer import composites as module
from ssl_xcit.transfer.checks import check_transfer
from ssl_xcit.transfer.composites import SHAPES, composites
from ssl_xcit.transfer.detection.data import detection_data
from ssl_xcit.transfer.segmentation.data import segmentation_data

COUNTS = {"train": 14, "test": 6}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COUNTS", COUNTS)
        cache = tmp_path_factory.mktemp("composites")
        composites(cache)
        yield cache


def test_the_same_images_are_written_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COUNTS", COUNTS)
    first, second = composites(small), composites(tmp_path)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 2 * (14 + 6) + 3
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [second.name]


def test_objects_of_coco_are_the_classes_of_the_masks(small):
    objects, masks = detection_data(cache=small), segmentation_data(cache=small)
    assert objects.train.class_names == SHAPES
    assert masks.train.class_names == ("background", *SHAPES)
    kinds = set()
    for part, count in COUNTS.items():
        source, by_pixel = getattr(objects, part), getattr(masks, part)
        assert len(source.images) == len(by_pixel.images) == count
        for i in range(count):
            found = source.read_target(i, 128, 128)
            assert source.images.name(i) == by_pixel.images.name(i)
            drawn = np.zeros((128, 128), np.uint8)
            for label, mask, box in zip(found.labels, found.masks, found.boxes, strict=True):
                assert not drawn[mask].any()  # what is behind is not seen
                drawn[mask] = label + 1
                rows, columns = np.nonzero(mask)
                assert box.tolist() == [
                    columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                ]  # fmt: skip
            assert 1 <= len(found.labels) <= 5
            assert (drawn == by_pixel.read_target(i, 128, 128)).all()
            kinds |= set(found.labels.tolist())
    assert len(kinds) == len(SHAPES)
    check_transfer(objects, Preprocess())
    check_transfer(masks, Preprocess())


def test_both_ways_of_coco_to_store_masks_are_there(small):
    content = json.loads((composites(small) / "annotations/instances_train.json").read_text())
    kinds = {type(row["segmentation"]) for row in content["annotations"]}
    assert kinds == {list, dict}


def test_objects_are_seen_in_the_image(small):
    """Where there are no objects the image is a block of a photograph."""
    root = composites(small)
    blocks = [
        block.astype(int)
        for name, file in module.photographs()
        if name in module.BACKGROUNDS
        for test, _, _, block in module.blocks(module.read_image(file))
        if not test
    ]
    for i in range(2):
        image = np.asarray(Image.open(root / f"images/train/{i:04d}.png")).astype(int)
        mask = np.asarray(Image.open(root / f"masks/train/{i:04d}.png")) > 0
        padded = np.pad(mask, 1)
        near = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).any(axis=(2, 3))
        turned = [np.rot90(b, k)[:, ::step] for b in blocks for k in range(4) for step in (1, -1)]
        match = min(turned, key=lambda block: np.abs(block - image)[~near].sum())
        assert (match == image)[~near].all()
        assert (match != image).any(axis=2)[mask].mean() > 0.8
