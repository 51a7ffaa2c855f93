"""What images become, and what is refused."""

import io
import os
import struct

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from samples import HEIC, channels, encoded, peak_memory, photo, png_of_chunks, saved

from ssl_xcit.data import decode as decoding
from ssl_xcit.data import formats
from ssl_xcit.data.decode import decode, open_picture
from ssl_xcit.data.picture import RGB, BadImage, DeepRange, dark_images
from ssl_xcit.data.preprocess import Preprocess, of_weights


def tiff(array, **options):
    options = {"photometric": "minisblack", "planarconfig": "contig", **options}
    return saved(tifffile.imwrite, array, **options)


def npy(array):
    return saved(np.save, array)


RAMP = np.arange(10, dtype=np.uint8).reshape(1, 2, 5)
DEEP = np.array([[[0, 100, 5000, 9999, 10000], [10001, 65535, 2500, 7500, 20]]], np.uint16)
SCALED = [[[0, 3, 128, 255, 255], [255, 255, 64, 191, 1]]]
GREY16 = encoded(np.array([[0, 256, 32768, 65535]], np.uint16))
TWO = np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)
HALF_CLEAR = encoded(np.array([[[0, 0, 0, 0], [10, 20, 30, 255]]], np.uint8))
DEEP_PNG = cv2.imencode(".png", DEEP[..., 2::-1])[1].tobytes()
PIXELS = {  # content, preprocessing, pixels
    "grey16": (GREY16, RGB, [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]),
    "grey": (encoded(np.array([[0, 77]], np.uint8)), RGB, [[[0] * 3, [77] * 3]]),
    "palette": (encoded(Image.fromarray(TWO).quantize(2)), RGB, TWO.tolist()),
    "alpha": (HALF_CLEAR, RGB, [[[255, 255, 255], [10, 20, 30]]]),
    "bilevel": (encoded(Image.new("1", (1, 1), 1)), RGB, [[[255, 255, 255]]]),
    "5-channel tiff": (tiff(RAMP), channels(5), RAMP.tolist()),
    "compressed": (tiff(RAMP, compression="zlib"), channels(5), RAMP.tolist()),
    "16-bit tiff": (tiff(DEEP), channels(5, value_range=(0, 10000)), SCALED),
    "float tiff": (tiff((DEEP / 1e4).astype("f4")), channels(5, value_range=(0.0, 1.0)), SCALED),
    "npy": (npy(RAMP), channels(5), RAMP.tolist()),
    "npy planes": (npy(np.moveaxis(RAMP, -1, 0)), channels(5), RAMP.tolist()),
    "grey npy": (npy(RAMP[..., 0]), RGB, [[[0] * 3, [5] * 3]]),
    "bool npy": (npy(np.array([[True, False]])), channels(1), [[[255], [0]]]),
    "rgb npy as grey": (npy(RAMP[..., :3]), channels(1), [[[1], [6]]]),
    "grey16 as grey": (GREY16, channels(1), [[[0], [1], [128], [255]]]),
    "grey16 in range": (GREY16, channels(1, value_range=(0, 512)), [[[0], [128], [255], [255]]]),
    "rgb as grey": (encoded(Image.new("RGB", (1, 1), (10, 200, 90))), channels(1), [[[131]]]),
    "on a colour": (HALF_CLEAR, Preprocess(background=(5, 6, 7)), [[[5, 6, 7], [10, 20, 30]]]),
    "alpha as a channel": (HALF_CLEAR, channels(4), [[[0, 0, 0, 0], [10, 20, 30, 255]]]),
    "array": (RAMP[..., :3], RGB, RAMP[..., :3].tolist()),
    "16-bit png": (DEEP_PNG, Preprocess(value_range=(0, 10000)), [[[0, 3, 128], [255, 255, 64]]]),
    "16-bit array": (DEEP[..., 0], channels(1, value_range=(0, 10000)), [[[0], [255]]]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIXELS)
def test_golden_pixels(name):
    content, preprocess, expected = PIXELS[name]
    pixels = decode(content, preprocess)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == expected


def bomb(side):
    """A PNG whose header claims side x side pixels."""
    return png_of_chunks((side, side, 8, 2), (b"IDAT", b""))


def webp_bomb():
    """A canvas of 16,384 x 16,384 pixels by its header."""
    header = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (16_383).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(header)) + b"WEBP" + header


GOOD = encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
BAD = {
    "empty": (b"", "empty"),
    "html": (b"<html>404</html>", "cannot identify"),
    "png": (GOOD[:1000], "truncated"),
    "jpeg": (encoded(Image.new("RGB", (200, 200)), "JPEG")[:700], "truncated"),
    "crc": (GOOD[:200] + bytes([GOOD[200] ^ 1]) + GOOD[201:], "broken|CRC|crc"),
    "bomb": (bomb(20_000), "more than 64,000,000 pixels"),
    "small bomb": (bomb(10_000), "10000 x 10000"),
    "webp bomb": (webp_bomb(), "more than|Error"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
    "short npy": (npy(RAMP[..., :3])[:-1], "truncated: 5 of 6 bytes"),
    "pickled npy": (npy(np.zeros((2, 2, 3), object)), "type object is no image"),
    "4-channel npy": (npy(np.zeros((2, 2, 4))), "channels=3"),
    "float npy": (npy(np.zeros((2, 2, 3))), "value_range"),
    "flat npy": (npy(np.zeros(4, np.uint8)), "is no image"),
    "5-channel tiff": (tiff(RAMP), "channels=3"),
    "float tiff": (encoded(np.zeros((2, 2), np.float32), "TIFF"), "value_range"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images(name):
    content, reason = BAD[name]
    with pytest.raises(BadImage, match=reason) as refusal:
        open_picture(content).pixels()
    assert "0x" not in str(refusal.value)  # reasons are the same in every process


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
@pytest.mark.parametrize("progressive", [False, True], ids=["in rows", "progressive"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_has_the_pixels_that_pillow_gives(subsampling, progressive, shrink):
    draw = np.random.default_rng(0)
    for height, width in ((96, 130), (61, 33), (1, 50), (90, 7)):
        smooth = cv2.resize(draw.integers(0, 256, (4, 4, 3), np.uint8), (width, height))
        options = {"quality": 80, "subsampling": subsampling, "progressive": progressive}
        content = encoded(smooth, "JPEG", **options)
        image = Image.open(io.BytesIO(content))
        if shrink > 1:
            image.draft(None, (image.width // shrink or 1, image.height // shrink or 1))
        sooner = decoding.jpeg_pixels(content, *image.size)
        assert (sooner is not None) == (max(image.size) > 8)
        assert np.array_equal(open_picture(content).pixels(shrink), np.asarray(image))


def test_a_damaged_jpeg_that_pillow_takes_is_taken(capfd):
    content = bytearray(photo(0, 64, "JPEG"))
    content[-200:-100] = bytes(100)
    assert decoding.jpeg_pixels(bytes(content), 64, 64) is None
    image = Image.open(io.BytesIO(content))
    assert np.array_equal(decode(bytes(content)), np.asarray(image))
    assert capfd.readouterr() == ("", "")


def test_the_largest_image_takes_little_more_than_itself():
    """8,000 x 7,900 pixels with transparency: under the limit, 253 MB as Pillow holds it."""
    content = encoded(Image.new("LA", (8000, 7900), (0, 0)))
    assert peak_memory(content, "assert decode(content).mean() == 255") < 750_000  # KiB


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
            decoding.read_image(tmp_path / name)


def test_heic_named_jpg_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.decode.readable_formats", lambda: formats.FORMATS)
    with pytest.raises(BadImage, match=r"HEIC, which needs pillow-heif: pip install"):
        decode(HEIC)


def test_twelve_bits_in_sixteen_are_noticed():
    dark = [DeepRange(3789, 65535), DeepRange(120, 65535)]
    assert "above 4095 of 65535" in dark_images(dark, RGB)
    assert "preprocess.value_range=[0,4095]" in dark_images(dark, RGB)
    assert dark_images(dark, Preprocess(value_range=(0, 4095))) is None
    assert dark_images([*dark, DeepRange(60_000, 65535)], RGB) is None
    assert dark_images([], RGB) is None
    assert "value_range=[0,255]" in dark_images([DeepRange(3, 65535)], RGB)
    assert open_picture(np.full((4, 4), 900, np.uint16)).deep == (900, 65535)  # arrays are too
