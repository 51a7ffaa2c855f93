"""Resize the images of dense tasks, as mmcv does it: bilinearly, without anti-aliasing."""

import cv2
import numpy as np
from jaxtyping import UInt8


def resized_pixels(
    pixels: UInt8[np.ndarray, "_ _ channels"], size: tuple[int, int]
) -> UInt8[np.ndarray, "_ _ channels"]:
    """Pixels at (height, width)."""
    if size == pixels.shape[:2]:
        return pixels
    made = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    return made.reshape(*size, pixels.shape[2])  # one channel is left out by OpenCV
