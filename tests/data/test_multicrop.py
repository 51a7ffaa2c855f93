"""Crops: shapes, repeatability, geometry and probabilities; the loader whatever its workers."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_xcit.data.decode import BadImage
from ssl_xcit.data.module import CropDataset, MultiCropData, check_images, plain_loader
from ssl_xcit.data.multicrop import (
    MEAN,
    STD,
    TorchvisionMultiCrop,
    normalise,
    resize_center_crop,
    to_views,
)
from ssl_xcit.data.order import image_at
from ssl_xcit.data.sources import Files, Subset

SMALL = {"global_size": 32, "local_size": 16, "num_local": 3}


def gradient_image(height=90, width=120):
    """Red tells the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return pixels


def test_shapes_and_repeatability():
    augment = TorchvisionMultiCrop(**SMALL)
    image = gradient_image()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    large, small = augment(image, 17)
    assert torch.equal(before, torch.get_rng_state())
    assert large.shape == (2, 32, 32, 3)
    assert small.shape == (3, 16, 16, 3)
    assert large.dtype == small.dtype == np.uint8
    again, _ = augment(image, 17)
    other, _ = augment(image, 18)
    assert np.array_equal(large, again)
    assert not np.array_equal(large, other)
    assert TorchvisionMultiCrop(32, 16, 0)(image, 1)[1].shape == (0, 16, 16, 3)


def test_geometry_is_the_references():
    """The crop's extent is read off a gradient: scale and aspect as drawn, half of them flipped."""
    plain = {
        "jitter_prob": 0.0,
        "grey_prob": 0.0,
        "blur_prob": [0, 0, 0],
        "solarise_prob": [0, 0, 0],
    }
    augment = TorchvisionMultiCrop(64, 16, 0, global_scale=(0.2, 0.6), **plain)
    image = gradient_image(200, 200)
    shares, aspects, flips = [], [], 0
    for seed in range(300):
        crop = augment(image, seed)[0][0].astype(float)
        dx = (crop[:, 48:, 0].mean() - crop[:, :16, 0].mean()) / 48 * 64 / 255
        dy = (crop[48:, :, 1].mean() - crop[:16, :, 1].mean()) / 48 * 64 / 255
        flips += dx < 0
        shares.append(abs(dx) * dy)
        aspects.append(abs(dx) / dy)
    assert 0.18 < min(shares) < 0.23
    assert 0.55 < max(shares) < 0.62
    assert 0.72 < min(aspects) < 0.80
    assert 1.25 < max(aspects) < 1.38
    assert abs(np.mean(np.log(aspects))) < 0.05
    assert 110 < flips < 190


def test_photometry_has_the_published_probabilities():
    """Grey 0.2, solarise 0.2 on the second global view only, by their traces in flat crops."""
    augment = TorchvisionMultiCrop(8, 4, 1, jitter_prob=0.0)
    image = np.full((20, 20, 3), (200, 60, 30), np.uint8)
    first, second, local = [], [], []
    for seed in range(500):
        large, small = augment(image, seed)
        first.append(large[0, 4, 4]), second.append(large[1, 4, 4]), local.append(small[0, 2, 2])

    def grey(crops):
        return np.mean([c.max() - c.min() == 0 for c in crops])

    def solarised(crops):  # 200 -> 55, grey 99 stays
        return np.mean([c[0] == 55 for c in crops])

    for crops in (first, second, local):
        assert 0.15 < grey(crops) < 0.25
    assert solarised(first) == solarised(local) == 0.0
    assert 0.11 < solarised(second) < 0.21  # 0.2 x 0.8 that are not grey


def test_normalise_is_imagenets_and_keeps_channels_last():
    crops = torch.randint(0, 256, (4, 2, 5, 5, 3), dtype=torch.uint8)  # B V h w 3
    views = to_views(crops)
    assert views.shape == (2, 4, 3, 5, 5)
    expected = (crops.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    assert torch.allclose(views.double(), expected.permute(1, 0, 4, 2, 3), atol=1e-5)
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert normalise(torch.zeros(3, 2, 2, dtype=torch.uint8)).dtype == torch.float32


def test_resize_center_crop_is_torchvisions():
    from torchvision.transforms import v2

    reference = v2.Compose([v2.Resize(48, v2.InterpolationMode.BICUBIC), v2.CenterCrop(40)])
    for height, width in ((90, 120), (130, 64), (48, 48)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        ours = resize_center_crop(image, 48, 40)
        theirs = np.asarray(reference(Image.fromarray(image)))
        assert ours.shape == (40, 40, 3)
        assert np.array_equal(ours, theirs)


def batches(source, workers, start_step=0, steps=4):
    data = MultiCropData(
        source, TorchvisionMultiCrop(**SMALL), 6, steps, seed=3, num_workers=workers
    )
    data.load_state_dict({"step": start_step})
    return list(data.train_dataloader())


def test_crops_do_not_depend_on_workers_or_on_where_a_run_began(photos_pair):
    source = Subset(photos_pair.train, np.arange(0, 40))
    alone, shared = batches(source, 0), batches(source, 2)
    assert len(alone) == len(shared) == 4
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.local_crops, b.local_crops)
    resumed = batches(source, 0, start_step=2)
    assert [b.indices.tolist() for b in resumed] == [b.indices.tolist() for b in alone[2:]]
    assert torch.equal(resumed[0].local_crops, alone[2].local_crops)
    order = [i for b in alone for i in b.indices.tolist()]
    assert order == [image_at(3, position, 40) for position in range(24)]


def test_a_bad_image_costs_a_line(tmp_path, caplog):
    Image.fromarray(gradient_image()).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    source = Files([str(tmp_path / "bad.jpg"), str(tmp_path / "good.png")])
    with caplog.at_level(logging.WARNING):
        batch = CropDataset(source, TorchvisionMultiCrop(**SMALL), seed=0)
        crops = [batch[position] for position in range(2)]
        pixels, good = next(iter(plain_loader(source, 48, 48, 2, 0)))
    assert all(c.global_crops.shape == (2, 32, 32, 3) for c in crops)
    assert good.tolist() == [False, True]  # for evaluation nothing stands in
    assert pixels[1].any()
    assert "bad image replaced by its neighbour" in caplog.text
    assert "bad image left out" in caplog.text


def test_nothing_readable(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    source = Files([str(tmp_path / f"{i}.png") for i in range(3)])
    with pytest.raises(ValueError, match=r"none of 3 images tried can be read.*0.png"):
        check_images(source, 32)
    with pytest.raises(BadImage, match="in a row"):
        CropDataset(source, TorchvisionMultiCrop(**SMALL), seed=0)[0]


def test_small_images_are_said_once(photos_pair, caplog):
    check_images(photos_pair.test, 64)
    assert not caplog.text
    check_images(photos_pair.test, 224)
    assert caplog.text.count("smaller than the crop of 224") == 1


@pytest.mark.parametrize(
    "options", [{"global_scale": (0.5, 0.4)}, {"local_size": 0}, {"num_local": -1}]
)
def test_bad_crop_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TorchvisionMultiCrop(**options)
