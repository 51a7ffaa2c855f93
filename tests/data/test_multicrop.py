"""Crops of the reference: shapes, repeatability, geometry and probabilities; normalisation."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from samples import PLAIN, SMALL, encoded, gradient_image, peak_memory
from torchvision.transforms import v2

from ssl_xcit.data.decode import open_picture
from ssl_xcit.data.fused import FusedMultiCrop
from ssl_xcit.data.multicrop import SEQUENCES, Recipe, TorchvisionMultiCrop
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise, resize_center_crop, to_views


@pytest.mark.parametrize("kind", [TorchvisionMultiCrop, FusedMultiCrop])
def test_same_seed_same_crops_and_torch_is_left_alone(kind):
    augment, picture = kind(**SMALL), open_picture(gradient_image())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    large, small = augment(picture, 17)
    assert torch.equal(before, torch.get_rng_state())
    assert large.shape == (2, 32, 32, 3)
    assert small.shape == (3, 16, 16, 3)
    assert large.dtype == small.dtype == np.uint8
    assert all(map(np.array_equal, augment(picture, 17), (large, small)))
    assert not any(map(np.array_equal, augment(picture, 18), (large, small)))
    assert kind(32, 16, 0)(picture, 1)[1].shape == (0, 16, 16, 3)


def test_geometry_is_the_references():
    """The crop's extent is read off a gradient: scale and aspect as drawn, half of them flipped."""
    augment = TorchvisionMultiCrop(64, 16, 0, global_scale=(0.2, 0.6), **PLAIN)
    picture = open_picture(gradient_image(200, 200))
    shares, aspects, flips = [], [], 0
    for seed in range(300):
        crop = augment(picture, seed)[0][0].astype(float)
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
    picture = open_picture(np.full((20, 20, 3), (200, 60, 30), np.uint8))
    drawn = [augment(picture, seed) for seed in range(500)]
    pixels = np.array([[*large[:, 4, 4], small[0, 2, 2]] for large, small in drawn])
    grey = (np.ptp(pixels, axis=-1) == 0).mean(0)  # of both global views and the local one
    assert ((grey > 0.15) & (grey < 0.25)).all()
    solarised = (pixels[..., 0] == 55).mean(0)  # 200 -> 55, grey 99 stays
    assert solarised[0] == solarised[2] == 0.0
    assert 0.11 < solarised[1] < 0.21  # 0.2 x 0.8 that are not grey


def test_normalise_is_imagenets_and_keeps_channels_last():
    crops = torch.randint(0, 256, (4, 2, 5, 5, 3), dtype=torch.uint8)  # B V h w 3
    views = to_views(crops, RGB)
    assert views.shape == (2, 4, 3, 5, 5)
    mean, std = (torch.tensor(values).double() for values in (RGB.mean, RGB.std))
    expected = (crops.double() / 255 - mean) / std
    assert torch.allclose(views.double(), expected.permute(1, 0, 4, 2, 3), atol=1e-5)
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert normalise(torch.zeros(3, 2, 2, dtype=torch.uint8), RGB).dtype == torch.float32


def test_resize_center_crop_is_torchvisions():
    reference = v2.Compose([v2.Resize(48, v2.InterpolationMode.BICUBIC), v2.CenterCrop(40)])
    for height, width in ((90, 120), (130, 64), (48, 48)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        ours = resize_center_crop(image, 48, 40)
        theirs = np.asarray(reference(Image.fromarray(image)))
        assert ours.shape == (40, 40, 3)
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 700, 3), (700, 1, 3), (3, 400, 3), (5, 300, 1), (60, 80, 3)])
@pytest.mark.parametrize("sides", [(48, 40), (32, 48)])  # the crop may be larger than the image
def test_a_thin_image_is_cropped_before_it_is_enlarged(shape, sides, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    whole = resize_center_crop(image, *sides)
    monkeypatch.setattr("ssl_xcit.data.preprocess.MAX_RESIZED", 0)
    cropped = resize_center_crop(image, *sides)
    assert cropped.shape == whole.shape
    assert np.abs(cropped.astype(int) - whole).max() <= 1


def test_a_png_of_a_hundred_bytes_takes_no_memory_in_evaluation():
    """60,000 x 1 pixels: with its short side at 256 it would have 16 GB as float32."""
    content = encoded(Image.new("RGB", (60_000, 1), (9, 8, 7)))
    use = "assert (resize_center_crop(decode(content), 256, 224) == [9, 8, 7]).all()"
    assert peak_memory(content, use) < 50_000  # KiB


def test_blur_is_in_proportion_to_the_crops():
    assert Recipe(global_size=224).blur_std() == (0.1, 2.0)
    assert Recipe(global_size=56, blur_radius=(0.2, 1.0)).blur_std() == (0.05, 0.25)
    assert Recipe(stages=[{"until": 0.5, "global_size": 112}]).at(0.1).blur_std() == (0.05, 1.0)


@pytest.mark.parametrize("kind", [FusedMultiCrop, TorchvisionMultiCrop])
def test_numbers_from_yaml_are_plain_tuples(kind):
    """To read one of OmegaConf's lists takes as long as to make a crop."""
    numbers = {name: list(getattr(kind(), name)) for name in SEQUENCES}
    augment = kind(**OmegaConf.create(numbers), stages=[{"until": 0.5, "num_local": 1}])
    for recipe in (augment, augment.at(0.2)):
        for name, values in numbers.items():
            assert type(getattr(recipe, name)) is tuple
            assert list(getattr(recipe, name)) == values
