"""16-bit files of each format and property against 8-bit ones, and those against a reference."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from samples import channels, encoded, png_of_chunks, saved

from ssl_xcit.data.decode import decode, open_picture
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess

H, W = 6, 10
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (H, W, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (H, W, 1), np.uint8)
ALPHA[0] = 0
RGBA = np.concatenate((RGB, ALPHA), -1)
GREY = RGB[..., :1]
GREY_AS_RGB = np.repeat(GREY, 3, axis=-1)
BACKGROUND = (10, 200, 90)
ON_GREEN = Preprocess(background=BACKGROUND)
TWELVE_BITS = Preprocess(value_range=(0, 4095))
ORIENTATIONS = {  # as EXIF's standard tells: where the file's first row and first column lie
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def deep(array, bits=16):
    """The same intensities with more bits."""
    if bits == 8:
        return array
    return np.rint(array.astype(np.float64) / 255 * (2**bits - 1)).astype(np.uint16)


def png(array, orientation=1, transparent=None, colours=None):
    """With any bits, orientation (eXIf) and transparent colour (tRNS)."""
    array = array.reshape(H, W, -1)
    header = W, H, 8 * array.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[-1]]
    rows = array.astype(array.dtype.newbyteorder(">"))
    chunks = [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))]
    if transparent is not None:
        chunks.insert(0, (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    if orientation > 1:
        exif = Image.Exif()
        exif[274] = orientation
        chunks.insert(0, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    return png_of_chunks(header, *chunks, (b"IEND", b""))


def tiff(planarconfig="contig", **options):
    def write(array, orientation=1, extra=(), colours="rgb"):
        array, layout = array.reshape(H, W, -1), planarconfig
        if array.shape[-1] == 1:
            array, layout = array[..., 0], None
        elif layout == "separate":
            array = np.moveaxis(array, -1, 0)
        return saved(
            tifffile.imwrite, array, photometric=colours, extrasamples=extra or None,
            extratags=[(274, "H", 1, orientation, True)], metadata=None, planarconfig=layout,
            **options,
        )  # fmt: skip

    return write


TIFFS = {
    "TIFF": tiff(),
    "TIFF big-endian": tiff(byteorder=">"),
    "TIFF planar": tiff(planarconfig="separate"),
    "TIFF zlib": tiff(compression="zlib"),
    "TIFF tiles": tiff(tile=(16, 16)),
    "BigTIFF": tiff(bigtiff=True),
}
FORMATS = {"PNG": png, **TIFFS}
each_format = pytest.mark.parametrize("kind", FORMATS)
each_tiff = pytest.mark.parametrize("write", TIFFS.values(), ids=TIFFS)


def over_background(colours, alpha):
    share = alpha / 255.0
    return np.rint(colours * share + np.array(BACKGROUND) * (1 - share))


def close(one, two, levels=1):
    assert one.shape == two.shape
    assert np.abs(one.astype(int) - np.asarray(two).astype(int)).max() <= levels


def same_at_every_depth(write, array, expected, levels=1, **options):
    """The 8-bit file is the picture, and the 16-bit file is that of 8 bits."""
    eight = decode(write(array, **options), ON_GREEN)
    close(eight, expected, levels)
    close(decode(write(deep(array), **options), ON_GREEN), eight, levels)


@each_format
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation(kind, orientation):
    turn, options = ORIENTATIONS[orientation], {"orientation": orientation}
    same_at_every_depth(FORMATS[kind], RGB, turn(RGB), 0, **options)
    same_at_every_depth(FORMATS[kind], GREY, turn(GREY_AS_RGB), 0, colours="minisblack", **options)


@each_format
def test_straight_alpha(kind):
    extra = {"extra": ["unassalpha"]} if kind != "PNG" else {}
    same_at_every_depth(FORMATS[kind], RGBA, over_background(RGB, ALPHA), **extra)
    grey, expected = np.concatenate((GREY, ALPHA), -1), over_background(GREY_AS_RGB, ALPHA)
    same_at_every_depth(FORMATS[kind], grey, expected, **extra, colours="minisblack")


@each_tiff
@pytest.mark.parametrize(("colours", "picture"), [("rgb", RGB), ("minisblack", GREY)])
def test_premultiplied_alpha(write, colours, picture):
    alpha = np.maximum(ALPHA, 64)  # below, 8 bits of a premultiplied colour are a few levels
    alpha[0] = 0
    stored = np.concatenate((np.rint(picture * (alpha / 255.0)).astype(np.uint8), alpha), -1)
    expected = over_background(np.broadcast_to(picture, RGB.shape), alpha)
    same_at_every_depth(write, stored, expected, 2, extra=["assocalpha"], colours=colours)


@each_tiff
def test_a_fourth_band_is_no_alpha(write):
    same_at_every_depth(write, RGBA, RGB, 0, extra=["unspecified"])
    five = np.concatenate((RGBA, ALPHA), -1)
    same_at_every_depth(write, five, RGB, 0, extra=["unspecified"] * 2)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_fourth_band_that_the_file_does_not_mention(bits):
    """Without the tag ExtraSamples, which the format demands; Pillow takes it for alpha."""
    stored = np.concatenate((RGB, np.zeros_like(ALPHA)), -1)
    content = bytearray(tiff()(deep(stored, bits), extra=["unassalpha"]))
    at = content.find(struct.pack("<HH", 338, 3))
    assert at > 0
    content[at : at + 2] = struct.pack("<H", 339)  # SampleFormat instead: 2 would be signed
    content[at + 8 : at + 10] = struct.pack("<H", 1)
    close(decode(bytes(content), ON_GREEN), RGB, 0)


@each_tiff
def test_cmyk(write):
    ink = np.concatenate((RGB, ALPHA // 2), -1)
    expected = np.rint((255 - RGB.astype(float)) * (255 - (ALPHA // 2).astype(float)) / 255)
    same_at_every_depth(write, ink, expected, colours="separated")
    same_at_every_depth(write, ink, np.rot90(expected, -1), colours="separated", orientation=6)


@each_tiff
def test_white_is_zero(write):
    same_at_every_depth(write, GREY, 255 - GREY_AS_RGB, 0, colours="miniswhite")
    content = write(deep(GREY) // 16, colours="miniswhite")  # twelve bits in sixteen
    close(decode(content, TWELVE_BITS), 255 - GREY_AS_RGB)


def test_palettes():
    """16-bit colours of 8-bit and of 16-bit indices."""
    colours = RNG.integers(0, 256, (3, 256), np.uint8)
    indices = RNG.integers(0, 256, (H, W), np.uint8)
    expected, table = colours.T[indices], colours.astype(np.uint16) * 257
    content = saved(tifffile.imwrite, indices, photometric="palette", colormap=table)
    close(decode(content), expected, 0)
    wide, table = indices.astype(np.uint16) * 256, np.repeat(table, 256, axis=1)
    content = saved(tifffile.imwrite, wide, photometric="palette", colormap=table)
    for preprocess in (Preprocess(), TWELVE_BITS):  # a range of intensities, not of indices
        close(decode(content, preprocess), expected, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_one_transparent_colour_in_a_png(count):
    picture = RGB[..., :count].copy()
    picture[2, 3] = picture[4] = 77
    clear = (picture == 77).all(-1, keepdims=True)
    expected = np.where(clear, np.array(BACKGROUND), np.broadcast_to(picture, RGB.shape))
    close(decode(png(picture, transparent=[77] * count), ON_GREEN), expected, 0)
    close(decode(png(deep(picture), transparent=[77 * 257] * count), ON_GREEN), expected, 0)
    turned = png(deep(picture), transparent=[77 * 257] * count, orientation=6)
    close(decode(turned, ON_GREEN), np.rot90(expected, -1), 0)


@pytest.mark.parametrize("ext", [".ppm", ".pgm", ".jp2"])
def test_other_deep_formats(ext):
    picture = GREY if ext == ".pgm" else RGB
    picture = np.repeat(np.repeat(picture, 8, 0), 8, 1)
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if ext == ".jp2" else []
    expected = np.broadcast_to(picture, (*picture.shape[:2], 3))
    for bits in (8, 16):
        content = cv2.imencode(ext, deep(picture, bits)[..., ::-1], options)[1].tobytes()
        assert content
        close(decode(content), expected)
    half = decode(content, Preprocess(value_range=(0, 32767.5)))
    close(half, np.minimum(expected.astype(int) * 2, 255), 2)


@pytest.mark.parametrize("magic", ["P5", "P6", "P2", "P3"])
def test_portable_maps_of_twelve_bits(magic):
    picture = RGB if magic in ("P6", "P3") else GREY
    values = deep(picture, 12)
    body = values.astype(">u2").tobytes()
    if magic in ("P2", "P3"):
        body = " ".join(map(str, values.reshape(-1))).encode() + b"\n"
    content = f"{magic}\n# made by hand\n{W} {H}\n4095\n".encode() + body
    close(decode(content), np.broadcast_to(picture, RGB.shape))
    assert open_picture(content).deep == (values.max(), 4095)


@pytest.mark.parametrize("ending", ["jp2", "avif"])
def test_twelve_bits_that_the_file_names(ending):
    """64 x 64 pixels, rising by one from 0 to 4,095."""
    content = Path(__file__).with_name(f"twelve_bits.{ending}").read_bytes()
    ramp = np.arange(64 * 64).reshape(64, 64, 1)
    for top, levels in ((4095, 2), (1023, 4)):
        pixels = decode(content, Preprocess(value_range=None if top == 4095 else (0, top)))
        expected = np.rint(np.minimum(ramp / top, 1) * 255)
        close(pixels, np.broadcast_to(expected, (64, 64, 3)), levels)


@pytest.mark.parametrize("orientation", [1, 6])
def test_twelve_bits_of_a_tiff(orientation):
    """Two samples in three bytes."""
    values = deep(GREY, 12).reshape(-1, 2).astype(int)
    packed = bytes(b for a, c in values for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255))
    content = saved(
        tifffile.imwrite, iter([packed]), shape=(H, W), dtype=np.uint16, bitspersample=12,
        rowsperstrip=H, metadata=None, extratags=[(274, "H", 1, orientation, True)],
    )  # fmt: skip
    close(decode(content), ORIENTATIONS[orientation](GREY_AS_RGB))
    assert open_picture(content).deep.top == 4095


def test_big_endian_arrays():
    stored = deep(RGB).astype(">u2")
    close(decode(saved(np.save, stored)), RGB, 0)
    close(decode(stored), RGB, 0)


def test_transparency_is_never_scaled_by_the_range_of_the_colours():
    stored = np.concatenate((deep(RGB) // 16, deep(ALPHA)), -1)
    preprocess = Preprocess(background=BACKGROUND, value_range=(0, 4095))
    for content in (png(stored), tiff()(stored, extra=["unassalpha"])):
        close(decode(content, preprocess), over_background(RGB, ALPHA))


@pytest.mark.parametrize("bits", [8, 16])
def test_bands_are_asked_for_and_not_guessed(bits):
    """Bands, RGB with an alpha, and RGB with a further band."""
    four = deep(RGBA, bits)
    bands = tiff()(four, colours="minisblack", extra=["unspecified"] * 3)
    with pytest.raises(BadImage, match="channels=3"):
        decode(bands)
    for content in (bands, *(tiff()(four, extra=[e]) for e in ("unassalpha", "unspecified"))):
        close(decode(content, channels(4)), RGBA, 0)


def test_a_camera_s_mosaic_is_no_grey_image():
    tags = [(33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True)]
    content = saved(tifffile.imwrite, deep(RGB[..., 0]), photometric="cfa", extratags=tags)
    with pytest.raises(BadImage, match="colours CFA"):
        decode(content)


def test_the_largest_value_of_deep_images_is_known():
    assert open_picture(png(deep(RGB) // 16)).deep == (deep(RGB).max() // 16, 65535)
    assert open_picture(png(RGB)).deep is None
    with_alpha = np.concatenate((deep(RGB) // 16, deep(np.full_like(ALPHA, 255))), -1)
    assert open_picture(png(with_alpha)).deep.largest < 4096


def test_heic_as_phones_write_it():
    import pillow_heif

    pillow_heif.register_heif_opener()
    picture = np.repeat(np.repeat(RGB, 16, 0), 16, 1)
    decoded = open_picture(encoded(picture, "HEIF", quality=-1))
    assert decoded.kind == "HEIF RGB"
    assert np.abs(decoded.pixels().astype(int) - picture).mean() < 12  # colours at half resolution


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True, "photometric": "minisblack"}])
@pytest.mark.parametrize("axes", ["CYX", "ZCYX"])
def test_channels_that_a_microscope_stores_as_pages(options, axes):
    options = {"metadata": {"axes": axes}, **options}
    for bits in (8, 16):
        planes = deep(np.moveaxis(RGB, -1, 0), bits)
        planes = planes if axes == "CYX" else np.stack((planes, planes // 2))
        content = saved(tifffile.imwrite, planes, **options)
        close(decode(content), RGB, 0)
        with pytest.raises(BadImage, match="channels=5"):
            decode(content, channels(5))
    six = np.concatenate((planes, planes), axis=axes.index("C"))
    with pytest.raises(BadImage, match="channels=3"):  # of which none is chosen unasked
        decode(saved(tifffile.imwrite, six, **options))


def test_signed_numbers_of_eight_bits():
    content = tiff()((GREY.astype(int) - 128).astype(np.int8), colours="minisblack")
    with pytest.raises(BadImage, match="value_range"):
        decode(content)
    close(decode(content, Preprocess(value_range=(-128, 127))), GREY_AS_RGB, 0)
