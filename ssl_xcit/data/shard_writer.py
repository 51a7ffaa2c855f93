"""Write the images of a source as tar shards; a rerun continues behind the complete ones."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from PIL import Image

from ssl_xcit.data.bad_samples import FILE
from ssl_xcit.data.decode import MAX_BYTES, open_picture
from ssl_xcit.data.loader import parallel_map
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.remote import INDEX, LISTING
from ssl_xcit.data.shard_labels import class_texts
from ssl_xcit.data.sources import Source, Stored
from ssl_xcit.data.tar_listing import full_listing, list_tar, write_listings
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.utils.files import replacing, sha256_of, writable_folder, write_json
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.tables import shown_in_terminal
from ssl_xcit.utils.terminal import say, track

PROGRESS = ".progress.jsonl"  # one line for each complete shard
SUFFIXES = {
    b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"BM": "bmp", b"GI": "gif",
    b"II": "tif", b"MM": "tif", b"\x93N": "npy", b"P5": "pgm", b"P6": "ppm",
}  # fmt: skip
TSV_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
Record = dict[str, Any]  # of a complete shard


class ShardJob(NamedTuple):
    """Everything that the content of the shards depends on."""

    source: Source
    preprocess: Preprocess
    order: np.ndarray  # of the images
    images_per_shard: int
    out: Path
    class_texts: Sequence[str] = ()  # of `.cls`, by class id; empty: the ids themselves


def names_digest(source: Source) -> str:
    """Return a hash of the images' names, so that a rerun continues with the same images."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(os.fsencode(source.name(index)) + b"\0")
    return digest.hexdigest()[:16]


def write_shards(
    job: ShardJob, made_with: dict[str, Any], num_workers: int | None, timeout: float
) -> list[Record]:
    """Write all shards that are not complete yet, and return the records of all.

    Raises:
        UserError: the folder holds other tars, or shards made with other settings.
    """
    out, num_shards = job.out, -(-len(job.source) // job.images_per_shard)
    writable_folder(out)
    others = sorted(out.glob("*.tar"))
    if others and not any((out / name).exists() for name in (PROGRESS, INDEX)):
        raise UserError(f"out={out} holds other tars, such as {others[0].name}: name another")
    with exclusive(out / ".lock", f"out={out}"):
        begun = begun_with(out)
        if not begun or "content" in begun[0]:  # an older version wrote ids into the others
            job = job._replace(class_texts=class_texts(job.source))
        done = complete_shards(out, made_with)
        for part in out.glob(".shard-*.part"):
            part.unlink()
        todo = [number for number in range(num_shards) if number not in done]
        if done and todo:
            say(f"{len(done)} of {num_shards} shards are complete; going on")
        written = parallel_map(
            partial(write_numbered, job, todo), len(todo), num_workers, timeout=timeout, chunk=1
        )
        with (out / PROGRESS).open("a+") as progress:
            if todo and not (out / PROGRESS).read_text().endswith("}\n"):
                append_line(progress, made_with)
            for (record,) in track(written, "shards", len(todo), shown_in_terminal()):
                done[record["number"]] = record
                append_line(progress, record)
    return [done[number] for number in range(num_shards)]


def begun_with(out: Path) -> list[dict[str, Any]]:
    """Return the settings that the command was first started with, then records of shards and
    settings of later starts; empty before the first.
    """
    if (out / INDEX).is_file():
        content = json.loads((out / INDEX).read_text())
        return [content["made_with"], *content["shards"]]
    lines: list[dict[str, Any]] = []
    if (out / PROGRESS).is_file():
        for text in (out / PROGRESS).read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut short
                lines.append(json.loads(text))
    return lines


def complete_shards(out: Path, made_with: dict[str, Any]) -> dict[int, Record]:
    """Return the records of complete shards, by number, from an earlier start of the command.

    Raises:
        UserError: they were made with other settings.
    """
    lines = begun_with(out)
    if not lines:
        return {}
    before = {"content": made_with.get("content"), **lines[0]}  # older versions did not note it
    differs = [key for key in made_with if before.get(key) != made_with[key]]
    if differs:
        raise UserError(
            f"out={out} was begun with another {', '.join(differs)}: name another folder, or "
            "remove it"
        )
    records = [line for line in lines if "number" in line]  # other lines are settings
    paths = [out / record["file"] for record in records]
    return {
        record["number"]: record
        for record, path in zip(records, paths, strict=True)
        if "tar_sha256" in record and path.is_file() and path.stat().st_size == record["bytes"]
    }


def append_line(file: TextIO, content: dict[str, Any]) -> None:
    """Append a line, which is on the disk when this returns."""
    file.write("\n" + json.dumps(content) + "\n")  # the line before may have been cut short
    file.flush()
    os.fsync(file.fileno())


def write_numbered(job: ShardJob, numbers: Sequence[int], place: int) -> Record:
    """Write the shard whose number stands at this place."""
    return write_shard(job, numbers[place])


def write_shard(job: ShardJob, number: int) -> Record:
    """Write a tar of its images as they are stored, without those that cannot be read, and compare.

    Raises:
        RunFailed: the images read back differ.
    """
    first = number * job.images_per_shard
    path = job.out / f"shard-{number:06d}.tar"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    bad, digests = [], []
    with part.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            last = min(first + job.images_per_shard, len(job.order))
            for place in range(first, last):
                index = int(job.order[place])
                try:
                    stored = job.source.read(index)
                    open_picture(stored, job.preprocess).pixels()
                    content, suffix = encoded(stored)
                    if len(content) > MAX_BYTES:
                        raise BadImage(f"{len(content):,} bytes, more than {MAX_BYTES:,}")
                except BadImage as error:
                    name = job.source.name(index)
                    bad.append({"place": index, "name": name, "reason": str(error)})
                    continue
                key = f"{place:09d}"
                add(tar, f"{key}.{suffix}", content)
                if job.source.labels is not None:
                    label = int(job.source.labels[index])
                    text = job.class_texts[label] if job.class_texts else str(label)
                    add(tar, f"{key}.cls", text.encode())
                digests.append(hashlib.sha256(content).hexdigest())
        file.flush()
        os.fsync(file.fileno())
    listing = list_tar(str(part))
    with part.open("rb") as file:
        for digest, offset, size in zip(digests, listing.offsets, listing.sizes, strict=True):
            file.seek(offset)
            if hashlib.sha256(file.read(size)).hexdigest() != digest:
                raise RunFailed(f"{part}: what was read back is not what was written: a bad disk?")
    sha256 = sha256_of(part)
    part.replace(path)
    return {
        "number": number,
        "file": path.name,
        "images": len(digests),
        "bytes": path.stat().st_size,
        "tar_sha256": sha256,
        "bad": bad,
    }


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without owner and time: the same images give the same tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encoded(stored: Stored) -> tuple[bytes, str]:
    """Return content and suffix; arrays become PNG if that can hold them, else .npy."""
    if isinstance(stored, bytes):
        return stored, SUFFIXES.get(stored[:2], "jpg")
    out = io.BytesIO()
    if stored.dtype == np.uint8 and (stored.ndim == 2 or stored.shape[-1] in (1, 3)):
        Image.fromarray(stored.squeeze(-1) if stored.shape[-1] == 1 else stored).save(out, "PNG")
        return out.getvalue(), "png"
    np.save(out, stored, allow_pickle=False)
    return out.getvalue(), "npy"


def write_index(
    job: ShardJob, made_with: dict[str, Any], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """Write `keys.tsv`, `listing.jsonl.gz`, `shards.json` and the list of bad images, which is
    returned. With the listing a run on shards behind a URL begins without reading them all.
    """
    out, source = job.out, job.source
    bad = [row for record in records for row in record["bad"]]
    left_out = {row["place"] for row in bad}
    with (out / "keys.tsv").open("w", encoding="utf-8", errors="surrogateescape") as file:
        for place, index in enumerate(job.order.tolist()):
            if index not in left_out:
                file.write(f"{place:09d}\t{source.name(index).translate(TSV_ESCAPES)}\n")
    (out / FILE).write_text("".join(json.dumps(row) + "\n" for row in bad))
    with replacing(out / LISTING) as part:
        write_listings(part, {r["tar_sha256"]: full_listing(str(out / r["file"])) for r in records})
    listing = {"bytes": (out / LISTING).stat().st_size, "sha256": sha256_of(out / LISTING)}
    content = {
        "images": sum(record["images"] for record in records),
        "labels": source.labels is not None,
        "class_names": list(source.class_names),
        "made_with": next(iter(begun_with(out)), made_with),
        "listing": listing,
        "shards": list(records),
    }
    write_json(content, out / INDEX)
    (out / PROGRESS).unlink(missing_ok=True)
    return bad
