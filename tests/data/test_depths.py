"""What a file says of its picture holds at every depth: format x depth x property, each compared
with the 8-bit file of the same picture, and that with the picture worked out here.
"""

import base64
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ssl_xcit.data.decode import BadImage, decode, open_picture
from ssl_xcit.data.preprocess import Preprocess

H, W = 6, 10
RNG = np.random.default_rng(7)
RGB = RNG.integers(0, 256, (H, W, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (H, W, 1), np.uint8)
ALPHA[0] = 0
BACKGROUND = (10, 200, 90)
ON_GREEN = Preprocess(background=BACKGROUND)
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
    """With any bits, orientation (eXIf) and transparent colour (tRNS), chunk by chunk."""
    array = array.reshape(H, W, -1)
    bits = 8 * array.dtype.itemsize
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[-1]]
    rows = array.astype(array.dtype.newbyteorder(">"))
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    exif = Image.Exif()
    exif[274] = orientation
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, kind, 0, 0, 0))]
    if orientation > 1:
        parts.append(chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    if transparent is not None:
        parts.append(chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    parts += [chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PHOTOMETRIC = {
    "grey": "minisblack",
    "white is zero": "miniswhite",
    "rgb": "rgb",
    "cmyk": "separated",
}


def tiff(**preprocess):
    def write(array, orientation=1, extra=(), colours="rgb"):
        out = io.BytesIO()
        array = array.reshape(H, W, -1)
        options = {"planarconfig": "contig", **preprocess}
        if options["planarconfig"] == "separate" and array.shape[-1] > 1:
            array = np.moveaxis(array, -1, 0)
        else:
            options["planarconfig"] = None if array.shape[-1] == 1 else "contig"
        if array.shape[-1] == 1:
            array = array[..., 0]
        tifffile.imwrite(
            out, array, photometric=PHOTOMETRIC[colours], extrasamples=extra or None,
            extratags=[(274, "H", 1, orientation, True)], metadata=None, **options,
        )  # fmt: skip
        return out.getvalue()

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
    expected = ORIENTATIONS[orientation](RGB)
    same_at_every_depth(FORMATS[kind], RGB, expected, 0, orientation=orientation)
    grey = RGB[..., :1]
    expected = np.repeat(ORIENTATIONS[orientation](grey), 3, axis=-1)
    options = {"orientation": orientation, "colours": "grey"}
    same_at_every_depth(FORMATS[kind], grey, expected, 0, **options)


@each_format
def test_straight_alpha(kind):
    extra = {"extra": ["unassalpha"]} if kind != "PNG" else {}
    expected = over_background(RGB, ALPHA)
    same_at_every_depth(FORMATS[kind], np.concatenate((RGB, ALPHA), -1), expected, **extra)
    grey = np.concatenate((RGB[..., :1], ALPHA), -1)
    expected = over_background(np.repeat(RGB[..., :1], 3, -1), ALPHA)
    same_at_every_depth(FORMATS[kind], grey, expected, **extra, colours="grey")


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("colours", ["rgb", "grey"])
def test_premultiplied_alpha(kind, colours):
    picture = RGB if colours == "rgb" else RGB[..., :1]
    alpha = np.maximum(ALPHA, 64)  # below, 8 bits of a premultiplied colour are a few levels
    alpha[0] = 0
    stored = np.rint(picture * (alpha / 255.0)).astype(np.uint8)
    expected = over_background(np.broadcast_to(picture, RGB.shape), alpha)
    stored = np.concatenate((stored, alpha), -1)
    options = {"extra": ["assocalpha"], "colours": colours}
    same_at_every_depth(TIFFS[kind], stored, expected, 2, **options)


@pytest.mark.parametrize("kind", TIFFS)
def test_a_fourth_band_is_no_alpha(kind):
    stored = np.concatenate((RGB, ALPHA), -1)
    same_at_every_depth(TIFFS[kind], stored, RGB, 0, extra=["unspecified"])
    stored = np.concatenate((stored, ALPHA), -1)  # two more
    same_at_every_depth(TIFFS[kind], stored, RGB, 0, extra=["unspecified"] * 2)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_fourth_band_that_the_file_does_not_mention(depth):
    """Without the tag ExtraSamples, which the format demands; Pillow takes it for alpha."""
    stored = np.concatenate((RGB, np.zeros_like(ALPHA)), -1)
    content = bytearray(tiff()(deep(stored, 8 * depth().itemsize), extra=["unassalpha"]))
    at = content.find(struct.pack("<HH", 338, 3))
    assert at > 0
    content[at : at + 2] = struct.pack("<H", 339)  # SampleFormat instead: 2 would be signed
    content[at + 8 : at + 10] = struct.pack("<H", 1)
    close(decode(bytes(content), ON_GREEN), RGB, 0)


@pytest.mark.parametrize("kind", TIFFS)
def test_cmyk(kind):
    ink = np.concatenate((RGB, ALPHA // 2), -1)
    expected = np.rint((255 - RGB.astype(float)) * (255 - (ALPHA // 2).astype(float)) / 255)
    same_at_every_depth(TIFFS[kind], ink, expected, colours="cmyk")
    same_at_every_depth(TIFFS[kind], ink, np.rot90(expected, -1), colours="cmyk", orientation=6)


@pytest.mark.parametrize("kind", TIFFS)
def test_white_is_zero(kind):
    grey = RGB[..., :1]
    expected = np.repeat(255 - grey, 3, axis=-1)
    same_at_every_depth(TIFFS[kind], grey, expected, 0, colours="white is zero")
    content = TIFFS[kind](deep(grey) // 16, colours="white is zero")  # twelve bits in sixteen
    close(decode(content, Preprocess(value_range=(0, 4095))), expected)


def test_palettes():
    """16-bit colours of 8-bit and of 16-bit indices."""
    colours = RNG.integers(0, 256, (3, 256), np.uint8)
    indices = RNG.integers(0, 256, (H, W), np.uint8)
    expected = colours.T[indices]
    out = io.BytesIO()
    tifffile.imwrite(out, indices, photometric="palette", colormap=colours.astype(np.uint16) * 257)
    close(decode(out.getvalue()), expected, 0)
    out = io.BytesIO()
    wide = np.repeat(colours.astype(np.uint16) * 257, 256, axis=1)
    tifffile.imwrite(out, indices.astype(np.uint16) * 256, photometric="palette", colormap=wide)
    for preprocess in (
        Preprocess(),
        Preprocess(value_range=(0, 4095)),
    ):  # of intensities, not of indices
        close(decode(out.getvalue(), preprocess), expected, 0)


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
    picture = RGB[..., :1] if ext == ".pgm" else RGB
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
    picture = RGB if magic in ("P6", "P3") else RGB[..., :1]
    values = deep(picture, 12)
    body = values.astype(">u2").tobytes()
    if magic in ("P2", "P3"):
        body = " ".join(map(str, values.reshape(-1))).encode() + b"\n"
    content = f"{magic}\n# made by hand\n{W} {H}\n4095\n".encode() + body
    close(decode(content), np.broadcast_to(picture, RGB.shape))
    assert open_picture(content).deep == (values.max(), 4095)


# 64 x 64, rising by one from 0 to 4,095: JPEG 2000 and AVIF that say that they have 12 bits
TWELVE = {
    "JPEG2000": (
        "/0//UQApAAAAAABAAAAAQAAAAAAAAAAAAAAAQAAAAEAAAAAAAAAAAAABCwEB/1IADAAAAAEAAwQEAAH/XAANQGBo"
        "aHBoaHBoaHD/ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAACZAAH/k9/hKBIr"
        "AwsLE+S5L4U/OFCLF3Xs/uu+yVJRa52G23Nx5ov+kXlXWf2JNYfRvuZF7pOu4roUqtrBsRM7iZNaaxsRf7lomeXc"
        "sd+8/3o/wAfCJB+YWDahmr89pjRbENxcOhTTP8ADokD8AwBfp8eHnawpQQDDGAYMhRkvwAEkB9oOi2IBv+GNYqd/"
        "2H//2Q=="
    ),
    "AVIF": (
        "AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAAOltZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAA"
        "AAAAAAAAAAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAAQ0AAAG4AAAAKGlpbmYAAAAAAAEA"
        "AAAaaW5mZQIAAAAAAQAAYXYwMUNvbG9yAAAAAGhpcHJwAAAASWlwY28AAAAUaXNwZQAAAAAAAABAAAAAQAAAAA5w"
        "aXhpAAAAAAEMAAAADGF2MUOBQHwAAAAAE2NvbHJuY2x4AAIAAgACgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAB"
        "wG1kYXQSAAoGWBV//46gMqsDEACOItVhsk6Pl6tUKYg4wRHv9a6xTXIAMIrJIerJ46MaIQXPQ2RW8ky+yRn3HsDL"
        "1TOMwRMs45zIuGXl0BK3FnS5iZfIwGTVaoU/gpZkIiyF2A/VT3sxuQy9cbI1lTsxGBsaizKiLgECRHh0hWquo6Wf"
        "CdRNDdOsn1AnjXeR8JRx4r9NO/c2VE2R6sMOr1E2snzLunWMWyLEHRoOAOZrNj+rZtUrG/xFVmYCMrDkSWvtqP2k"
        "4eVhKdUIp+/LiRl0tSVhsJn0glAjb2xvmfS0570wHy/fQbFScg5OMmV56mr0aOOvpAFFcA6Xf/fgoWUpQtrLHGmr"
        "dBtePd+yk7k9QJK4Z+uElfg3nT8BLJf36mGGpKqOADIdRm677Ep6R5VDn8OnvmVl7LTHhESf5831Dq8cC7ZtroXs"
        "EoIKwbjFcQmVGCWHrVLAVDXTrVm6badxskzjDncWdApuQ2J8wH7KtzMWW3GP3JetElQpjU8IFltsnQn9v6FkqWwx"
        "dg9PJbB4qnLD+tJvesavna+Eqv5d3Y+qj0EZTqpUm1t0ldLOvOCsMxjf+ucm0lCWgA=="
    ),
}


@pytest.mark.parametrize("kind", TWELVE)
def test_twelve_bits_that_the_file_names(kind):
    content = base64.b64decode(TWELVE[kind])
    ramp = np.arange(64 * 64).reshape(64, 64, 1)
    close(decode(content), np.broadcast_to(np.rint(ramp / 4095 * 255), (64, 64, 3)), 2)
    bright = decode(content, Preprocess(value_range=(0, 1023)))
    close(bright, np.broadcast_to(np.rint(np.minimum(ramp / 1023, 1) * 255), (64, 64, 3)), 4)


def packed_twelve_bits(orientation=1):
    """A grey TIFF of 12 bits a sample, two samples in three bytes."""
    values = deep(RGB[..., 0], 12).reshape(-1, 2).astype(int)
    data = bytes(b for a, c in values for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255))
    tags = {256: W, 257: H, 258: 12, 259: 1, 262: 1, 273: 8, 274: orientation, 277: 1, 278: H}
    tags[279] = len(data)
    directory = b"".join(struct.pack("<HHII", number, 4, 1, v) for number, v in tags.items())
    body = data + b"\0" * (len(data) % 2)
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    return head + body + struct.pack("<H", len(tags)) + directory + struct.pack("<I", 0)


def test_twelve_bits_of_a_tiff():
    expected = np.repeat(RGB[..., :1], 3, axis=-1)
    close(decode(packed_twelve_bits()), expected)
    close(decode(packed_twelve_bits(6)), np.rot90(expected, -1))
    assert open_picture(packed_twelve_bits()).deep.top == 4095


def test_big_endian_arrays():
    out = io.BytesIO()
    np.save(out, deep(RGB).astype(">u2"))
    close(decode(out.getvalue()), RGB, 0)
    close(decode(deep(RGB).astype(">u2")), RGB, 0)


def test_transparency_is_never_scaled_by_the_range_of_the_colours():
    stored = np.concatenate((deep(RGB) // 16, deep(ALPHA)), -1)
    preprocess = Preprocess(background=BACKGROUND, value_range=(0, 4095))
    for content in (png(stored), tiff()(stored, extra=["unassalpha"])):
        close(decode(content, preprocess), over_background(RGB, ALPHA))


def test_bands_are_asked_for_and_not_guessed():
    four = tiff()(deep(np.concatenate((RGB, ALPHA), -1)), colours="grey", extra=["unspecified"] * 3)
    with pytest.raises(BadImage, match="channels=3"):
        decode(four)
    preprocess = Preprocess(4, (0.5,) * 4, (0.2,) * 4)
    close(decode(four, preprocess), np.concatenate((RGB, ALPHA), -1), 0)
    # the same bands, and RGB with an alpha, where four channels are wanted
    close(decode(tiff()(deep(np.concatenate((RGB, ALPHA), -1)), extra=["unassalpha"]), preprocess),
          np.concatenate((RGB, ALPHA), -1), 0)  # fmt: skip


def test_a_camera_s_mosaic_is_no_grey_image():
    out = io.BytesIO()
    tifffile.imwrite(out, deep(RGB[..., 0]), photometric="cfa", extratags=[
        (33421, "H", 2, (2, 2), True), (33422, "B", 4, (0, 1, 1, 2), True)])  # fmt: skip
    with pytest.raises(BadImage, match="colours CFA"):
        decode(out.getvalue())


def test_the_largest_value_of_deep_images_is_known():
    assert open_picture(png(deep(RGB) // 16)).deep == (deep(RGB).max() // 16, 65535)
    assert open_picture(png(RGB)).deep is None
    with_alpha = np.concatenate((deep(RGB) // 16, deep(np.full_like(ALPHA, 255))), -1)
    assert open_picture(png(with_alpha)).deep.largest < 4096


def test_heic_as_phones_write_it():
    import pillow_heif

    pillow_heif.register_heif_opener()
    picture = np.repeat(np.repeat(RGB, 16, 0), 16, 1)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "HEIF", quality=-1)
    decoded = open_picture(out.getvalue())
    assert decoded.kind == "HEIF RGB"
    assert np.abs(decoded.pixels().astype(int) - picture).mean() < 12  # colours at half resolution


@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True, "photometric": "minisblack"}])
@pytest.mark.parametrize("axes", ["CYX", "ZCYX"])
def test_channels_that_a_microscope_stores_as_pages(options, axes):
    three = np.moveaxis(RGB, -1, 0)
    for bits in (8, 16):
        planes = deep(three, bits)
        planes = planes if axes == "CYX" else np.stack((planes, planes // 2))
        out = io.BytesIO()
        tifffile.imwrite(out, planes, metadata={"axes": axes}, **options)
        close(decode(out.getvalue()), RGB, 0)
        with pytest.raises(BadImage, match="channels=5"):
            decode(out.getvalue(), Preprocess(5, (0.5,) * 5, (0.2,) * 5))
    out = io.BytesIO()
    slices = np.concatenate((planes, planes), axis=axes.index("C"))  # six channels
    tifffile.imwrite(out, slices, metadata={"axes": axes}, **options)
    with pytest.raises(BadImage, match="channels=3"):  # of which none is chosen unasked
        decode(out.getvalue())


@pytest.mark.parametrize("bits", [8, 16])
def test_a_further_band_is_kept_where_it_is_wanted(bits):
    four = deep(np.concatenate((RGB, ALPHA), -1), bits)
    preprocess = Preprocess(4, (0.5,) * 4, (0.2,) * 4)
    expected = np.concatenate((RGB, ALPHA), -1)
    close(decode(tiff()(four, extra=["unspecified"]), preprocess), expected, 0)


def test_signed_numbers_of_eight_bits():
    values = (RGB[..., 0].astype(int) - 128).astype(np.int8)
    content = tiff()(values, colours="grey")
    with pytest.raises(BadImage, match="value_range"):
        decode(content)
    pixels = decode(content, Preprocess(value_range=(-128, 127)))
    close(pixels, np.repeat(RGB[..., :1], 3, -1), 0)
