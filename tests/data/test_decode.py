"""What images become, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_xcit.data.decode import BadImage, decode, read_image


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


def bomb(side: int) -> bytes:
    """A PNG whose header claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0)


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
    ],
    ids=["empty", "html", "png", "jpeg", "crc", "bomb", "small bomb"],
)
def test_bad_images(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode(content)


def test_missing_file(tmp_path):
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "none.png")
