"""Numbers, places and shapes of masks, against what is asked for."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from ssl_xcit.errors import UserError
from ssl_xcit.objectives.masking import patch_weights, random_block, sample_masks


def masks_of(seed, *arguments):
    return sample_masks(*arguments[:4], torch.Generator().manual_seed(seed), arguments[4])


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 3), (4, 9), (14, 14)])
def test_each_image_has_exactly_its_number(blocks, grid):
    for ratio in (0.0, 0.1, 0.3, 0.77, 1.0):
        masks = masks_of(0, 10, grid, (ratio, ratio), 1.0, blocks)
        assert masks.shape == (10, *grid)
        assert masks.dtype == torch.bool
        assert (masks.sum(dim=(1, 2)) == round(ratio * grid[0] * grid[1])).all()


@pytest.mark.parametrize("blocks", [False, True])
def test_ratios_are_spread_evenly_in_random_order(blocks):
    """One in each n-th part of the range, and images without a mask among them."""
    low, high, size = 0.1, 0.5, 100 * 100
    orders = set()
    for seed in range(2):
        shares = masks_of(seed, 20, (100, 100), (low, high), 0.5, blocks).sum(dim=(1, 2)) / size
        some = shares[shares > 0]
        assert len(some) == 10
        parts = (some.sort().values - low) / (high - low) * 10
        assert (parts > torch.arange(10) - 0.01).all()
        assert (parts < torch.arange(10) + 1.01).all()
        orders.add(tuple(shares.argsort().tolist()))
    assert len(orders) == 2


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("probability", [0.0, 0.5, 0.7, 1.0])
def test_every_image_has_a_mask_with_the_probability(num_images, probability):
    generator = torch.Generator().manual_seed(0)
    drawn = [
        sample_masks(num_images, (2, 2), (0.5, 0.5), probability, generator, False).any((1, 2))
        for _ in range(400)
    ]
    counts = torch.stack(drawn).float()
    error = (probability * (1 - probability) / 400) ** 0.5
    assert ((counts.mean(dim=0) - probability).abs() <= 4 * error).all()  # of each place
    wanted = probability * num_images
    assert ((counts.sum(dim=1) - wanted).abs() < 1.0).all()  # of each batch


def test_masks_are_those_of_the_generator():
    arguments = (6, (8, 8), (0.1, 0.5), 0.7, True)
    first = masks_of(3, *arguments)
    assert torch.equal(masks_of(3, *arguments), first)
    assert not torch.equal(masks_of(4, *arguments), first)
    generator = torch.Generator().manual_seed(3)
    one, two = (sample_masks(*arguments[:4], generator, True) for _ in range(2))
    assert torch.equal(one, first)
    assert not torch.equal(two, first)
    torch.manual_seed(3)
    assert torch.equal(sample_masks(*arguments[:4], None, True), first)


def test_parts_of_a_batch_have_the_masks_of_the_whole():
    arguments = ((8, 8), (0.1, 0.5), 0.7, True)
    whole = masks_of(3, 12, *arguments)
    for own in ([0, 1, 2], [5, 3], [11]):
        generator = torch.Generator().manual_seed(3)
        part = sample_masks(12, *arguments[:3], generator, True, np.array(own))
        assert torch.equal(part, whole[own])


def edges(masks):
    """Share of pairs of neighbouring patches of which one only is masked."""
    rows, columns = masks[:, 1:] ^ masks[:, :-1], masks[..., 1:] ^ masks[..., :-1]
    return (rows.sum() + columns.sum()).item() / (rows.numel() + columns.numel())


def test_single_patches_are_independent_and_blocks_are_not():
    single, blocks = (masks_of(0, 100, (14, 14), (0.4, 0.4), 1.0, kind) for kind in (False, True))
    share = 78 / 196
    assert edges(single) == pytest.approx(2 * share * (1 - share), rel=0.03)
    assert edges(blocks) < 0.4 * edges(single)


@pytest.mark.parametrize("blocks", [False, True])
def test_no_side_is_preferred(blocks):
    """Masks turned by half a turn or transposed are as likely: equal frequencies of each place."""
    frequency = masks_of(1, 2000, (6, 6), (0.2, 0.4), 1.0, blocks).double().mean(dim=0)
    assert frequency.min() > 0.1
    for other in (frequency.flip(0), frequency.flip(1), frequency.T):
        assert (frequency - other).abs().max() < 0.065  # 4.5 standard errors of a difference
    if not blocks:
        assert (frequency - frequency.mean()).abs().max() < 0.046


def test_blocks_have_beits_areas_and_aspects():
    """Areas uniform from (min(h, w) // 3)^2, aspects log-uniform in 0.3 to 1 / 0.3, on a grid so
    large that rounding to patches does not matter.
    """
    rng, shape, missing = np.random.default_rng(0), (3000, 6000), 4_000_000
    areas, aspects, places = [], [], []
    for draws in rng.random((2000, 4)).tolist():
        block = random_block(draws, missing, shape)
        if block is None:
            continue
        rows, columns = block
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert 0 <= rows.start < rows.stop <= 3000
        assert 0 <= columns.start < columns.stop <= 6000
        areas.append(height * width)
        aspects.append(height / width)
        places.append((rows.start / (3000 - height + 1), columns.start / (6000 - width + 1)))
    assert min(aspects) == pytest.approx(0.3, rel=0.02)
    assert min(areas) >= 0.998 * 1000**2
    assert max(areas) <= 1.002 * missing
    fitting = [area for area in areas if area < 2_700_000]  # at any aspect
    assert kstest(fitting, "uniform", (1e6, 1.7e6)).pvalue > 1e-3
    logs = [np.log(r) for a, r in zip(areas, aspects, strict=True) if a < 2_700_000]
    assert kstest(logs, "uniform", (np.log(0.3), -2 * np.log(0.3))).pvalue > 1e-3
    for along in zip(*places, strict=True):
        assert kstest(along, "uniform").pvalue > 1e-3


def test_a_block_larger_than_what_is_missing_is_cut():
    """The least area of a 12 x 12 grid is 16 patches; 7 are asked for, from one rectangle."""
    for mask in masks_of(0, 50, (12, 12), (0.05, 0.05), 1.0, True):
        rows, columns = mask.nonzero().T
        assert len(rows) == 7
        height, width = (int(side.max() - side.min()) + 1 for side in (rows, columns))
        assert height * width - 7 < max(height, width)


@pytest.mark.parametrize("ratio", [(0.5, 0.1), (-0.1, 0.5), (0.1, 1.1), (float("nan"), 0.5)])
def test_ratios_that_are_none(ratio):
    with pytest.raises(UserError, match=r"within 0 to 1, the lower one first"):
        masks_of(0, 2, (3, 3), ratio, 0.5, True)


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_probabilities_that_are_none(probability):
    with pytest.raises(UserError, match="mask probability"):
        masks_of(0, 2, (3, 3), (0.1, 0.5), probability, True)


def test_weights_sum_to_one_in_each_image_with_a_mask():
    masks = masks_of(0, 12, (5, 4), (0.1, 0.9), 0.6, False)
    weights, images = patch_weights(masks), masks.nonzero()[:, 0]
    assert weights.shape == images.shape
    sums = torch.zeros(12).index_add(0, images, weights)
    assert torch.allclose(sums, masks.any((1, 2)).float())
    for image, weight in zip(images, weights, strict=True):
        assert weight == 1 / masks[image].sum()
    assert patch_weights(torch.zeros(2, 3, 3, dtype=torch.bool)).shape == (0,)
