"""Attention over images, computed patch by patch from its definition."""

import numpy as np

from ssl_xcit.eval.viz.pictures import ANCHORS

P = 8


def by_patch(frames):
    """Means of (N, h * P, w * P, 3) pixels, (N, h, w, 3)."""
    n, h, w, _ = frames.shape
    return frames.reshape(n, h // P, P, w // P, P, 3).mean((2, 4))


def close(got, expected, most=6.0):
    """Median and correlation of patch means: between patches the picture is smooth."""
    difference = np.abs(by_patch(got) - expected)
    assert np.median(difference) < most, np.median(difference)
    assert np.corrcoef(by_patch(got).ravel(), expected.ravel())[0, 1] > 0.97


def overlaid(frames, maps):
    """Expected patch means of attention (N, h, w) over the frames."""
    low, high = maps.min(), np.quantile(maps, 0.995)
    places = np.linspace(0, 1, len(ANCHORS))
    scaled = ((maps - low) / (high - low)).clip(0, 1)
    colours = [np.interp(scaled, places, column) for column in zip(*ANCHORS, strict=True)]
    grey = by_patch(frames) @ [0.299, 0.587, 0.114]
    return 0.65 * np.stack(colours, -1) + 0.35 * grey[..., None]
