"""Pictures of arrays: those in memory, `.npy` files, and TIFF files that Pillow does not read whole
(any channels, 8 to 32 bits, floating point).
"""

import io
import logging
import math
from typing import Any

import numpy as np

from ssl_xcit.data.picture import (
    COLOURS,
    BadImage,
    Picture,
    Samples,
    check_size,
    picture_of,
    too_large,
)
from ssl_xcit.data.preprocess import Preprocess

ORIENTATION = 274  # tag of EXIF and TIFF


def open_array(array: np.ndarray, preprocess: Preprocess, kind: str) -> Picture:
    """Open (H, W), (H, W, channels) or, with exactly the wanted channels, (channels, H, W)."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise BadImage(f"an array of shape {array.shape} is no image")
    wanted = {1: (1, 3), 3: (3, 1)}.get(preprocess.channels, (preprocess.channels,))
    if array.shape[-1] not in wanted and array.shape[0] == preprocess.channels:
        array = np.moveaxis(array, 0, -1)
    bits = 8 * array.dtype.itemsize
    return picture_of(Samples(array, 2**bits - 1), preprocess, kind)


def npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and type of a `.npy` file; what follows in the stream are its values."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise BadImage(f"numpy format {version}")
    return tuple(shape), dtype


def open_npy(content: bytes, preprocess: Preprocess) -> Picture:
    """Open a numpy file of (H, W), (H, W, channels) or (channels, H, W)."""
    stream = io.BytesIO(content)
    shape, dtype = npy_header(stream)
    if len(shape) == 4 and dtype.kind in "uif":
        raise BadImage(f"{shape[0]} images in one array: data.file=FILE.npy takes them")
    if not 2 <= len(shape) <= 3 or dtype.kind not in "uifb":
        raise BadImage(f"an array of shape {shape} and type {dtype} is no image")
    expected = dtype.itemsize * int(np.prod(shape, dtype=object))
    if expected != len(content) - stream.tell():
        raise BadImage(f"truncated: {len(content) - stream.tell():,} of {expected:,} bytes")
    array = np.load(io.BytesIO(content), allow_pickle=False)
    return open_array(array, preprocess, f"NPY {dtype}")


def open_tiff(content: bytes, preprocess: Preprocess) -> Picture:
    """Open what Pillow does not read whole: any channels, 8 to 32 bits, floating point."""
    import tifffile  # only here: it takes a tenth of a second to import

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong, BadImage says

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        if page.dtype is None or not 2 <= len(page.shape) <= 3:
            raise BadImage(f"a TIFF page of shape {page.shape} and type {page.dtype} is no image")
        check_size(page.imagewidth, page.imagelength, preprocess)
        if int(page.nbytes) > 8 * preprocess.max_pixels:
            raise too_large(preprocess, f": {page.shape}")
        whole = math.prod(page.chunked) == len(page.dataoffsets) and all(
            count > 0 and offset + count <= len(content)
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
        if not whole:  # tifffile would put zeros in its place
            raise BadImage("truncated")
        stack = file.series[0]  # of pages that belong together
        channels = "C" in stack.axes and len(page.shape) == 2
        if channels and stack.size * stack.dtype.itemsize > 8 * preprocess.max_pixels:
            raise too_large(preprocess, f": {stack.shape}")
        try:
            array = stack.asarray() if channels else page.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                raise BadImage(
                    f"{page.compression.name} needs imagecodecs: pip install 'ssl-xcit[tiff]'"
                ) from error
            raise
        if channels:  # of the first slice and the first moment
            kept = [axis for axis in stack.axes if axis in "CYX"]
            array = array[tuple(slice(None) if axis in "CYX" else 0 for axis in stack.axes)]
            bands = array.transpose([kept.index(axis) for axis in "YXC"])
            samples = Samples(bands, 2 ** (8 * array.dtype.itemsize) - 1)
            return picture_of(samples, preprocess, f"TIFF {page.dtype}")
        if array.ndim == 2:
            array = array[..., None]
        elif page.axes.startswith("S"):  # a plane a sample
            array = np.moveaxis(array, 0, -1)
        return picture_of(tiff_samples(page, array), preprocess, f"TIFF {page.dtype}")


def tiff_samples(page: Any, array: np.ndarray) -> Samples:
    """Return the (H, W, S) array of a TIFF's page with what the page's tags say of it.

    Raises:
        BadImage: colours that need more than these tags.
    """
    count = array.shape[-1]
    photometric = int(page.photometric)
    extra = [int(kind) for kind in page.extrasamples or ()]
    orientation = page.tags.get(ORIENTATION)
    turn = int(orientation.value) if orientation is not None else 1
    turn = turn if 1 <= turn <= 8 else 1
    top = 1 if array.dtype.kind == "f" else 2 ** int(page.bitspersample) - 1
    if photometric == 3 and count == 1 and page.colormap is not None:
        palette = (page.colormap >> 8).astype(np.uint8).T  # no range of values is meant for it
        return Samples(palette[array[..., 0]], 255, "rgb", orientation=turn)
    if photometric not in (0, 1, 2, 5):
        raise BadImage(f"a TIFF of colours {getattr(page.photometric, 'name', photometric)}")
    colours = {2: "rgb", 5: "cmyk"}.get(photometric, "grey")
    alpha = None
    if count < COLOURS[colours] or (colours == "grey" and count > 2):
        return Samples(array, top, orientation=turn)  # bands of a satellite, mostly
    if count > COLOURS[colours] and extra:
        alpha = {1: "premultiplied", 2: "straight"}.get(extra[0])
    return Samples(array, top, colours, photometric == 0, alpha, turn)
