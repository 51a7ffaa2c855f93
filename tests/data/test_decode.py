"""What images become, and what is refused."""

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from samples import HEIC, peak_memory

from ssl_xcit.data import formats
from ssl_xcit.data.decode import (
    RGB,
    BadImage,
    DeepRange,
    dark_images,
    decode,
    open_picture,
    read_image,
)
from ssl_xcit.data.preprocess import Preprocess, of_weights


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def grey16():
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    return encoded(Image.fromarray(values))


def rotated():
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))  # red, green in a row
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return encoded(image, exif=exif)


def palette():
    return encoded(Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)).quantize(2))


def half_transparent():
    return encoded(Image.fromarray(np.array([[[0, 0, 0, 0], [10, 20, 30, 255]]], np.uint8)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (grey16(), [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]),
        (encoded(Image.fromarray(np.array([[0, 77]], np.uint8))), [[[0] * 3, [77] * 3]]),
        (rotated(), [[[255, 0, 0]], [[0, 255, 0]]]),
        (palette(), [[[9, 8, 7], [1, 2, 3]]]),
        (half_transparent(), [[[255, 255, 255], [10, 20, 30]]]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [[[255, 0, 0]]]),
        (encoded(Image.new("1", (1, 1), 1)), [[[255, 255, 255]]]),
    ],
    ids=["grey16", "grey", "exif", "palette", "alpha", "cmyk", "bilevel"],
)
def test_golden_pixels(content, expected):
    pixels = decode(content)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == expected


def tiff(array, **options):
    out = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "contig", **options}
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def deep_png(array):
    """16 bits a channel, as OpenCV writes it."""
    order = [2, 1, 0, 3][: array.shape[-1]]
    return cv2.imencode(".png", array[..., order])[1].tobytes()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def channels(count, **options):
    return Preprocess(count, (0.5,) * count, (0.2,) * count, **options)


RAMP = np.arange(10, dtype=np.uint8).reshape(1, 2, 5)
DEEP = np.array([[[0, 100, 5000, 9999, 10000], [10001, 65535, 2500, 7500, 20]]], np.uint16)
SCALED = [[[0, 3, 128, 255, 255], [255, 255, 64, 191, 1]]]


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        (tiff(RAMP), channels(5), RAMP.tolist()),
        (tiff(RAMP, compression="zlib"), channels(5), RAMP.tolist()),
        (tiff(DEEP), channels(5, value_range=(0, 10000)), SCALED),
        (tiff((DEEP / 10000).astype(np.float32)), channels(5, value_range=(0.0, 1.0)), SCALED),
        (npy(RAMP), channels(5), RAMP.tolist()),
        (npy(np.moveaxis(RAMP, -1, 0)), channels(5), RAMP.tolist()),
        (npy(RAMP[..., 0]), RGB, [[[0] * 3, [5] * 3]]),
        (npy(np.array([[True, False]])), channels(1), [[[255], [0]]]),
        (npy(RAMP[..., :3]), channels(1), [[[1], [6]]]),
        (grey16(), channels(1), [[[0], [1], [128], [255]]]),
        (grey16(), channels(1, value_range=(0, 512)), [[[0], [128], [255], [255]]]),
        (tiff(np.array([[0, 65535]], np.uint16)), RGB, [[[0] * 3, [255] * 3]]),
        (encoded(Image.new("RGB", (1, 1), (10, 200, 90))), channels(1), [[[131]]]),
        (half_transparent(), Preprocess(background=(5, 6, 7)), [[[5, 6, 7], [10, 20, 30]]]),
        (half_transparent(), channels(4), [[[0, 0, 0, 0], [10, 20, 30, 255]]]),
        (RAMP[..., :3], RGB, RAMP[..., :3].tolist()),
        (
            deep_png(DEEP[..., :3]),
            Preprocess(value_range=(0, 10000)),
            [[[0, 3, 128], [255, 255, 64]]],
        ),
        (deep_png(DEEP[..., :3]), RGB, [[[0, 0, 19], [39, 255, 10]]]),
        (tiff(DEEP[..., :3], photometric="rgb"), RGB, [[[0, 0, 19], [39, 255, 10]]]),
        (
            deep_png(np.array([[[9, 9, 9, 0], [0, 10000, 0, 65535]]], np.uint16)),
            Preprocess(value_range=(0, 65535)),
            [[[255] * 3, [0, 39, 0]]],
        ),
        (encoded(Image.new("RGBA", (1, 1), (1, 2, 3, 4)), "TIFF"), channels(4), [[[1, 2, 3, 4]]]),
        (DEEP[..., 0], channels(1, value_range=(0, 10000)), [[[0], [255]]]),
    ],
    ids=[
        "5-channel tiff", "compressed", "16-bit tiff", "float tiff", "npy", "npy planes",
        "grey npy", "bool npy", "rgb npy as grey", "grey16 as grey", "grey16 with range",
        "grey16 tiff", "rgb as grey", "alpha on a colour", "alpha as a channel", "array",
        "16-bit rgb png", "16-bit rgb png by default", "16-bit rgb tiff", "16-bit rgba png",
        "rgba tiff as four", "16-bit array",
    ],
)  # fmt: skip
def test_golden_pixels_of_other_channels_and_depths(content, settings, expected):
    pixels = decode(content, settings)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == expected


def bomb(side: int) -> bytes:
    """A PNG whose header claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0)


def webp_bomb() -> bytes:
    """A canvas of 16,384 x 16,384 pixels by its header."""
    header = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (16_383).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(header)) + b"WEBP" + header


def good() -> bytes:
    return encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    )


def bad_crc() -> bytes:
    content = bytearray(good())
    content[200] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "cannot identify"),
        (good()[:1000], "truncated"),
        (encoded(Image.new("RGB", (200, 200)), "JPEG")[:700], "truncated"),
        (bad_crc(), "broken|CRC|crc"),
        (bomb(20_000), "more than 64,000,000 pixels"),
        (bomb(10_000), "10000 x 10000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (npy(RAMP[..., :3])[:-1], "truncated: 5 of 6 bytes"),
        (npy(np.zeros((2, 2, 3), object)), "type object is no image"),
        (npy(np.zeros((2, 2, 4))), "channels=3"),
        (npy(np.zeros((2, 2, 3))), "value_range"),
        (npy(np.zeros(4, np.uint8)), "is no image"),
        (tiff(RAMP), "channels=3"),
        (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "value_range"),
        (webp_bomb(), "more than|Error"),
    ],
    ids=[
        "empty", "html", "png", "jpeg", "crc", "bomb", "small bomb", "postscript", "short npy",
        "pickled npy", "4-channel npy", "float npy", "flat npy", "5-channel tiff", "float tiff",
        "webp bomb",
    ],
)  # fmt: skip
def test_bad_images(content, reason):
    with pytest.raises(BadImage, match=reason) as refusal:
        open_picture(content).pixels()
    assert "0x" not in str(refusal.value)  # reasons are the same in every process


def test_a_bomb_takes_no_memory():
    """A real one: 14,000 x 14,000 white pixels in a small file, refused from its header."""
    use = """
try:
    decode(content)
except BadImage as error:
    assert "more than 64,000,000 pixels" in str(error)
else:
    raise AssertionError("it was decoded")
"""
    assert peak_memory(encoded(Image.new("1", (14_000, 14_000), 1)), use) < 100_000  # KiB


def test_preprocessing_comes_back_from_weights():
    preprocess = channels(5, value_range=(0, 10000), background=(1, 2, 3))
    assert of_weights(preprocess.of_weights()) == preprocess
    assert of_weights({}) == RGB
    for hostile in ({"max_pixels": 10**12}, {"channels": 3, "run": "x"}, {"mean": [1.0]},
                    {"mean": "x"}, {"std": [0.1, 0.2, 0.0]}, {"channels": 10**9}):  # fmt: skip
        with pytest.raises(ValueError, match="preprocess"):
            of_weights(hostile)
    with pytest.raises(ValueError, match=r"ssl-xcit stats preprocess\.channels=5"):
        Preprocess(5).statistics()


def test_what_is_no_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(10**12)
    for name, reason in (
        ("pipe.jpg", "not a regular file"), ("zero.png", "not a regular file"),
        ("sparse.jpg", "1,000,000,000,000 bytes, more than"), ("nul\0.png", "null"),
        (".", "not a regular file|Is a directory"), ("none.png", "No such file"),
    ):  # fmt: skip
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name)


def test_the_largest_image_takes_little_more_than_itself():
    """8,000 x 7,900 pixels with transparency: under the limit, 253 MB as Pillow holds it."""
    content = encoded(Image.new("LA", (8000, 7900), (0, 0)))
    assert peak_memory(content, "assert decode(content).mean() == 255") < 750_000  # KiB


def test_heic_named_jpg_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.decode.readable_formats", lambda: formats.FORMATS)
    with pytest.raises(BadImage, match=r"HEIC, which needs pillow-heif: pip install"):
        decode(HEIC)


def test_twelve_bits_in_sixteen_are_noticed():
    dark = [DeepRange(3789, 65535), DeepRange(120, 65535)]
    assert "above 4095 of 65535" in dark_images(dark, Preprocess())
    assert "preprocess.value_range=[0,4095]" in dark_images(dark, Preprocess())
    assert dark_images(dark, Preprocess(value_range=(0, 4095))) is None
    assert dark_images([*dark, DeepRange(60_000, 65535)], Preprocess()) is None
    assert dark_images([], Preprocess()) is None
    assert "value_range=[0,255]" in dark_images([DeepRange(3, 65535)], Preprocess())


def test_arrays_of_sixteen_bits_are_deep_too():
    assert open_picture(np.full((4, 4), 900, np.uint16)).deep == (900, 65535)
