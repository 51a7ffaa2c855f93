"""Rows 21 to 25: images that are none, bombs, loader processes that die or hang."""

import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from runs import HERE, TOY, assert_equal_runs, trick


def folder_of(place, count=100):
    """Photographs of 48 x 48 pixels."""
    folder = place.folder / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(count):
        small = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(small).resize((48, 48)).save(folder / f"{n:03d}.png")
    return folder


def spoil(folder, kinds):
    content = (folder / "000.png").read_bytes()
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    made = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "html": b"<html>404 not found</html>",
        "crc": bytes(damaged),
    }
    for n, kind in enumerate(kinds):
        (folder / f"{10 * n + 5:03d}.png").write_bytes(made[kind])


OWN = ["data=folder", "data.root=in", "epochs=3", "model=xcit_micro_4_p8"]


def test_row_21_one_percent_of_bad_images(place):
    """Replaced deterministically, counted, listed once; above a limit exit 1."""
    spoil(folder_of(place), ["truncated", "empty", "html", "crc"])
    place(*OWN, "data.max_bad_fraction=0.05")
    rows = [json.loads(r) for r in (place.run_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(os.path.basename(r["name"]) for r in rows) == [
        "005.png", "015.png", "025.png", "035.png",
    ]  # fmt: skip
    assert place.metrics()[-1]["bad_images"] == "4.0"
    first = [r["images"] for r in place.records()]
    assert not {5, 15, 25, 35} & {i for images in first for i in images}
    place(*OWN, "data.max_bad_fraction=0.05", "name=y")
    place.run_dir = place.folder / "runs/y"
    assert [r["images"] for r in place.records()] == first
    assert "images are bad" in place(*OWN, "data.max_bad_fraction=0.01", "name=z", status=1)


BOMB = """
import resource, sys
from ssl_xcit.data.decode import open_picture
from ssl_xcit.data.picture import RGB, BadImage
content = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_picture(content, RGB).pixels()
except BadImage as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_row_22_an_image_bomb(place):
    """60,000 x 60,000 pixels in a few bytes: refused from the header, in no memory, in training
    too.
    """
    folder = folder_of(place, 50)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    bomb = folder / "025.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, bomb], capture_output=True, text=True, check=True
    )
    reason, extra = done.stdout.splitlines()
    assert "pixels" in reason
    assert int(extra) < 500
    place(*OWN, "data.max_bad_fraction=0.05")
    assert "025.png" in (place.run_dir / "bad_samples.jsonl").read_text()


def test_row_23_documented_pixels(tmp_path):
    """16-bit grey, RGBA, palette, GIF, turned by EXIF, CMYK: golden values, from files."""
    from ssl_xcit.data.decode import open_picture
    from ssl_xcit.data.picture import RGB

    red_green = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    clear = Image.fromarray(np.array([[[9, 9, 9, 0], [10, 20, 30, 255]]], np.uint8))
    grey16 = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    made = {
        "grey16.png": (grey16, {}, [[[v] * 3 for v in (0, 1, 128, 255)]]),
        "rgba.png": (clear, {}, [[[255, 255, 255], [10, 20, 30]]]),
        "palette.png": (red_green.quantize(2), {}, [[[255, 0, 0], [0, 255, 0]]]),
        "one.gif": (red_green, {}, [[[255, 0, 0], [0, 255, 0]]]),
        "turned.png": (red_green, {"exif": exif}, [[[255, 0, 0]], [[0, 255, 0]]]),
        "cmyk.tif": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), {}, [[[255, 0, 0]]]),
    }
    for name, (image, options, expected) in made.items():
        image.save(tmp_path / name, **options)
        found = open_picture((tmp_path / name).read_bytes(), RGB).pixels()
        assert np.asarray(found).tolist() == expected, name


def children_of(pid):
    """Loader processes; the C++ compiler that is asked for its version is another child."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(p) for p in file.read().split()]
    return [child for child in children if name_of(child) == "pt_data_worker"]


def name_of(pid):
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "SIGKILL: out of memory?"), (signal.SIGSTOP, "within 4 s (worker_timeout)")],
    ids=["row_24_killed", "row_25_hangs"],
)
def test_row_24_25_a_loader_worker_dies_or_hangs(place, whole, number, words):
    """Named with a hint, and the loader is made again at the exact position."""
    run = place.start(*trick("Slow", seconds=0.05), "num_workers=1", "worker_timeout=4")
    place.until_step(6, run)
    (worker,) = children_of(run.pid)
    os.kill(worker, number)
    assert words in run.ends()
    assert "nothing is lost" in run.err
    assert_equal_runs(place, whole)


def test_row_24_three_times_in_a_hundred_steps_ends_it(place):
    run = place.start(*trick("Slow", seconds=0.1), "num_workers=1")
    place.until_step(3, run)
    for _ in range(3):
        known = run.err.count("started again")
        deadline = time.monotonic() + 20
        place.until(lambda: children_of(run.pid), run, 20)
        os.kill(children_of(run.pid)[0], signal.SIGKILL)
        while run.err.count("started again") == known and not run.over():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "3rd time within 100 batches" in run.ends(1)


def until_it_waits(place, run):
    """Until all batches that were ready are used up."""
    known = -1
    while known != len(place.records()):
        known = len(place.records())
        assert not run.over(), run.err
        time.sleep(1.0)


@pytest.mark.parametrize("step", [0, 6])
def test_row_25_a_signal_while_images_do_not_come(place, whole, step):
    """Not only after worker_timeout; what the last step has left is saved."""
    run = place.start(*trick("Slow", seconds=0.05), "num_workers=1", "worker_timeout=300")
    if step:
        place.until_step(step, run)
    place.until(lambda: children_of(run.pid), run)
    (worker,) = children_of(run.pid)
    os.kill(worker, signal.SIGSTOP)
    until_it_waits(place, run)
    done = len(place.records())
    assert done < 40
    began = time.monotonic()
    run.send(signal.SIGTERM)
    run.ends(75)
    assert time.monotonic() - began < 10.0
    if done:
        assert f"after step {done}; " in run.out
        assert f"step-{done:06d}.ckpt" in place.checkpoints()
    assert not os.path.exists(f"/proc/{worker}")
    place()
    assert [record["step"] for record in place.records()] == list(range(1, 41))  # none twice
    assert_equal_runs(place, whole)


def test_a_temporary_folder_with_a_long_path(place, whole):
    """Of more than the 107 bytes that a socket's path may have: another is used."""
    long = place.folder / ("long" * 40)
    long.mkdir()
    before = set(os.listdir("/tmp"))
    assert place("num_workers=2", env={"TMPDIR": str(long)}) == ""
    assert not list(long.iterdir())
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("pymp-")]
    assert_equal_runs(place, whole)


SMALL_SHM = "mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {command}"
MAY_MOUNT = subprocess.run(
    ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
).returncode == 0  # fmt: skip


@pytest.mark.skipif(not MAY_MOUNT, reason="mounts need root")
@pytest.mark.parametrize(
    ("size", "words"),
    [("4k", "loader processes cannot be started"), ("200k", "shared memory is full")],
)
def test_a_small_shared_memory(place, cache, size, words):
    """No room for semaphores; none for a batch."""
    program = os.path.join(os.path.dirname(sys.executable), "ssl-xcit")
    command = shlex.join([program, *TOY, "num_workers=2", "name=x"])
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", SMALL_SHM.format(size=size, command=command)],
        cwd=place.folder, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert "/dev/shm" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) <= 3
    assert "Traceback" not in done.stderr
