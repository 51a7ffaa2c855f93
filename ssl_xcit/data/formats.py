"""Tell images by a file's ending or first bytes, and name what would read other files."""

import os
from collections import Counter
from contextlib import suppress
from functools import cache

from PIL import Image

HEAD = 32  # bytes that tell a format
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
ENDINGS = {
    "JPEG": ".jpg .jpeg .jpe .jfif",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "BMP": ".bmp .dib",
    "GIF": ".gif",
    "TIFF": ".tif .tiff .tf8 .btf",
    "PPM": ".ppm .pgm .pbm .pnm",
    "JPEG2000": ".jp2 .j2k .j2c .jpf .jpx",
    "AVIF": ".avif",
    "NPY": ".npy",
}
EXTENSIONS = tuple(" ".join(ENDINGS.values()).encode().split())
# Endings of files that are not read: some begin like a TIFF and hold only a thumbnail as one.
UNREADABLE = {
    "camera raw, to be developed to TIFF or JPEG first": (
        ".3fr .arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .rw2 .sr2 .srf .srw"
    ),
    "slides, to be cut into tiles first (openslide)": ".ndpi .scn .svs .vms .mrxs",
    "medical images, to be converted first (pydicom, nibabel)": ".dcm .dicom .nii .mha .nrrd",
    "archives, to be unpacked first": ".7z .bz2 .gz .rar .xz .zip .zst",
    "tar shards: data=shards": ".tar",
    "tables: data=list or data=huggingface": ".arrow .parquet",
    "arrays: data=arrays": ".npz",
    "": (  # no images
        ".csv .db .doc .docx .h5 .hdf5 .html .ini .ipynb .json .jsonl .log .m4a .md .mat .mov .mp3 "
        ".mp4 .pdf .pickle .pkl .pth .pt .py .pyc .safetensors .sh .svg .tex .toml .tsv .txt .wav "
        ".xls .xlsx .xml .yaml .yml"
    ),
}
REMEDIES = {ending: words for words, endings in UNREADABLE.items() for ending in endings.split()}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
HEIC_REMEDY = "pillow-heif: pip install 'ssl-xcit[heic]'"
JXL_REMEDY = "no reader here: convert them to PNG first (djxl)"


@cache
def readable_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that it was built with, and HEIF with pillow-heif."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)


def image_format(head: bytes) -> str | None:
    """Return the format by a file's first `HEAD` bytes; None: not a known image."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG2000"
    if (
        head[:2] == b"BM"
        and head[6:10] == bytes(4)
        and head[14:18] in (b"\x28\0\0\0", b"\x7c\0\0\0")
    ):
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, len(head) - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if brands & HEIC_BRANDS else None
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    return None


class SkippedFiles:
    """Counts files that are not read, by ending and by what would read them."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: bytes, remedy: str) -> None:
        """Count a file."""
        ending = os.path.splitext(os.fsdecode(name))[1]
        if not remedy and (not ending or not ending[1:].isalnum() or len(ending) > 9):
            ending = ""
        self.counts[ending, remedy] += 1

    def sentence(self) -> str:
        """Return `40 .HEIC files (they need ...), 3 .txt files`: the most frequent first, and of
        equals those that may be images.
        """
        parts = []
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], not item[0][1], item[0]))
        for (ending, remedy), count in ordered:
            kind = f"{ending} file" if ending else "file without a known ending"
            plural = kind.replace("file", "files", 1) if count > 1 else kind
            parts.append(f"{count:,} {plural}" + (f" ({remedy})" if remedy else ""))
        return ", ".join(parts[:8]) + (
            f" and {len(parts) - 8} more kinds" if len(parts) > 8 else ""
        )


def readable_by_head(head: bytes | None) -> tuple[bool, str]:
    """Return whether first bytes (None: no access) are a readable image's, else what reads it."""
    kind = None if head is None else image_format(head)
    if kind == "HEIF":
        readable = "HEIF" in readable_formats()
        return readable, "" if readable else f"they need {HEIC_REMEDY}"
    if kind == "JXL":
        return False, JXL_REMEDY
    return kind in readable_formats(), ""


def remedy_by_ending(name: bytes) -> str | None:
    """Return what would read a file (`""`: nothing, it is no image) by its ending alone, so that it
    need not be opened; None: the ending does not tell.
    """
    return REMEDIES.get(os.path.splitext(os.fsdecode(name).lower())[1])
