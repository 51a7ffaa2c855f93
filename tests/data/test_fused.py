"""The fast crops against Pillow and torchvision: pixels where they must agree, else statistics."""

import itertools

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from samples import PLAIN, channels, encoded
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from ssl_xcit.data import fused
from ssl_xcit.data.decode import decode, open_picture
from ssl_xcit.data.fused import FusedMultiCrop, Views, cut, draw_boxes, finish, recolour
from ssl_xcit.data.multicrop import TorchvisionMultiCrop
from ssl_xcit.data.photos import photographs


@pytest.fixture(scope="module")
def real_photos():
    """Colourful ones, 500 x 375."""
    named = dict(photographs())
    images = [decode(named[n].read_bytes()) for n in ("astronaut", "chelsea", "coffee", "flower")]
    return [cv2.resize(image, (500, 375), interpolation=cv2.INTER_AREA) for image in images]


def view(**changes):
    """One that changes nothing, but for `changes`."""
    off = np.array([False])
    same = {
        "boxes": np.zeros((1, 4), np.int64), "flip": off, "jitter": off, "grey": off,
        "order": np.array([[0, 1, 2, 3]]), "factors": np.array([[1.0, 1.0, 1.0, 0.0]]),
        "blur": np.zeros(1), "solarise": off,
    }  # fmt: skip
    return Views(**{**same, **{name: np.array([value]) for name, value in changes.items()}})


@pytest.mark.parametrize("size", [224, 96, 33])
@pytest.mark.parametrize("box", [(0, 0, 375, 500), (10, 20, 210, 215), (100, 100, 150, 190)])
def test_resize_is_pillows_bicubic(real_photos, box, size):
    top, left, bottom, right = box
    crop = Image.fromarray(real_photos[0][top:bottom, left:right])
    expected = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(cut(real_photos[0], box, size).astype(int) - expected)
    assert difference.max() <= 2  # of 255, by rounding between the two passes
    assert difference.mean() < 0.02


def colour(step, factor):
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = factor
    return view(jitter=True, factors=factors)


@pytest.mark.parametrize(
    ("step", "factors", "reference"),
    [
        (fused.BRIGHTNESS, (0.6, 1.4), F.adjust_brightness),
        (fused.CONTRAST, (0.6, 1.4), F.adjust_contrast),
        (fused.SATURATION, (0.8, 1.2), F.adjust_saturation),
    ],
)
def test_each_change_of_colour_is_torchvisions(real_photos, step, factors, reference):
    """To a grey level."""
    for image, factor in itertools.product(real_photos, factors):
        ours = recolour([image], colour(step, factor))[0].astype(int)
        theirs = np.asarray(reference(Image.fromarray(image), factor)).astype(int)
        assert np.abs(ours - theirs).mean() < 1.0
        assert np.abs(ours.mean((0, 1)) - theirs.mean((0, 1))).max() < 1.0


@pytest.mark.parametrize("turns", [0.1, 0.05, -0.05, -0.1])
def test_hue_turns_as_in_hsv(real_photos, turns):
    """By a matrix: HSV keeps the largest channel, and this the mean of the channels."""
    for image in real_photos:
        ours = recolour([image], colour(fused.HUE, turns))[0].astype(int)
        theirs = np.asarray(F.adjust_hue(Image.fromarray(image), turns)).astype(int)
        assert abs(ours.mean() - image.mean()) < 2.0  # but for clipping
        moved, wanted = (d - d.mean(-1, keepdims=True) for d in (ours - image, theirs - image))
        along = (moved * wanted).sum() / (wanted**2).sum()
        assert 0.7 < along < 1.3


def test_a_third_of_a_turn_of_hue_permutes_the_channels():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    turned = recolour([image], colour(fused.HUE, 1 / 3))[0]
    assert np.abs(turned.astype(int) - image[..., [2, 0, 1]]).max() <= 1
    reference = np.asarray(F.adjust_hue(Image.fromarray(image), 1 / 3)).astype(int)
    assert np.abs(turned - reference).mean() < 2


def test_the_matrix_is_the_steps_one_after_the_other():
    """In every drawn order, on values that nothing clips."""
    rng = np.random.default_rng(1)
    x = rng.uniform(90, 160, (200, 3))
    for seed in range(24):
        order, grey = np.random.default_rng(seed).permutation(4), seed % 2 == 0
        factors = [*rng.uniform(0.8, 1.2, 3), 0]
        drawn = view(jitter=True, order=order, factors=factors, grey=grey)
        matrix = fused.colour_matrices(drawn, x.mean(0, keepdims=True))[0]
        y = x
        for step in order:
            luma, f = y @ [[0.299], [0.587], [0.114]], factors[step]
            if step == fused.BRIGHTNESS:
                y = f * y
            elif step == fused.CONTRAST:
                y = f * y + (1 - f) * luma.mean()
            elif step == fused.SATURATION:
                y = f * y + (1 - f) * luma
        if grey:
            y = np.repeat(y @ [[0.299], [0.587], [0.114]], 3, axis=1)
        assert np.allclose(x @ matrix[:, :3].T + matrix[:, 3], y)


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.5, 2.0])
def test_blur_is_a_gaussian_as_pillows(real_photos, sigma):
    crop = np.ascontiguousarray(real_photos[1][:96, :96])
    ours = finish(crop, view(blur=sigma), 0).astype(int)
    theirs = np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(sigma))).astype(int)
    assert np.abs(ours - theirs).mean() < 1.0  # Pillow's is three box blurs


def test_flip_and_solarise_are_exact(real_photos):
    crop = np.ascontiguousarray(real_photos[2][:50, :60])
    flipped = finish(crop, view(flip=True), 0)
    assert np.array_equal(flipped, crop[:, ::-1])
    solarised = finish(crop, view(solarise=True), 0)
    assert np.array_equal(solarised, np.asarray(F.solarize(Image.fromarray(crop), 128)))


def boxes_of(seed, draws, height, width, scale):
    rng = np.random.default_rng(seed)
    numbers = rng.random((2, draws, 10)), rng.random((2, draws))
    return draw_boxes(height, width, np.tile(scale, (draws, 1)), *numbers[0], numbers[1])


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(scale):
    """Area, aspect and place over 4,000 draws: means within 4 standard errors."""
    height, width, draws = 375, 500, 4000
    ours = boxes_of(0, draws, height, width, scale).astype(float)
    image = torch.empty(3, height, width, device="meta")
    crop = v2.RandomResizedCrop(10, scale=scale)
    torch.manual_seed(0)
    drawn = [crop.make_params([image]) for _ in range(draws)]
    theirs = np.array([[d[k] for k in ("top", "left", "height", "width")] for d in drawn], float)

    def facts(b):
        area, aspect = b[:, 2] * b[:, 3] / (height * width), np.log(b[:, 3] / b[:, 2])
        centre = (b[:, :2] + b[:, 2:] / 2) / [height, width]
        return np.column_stack((area, aspect, np.abs(aspect), centre, np.abs(centre - 0.5)))

    a, b = facts(ours), facts(theirs)
    error = np.sqrt((a.var(0) + b.var(0)) / draws)
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
    assert np.allclose(a.std(0), b.std(0), rtol=0.06)


def test_boxes_of_odd_images_fall_back_to_the_centre():
    for height, width, expected in (
        (10, 1000, [0, 493, 10, 13]), (1000, 10, [493, 0, 13, 10]), (1, 1, [0, 0, 1, 1]),
    ):  # fmt: skip
        boxes = boxes_of(0, 50, height, width, (0.9, 1.0))
        assert expected in boxes.tolist()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= height).all()
        assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_drawn_numbers_have_the_recipes_probabilities():
    augment = FusedMultiCrop(num_local=2)
    drawn = [augment.draw(100, 100, seed) for seed in range(1500)]

    def share(name):
        return np.mean([getattr(v, name) > 0 for v in drawn], axis=0)

    for name, expected in (
        ("flip", 0.5), ("jitter", 0.8), ("grey", 0.2),
        ("blur", [1.0, 0.1, 0.5, 0.5]), ("solarise", [0, 0.2, 0, 0]),
    ):  # fmt: skip
        assert np.allclose(share(name), expected, atol=0.05)
    factors = np.array([v.factors for v in drawn]).reshape(-1, 4)
    assert np.allclose(factors.min(0), [0.6, 0.6, 0.8, -0.1], atol=0.01)
    assert np.allclose(factors.max(0), [1.4, 1.4, 1.2, 0.1], atol=0.01)
    assert abs(np.mean([v.blur[0] for v in drawn]) - 1.05) < 0.06
    assert len({tuple(o) for v in drawn for o in v.order.tolist()}) == 24


def facts_of(crops):
    """Mean, deviation, correlation of channels, and gradient energy of each crop."""
    x = np.stack(crops).astype(np.float64) / 255  # (n, h, w, 3)
    mean, std = x.mean((1, 2, 3)), x.std((1, 2)).mean(-1)
    flat = x.reshape(len(x), -1, 3)
    centred = flat - flat.mean(1, keepdims=True)
    norms = np.sqrt((centred**2).sum(1)) + 1e-9
    red_blue = (centred[..., 0] * centred[..., 2]).sum(1) / (norms[:, 0] * norms[:, 2])
    gradient = (np.diff(x, axis=1) ** 2).mean((1, 2, 3)) + (np.diff(x, axis=2) ** 2).mean((1, 2, 3))
    return np.column_stack((mean, std, red_blue, np.sqrt(gradient)))


@pytest.mark.slow
def test_crops_are_distributed_as_the_references(real_photos):
    """1,200 crops of each global kind and 2,400 local ones, blurred by 0.1 to 2 pixels."""
    recipe = {"global_size": 64, "local_size": 32, "num_local": 2, "blur_radius": (0.35, 7.0)}
    crops = []
    for augment in (FusedMultiCrop(**recipe), TorchvisionMultiCrop(**recipe)):
        views = [augment(open_picture(i), seed) for seed in range(300) for i in real_photos]
        globals_ = [[large[kind] for large, _ in views] for kind in (0, 1)]
        crops.append([*globals_, [crop for _, small in views for crop in small]])
    for ours, theirs in zip(*crops, strict=True):
        a, b = facts_of(ours), facts_of(theirs)
        mean, std, correlation, gradient = np.abs(a.mean(0) - b.mean(0))
        assert mean < 0.012
        assert std < 0.008
        assert correlation < 0.02
        assert gradient < 0.05 * b[:, 3].mean()
        assert np.allclose(a.std(0), b.std(0), rtol=0.2)  # of correlation; of others under 0.1


def test_large_jpegs_are_decoded_smaller_without_losing_resolution(real_photos):
    big = cv2.resize(real_photos[0], (2000, 1500), interpolation=cv2.INTER_CUBIC)
    content = encoded(big, "JPEG", quality=95)
    augment = FusedMultiCrop(224, 96, 2, **PLAIN)
    shapes, errors = set(), []
    for seed in range(20):
        picture = open_picture(content)
        assert (picture.height, picture.width) == (1500, 2000)
        crops = augment(picture, seed)
        boxes = augment.draw(1500, 2000, seed).boxes
        height, width, _ = picture.pixels().shape
        shapes.add(height)
        reduced = boxes[:, 2:] * [height / 1500, width / 2000]
        assert (reduced.round().min(1) >= [224, 224, 96, 96]).all()
        whole = augment(open_picture(decode(content)), seed)
        errors.append(np.abs(crops[0].astype(int) - whole[0]).mean())
    assert max(shapes) < 1500
    assert np.mean(errors) < 3.0
    for share, size in ((1.9, (1500, 2000)), (2.0, (750, 1000)), (100.0, (188, 250))):
        assert open_picture(content).pixels(share).shape == (*size, 3)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_other_channels_have_no_colour(count):
    image = np.random.default_rng(count).integers(0, 256, (9, 9, count), np.uint8)
    image = cv2.resize(image, (60, 50)).reshape(50, 60, count)
    augment = FusedMultiCrop(32, 16, 2)
    assert "no saturation" in augment.check(count)
    assert augment.check(3) is None
    large, small = augment(open_picture(image, channels(count)), 3)
    assert large.shape == (2, 32, 32, count)
    assert small.shape == (2, 16, 16, count)
    with pytest.raises(ValueError, match="augment=fused"):
        TorchvisionMultiCrop().check(count)
    # each channel is treated as if it were alone, but for the mean that contrast is about
    plain = FusedMultiCrop(32, 16, 2, jitter_prob=0.0)
    whole = plain(open_picture(image, channels(count)), 3)[0]
    alone = plain(open_picture(image[..., :1], channels(1)), 3)[0]
    assert np.abs(whole[..., :1].astype(int) - alone).max() <= 1
