"""Shards behind URLs: the same images in the same order, whatever server, disk and index do."""

import contextlib
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import aiohttp
import fsspec
import numpy as np
import pytest
from faulty_server import FaultyServer
from samples import logged, photo, tar

from ssl_xcit.data import checks, remote, tar_listing
from ssl_xcit.data.crop_dataset import check_images
from ssl_xcit.data.identity import index_of
from ssl_xcit.data.order import Shards, image_at
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.remote import LISTING, FileCache, RemoteFile, expanded, find_tars
from ssl_xcit.data.sets import arrays
from ssl_xcit.data.shard_writer import INDEX, ShardJob, write_index, write_shards
from ssl_xcit.data.shards import labelled_shards, tar_shards
from ssl_xcit.errors import MissingPath, RunFailed, UserError
from ssl_xcit.training.datamodule import multi_crop_data

BAD = {"busy": 0.1, "cut": 0.1, "slow": 0.1}


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    """Short pauses, small blocks, and a cache folder of each test's own."""
    monkeypatch.setattr(remote, "PAUSE", 0.005)
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    fsspec.filesystem("memory").store.clear()


def write(folder, num_images=60, images_per_shard=20, size=4):
    """Shards of images whose first pixel is their number."""
    numbers = np.arange(num_images)
    images = np.random.default_rng(0).integers(0, 256, (num_images, size, size, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    folder.mkdir(parents=True)
    np.save(folder.parent / "images.npy", images)
    np.save(folder.parent / "labels.npy", numbers % 3)
    files = [str(folder.parent / f"{name}.npy") for name in ("images", "labels")]
    job = ShardJob(arrays(*files), RGB, numbers, images_per_shard, folder)
    write_index(job, {}, write_shards(job, {}, 0, 60.0))
    return folder


@pytest.fixture
def tars(tmp_path):
    """Three shards of twenty images."""
    return write(tmp_path / "tars")


def to_memory(folder, place="memory://bucket/train", names="*"):
    """Copy files to fsspec's file system in memory."""
    for file in sorted(folder.glob(names)):
        fsspec.filesystem("memory").pipe_file(f"{place}/{file.name}", file.read_bytes())
    return place


def contents(source):
    return [source.read(i) for i in range(len(source))]


def held(cache):
    """Bytes of all files in a cache; 0 where files came or went while they were counted."""
    before, total = sorted(os.listdir(cache)), 0
    for name in before:
        with contextlib.suppress(FileNotFoundError):
            total += os.path.getsize(cache / name) if (cache / name).is_file() else 0
    return total if sorted(os.listdir(cache)) == before else 0


class WholeImages:
    """In place of crops: the pixels, and the seed in the first of them."""

    global_size = 4

    def check(self, channels):
        return None

    def __call__(self, picture, seed):
        pixels = picture.pixels().copy()
        pixels[0, 0, 2] = seed % 256
        return np.stack([pixels, pixels]), np.empty((0, 4, 4, 3), np.uint8)


def batches(source, workers, num_images, start=0, batch_size=50):
    augment = WholeImages()
    steps = num_images // batch_size
    data = multi_crop_data(source, augment, batch_size, steps, 3, RGB, num_workers=workers)
    data.load_state_dict({"step": start})
    return list(data.train_dataloader())


@pytest.mark.slow
def test_ten_thousand_images_from_a_faulty_server(tmp_path):
    """Each exactly once, in the order that the same shards have on disk, crops alike; resumed too.
    The cache holds half of them.
    """
    folder = write(tmp_path / "tars", 10_000, 500)
    local = tar_shards(str(folder), window=1000)
    total = sum(f.stat().st_size for f in folder.glob("*.tar"))
    with FaultyServer(folder, BAD) as server:
        cache = tmp_path / "cache"
        source = tar_shards(server.url, 1000, (), str(cache), total / 2e9)
        largest, stop = [0], threading.Event()

        def watch():
            while not stop.wait(0.005):
                largest[0] = max(largest[0], held(cache))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        loaded = batches(source, 3, 10_000)
        stop.set()
        watcher.join()
        order = [int(i) for batch in loaded for i in batch.indices]
        assert sorted(order) == list(range(10_000))
        assert order == [image_at(3, p, 10_000, local.shards) for p in range(10_000)]
        assert all(server.done[fault] > 5 for fault in BAD)
        assert 0 < largest[0] <= total / 2
        tars_only = {k: v for k, v in server.sent.items() if k.endswith(".tar")}
        assert len(tars_only) == 20
        sizes = {name: (folder / name).stat().st_size for name in tars_only}
        again = batches(source, 2, 10_000, start=190)
    on_disk = batches(local, 0, 10_000, start=190)
    for one, two, three in zip(loaded[190:], again, on_disk, strict=True):
        assert one.indices.tolist() == two.indices.tolist() == three.indices.tolist()
        assert one.global_crops.equal(two.global_crops)
        assert one.global_crops.equal(three.global_crops)
    assert sum(tars_only.values()) < 1.5 * sum(sizes.values())  # whatever was cut goes on


def test_images_labels_and_identity_are_those_on_disk(tars, tmp_path, monkeypatch):
    local = tar_shards(str(tars), window=7)
    place = to_memory(tars)
    monkeypatch.setattr(
        tar_listing, "list_tar", lambda *args: 1 / 0
    )  # the listing lies beside them
    source = tar_shards(place, window=7)
    cache = tmp_path / "home/ssl_xcit/remote"
    assert len(list(cache.glob("[0-9a-f]*"))) == 1  # the listing alone has been fetched
    assert source.name(21) == "memory://bucket/train/shard-000001.tar/000000021"
    assert index_of(source).digest() == index_of(local).digest()
    check_images(source, 4, RGB)
    assert len(list(cache.glob("[0-9a-f]*"))) == 2  # of the shards one
    assert contents(source) == contents(local)
    assert source.labels.tolist() == local.labels.tolist() == [i % 3 for i in range(60)]
    assert pickle.loads(pickle.dumps(source)).read(59) == local.read(59)  # noqa: S301
    part = tar_shards(f"{place}/shard-{{000001..000002}}.tar")
    assert contents(part) == contents(local)[20:]
    assert contents(tar_shards(f"{place}/shard-*2.tar")) == contents(local)[40:]
    two = tar_shards([f"{place}/shard-000002.tar", f"{place}/{INDEX}"])
    assert contents(two) == contents(local)[40:] + contents(local)
    pair = labelled_shards(place, test_fraction=0.2)
    assert len(pair.train) + len(pair.test) == 60
    with pytest.raises(UserError, match="name folders or URLs, not both"):
        tar_shards([place, str(tars)])


def test_class_names_come_from_the_index_as_it_was_first_read(tmp_path, monkeypatch):
    """A server that refuses it later, by rate or by a token's age, scrambles no labels."""
    place = to_memory(write(tmp_path / "tars"))
    index = json.loads((tmp_path / "tars" / INDEX).read_text()) | {"class_names": ["7", "1", "4"]}
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{place}/{INDEX}", json.dumps(index).encode())
    monkeypatch.setattr(memory, "cat_file", Mock(side_effect=FileNotFoundError))
    source = tar_shards(place)
    assert source.class_names == ("7", "1", "4")
    del index["listing"]  # as older versions wrote it
    memory.pipe_file(f"{place}/{INDEX}", json.dumps(index).encode())
    assert tar_shards(place).class_names == ("7", "1", "4")


def test_check_blames_no_image_for_a_server_that_hangs(tmp_path, monkeypatch):
    """Loader processes wait for it until they are killed; images that come are inspected."""
    place = to_memory(write(tmp_path / "tars", 20, 20))
    source, whole, itself = tar_shards(place), remote.file_system, os.getpid()
    down = failing(TimeoutError("slow"))

    def hanging(url):
        return down(url) if os.getpid() == itself else time.sleep(600)

    blamed = checks.InspectedImage("", 0, 0, b"", "decoding it takes more than a minute")
    with monkeypatch.context() as patched:
        patched.setattr(remote, "file_system", hanging)
        patched.setattr(checks, "inspect_in_process", lambda *args: blamed)
        with pytest.raises(RunFailed, match=r"TimeoutError: slow, 8 times in a row"):
            list(checks.inspect_all(source, RGB, 1, 0.3))
    down = whole
    monkeypatch.setattr(remote, "file_system", hanging)
    images = list(checks.inspect_all(source, RGB, 1, 0.3))
    assert [image.reason for image in images] == [""] * 20


def test_tars_of_others_are_fetched_once_to_be_listed(tmp_path, capsys, caplog, monkeypatch):
    for shard in range(3):
        names = range(4 * shard, 4 * shard + 4)
        tar(tmp_path / f"t/{shard}.tar", [(f"{i}.png", photo(i)) for i in names] + [("x", b"")])
    with (tmp_path / "t/1.tar").open("r+b") as file:
        file.truncate(2048)
    local = tar_shards(str(tmp_path / "t"))
    caplog.clear()
    with FaultyServer(tmp_path / "t") as server:
        urls = [f"{server.url}/{i}.tar?token=secret" for i in range(3)]
        source = tar_shards(urls)
        assert "3 have no shards.json of ssl-xcit shard beside them" in capsys.readouterr().out
        assert "secret" not in "".join(map(source.name, range(len(source))))
        assert f"{server.url}/1.tar: damaged after" in " ".join(logged(caplog))
        assert contents(source) == contents(local)
        assert index_of(source).digest() == index_of(local).digest()
        before = dict(server.sent)
        monkeypatch.setattr(tar_listing, "list_tar", lambda *args: 1 / 0)
        assert contents(tar_shards(urls)) == contents(local)
        assert dict(server.sent) == before


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path, ranges):
    content = np.random.default_rng(0).bytes(400_000)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.tar").write_bytes(content)
    with FaultyServer(tmp_path / "s", {"cut": 0.5}, ranges=ranges) as server:
        cache = remote.open_cache(tmp_path / "cache", 1)
        file = RemoteFile(f"{server.url}/a.tar", len(content))
        (cache.folder / f".{file.name}.400000.part").write_bytes(
            content[:250_000]
        )  # of a killed one
        assert cache.fetch(file).read_bytes() == content
        assert server.done["cut"] > 0
        sent = server.sent["a.tar"]
        assert sent == 150_000 if ranges else sent >= 400_000
    assert sorted(p.name for p in cache.folder.iterdir()) == sorted([file.name, "locks"])


KILLED = """
import sys
from pathlib import Path
from ssl_xcit.data import remote
remote.BLOCK = 2**14
remote.open_cache(Path(sys.argv[1]), 1).fetch(remote.RemoteFile(*sys.argv[2:3], int(sys.argv[3])))
"""


def test_a_fetch_that_is_killed_leaves_nothing_that_counts(tmp_path):
    content = np.random.default_rng(0).bytes(400_000)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.tar").write_bytes(content)
    cache = remote.open_cache(tmp_path / "cache", 1)
    with FaultyServer(tmp_path / "s", bytes_per_second=400_000) as server:
        file = RemoteFile(f"{server.url}/a.tar", len(content))
        words = [sys.executable, "-c", KILLED, str(cache.folder), file.url, str(file.size)]
        with subprocess.Popen(words) as process:
            part = cache.folder / f".{file.name}.400000.part"
            deadline = time.monotonic() + 60
            while not (part.exists() and part.stat().st_size > 20_000):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kept = part.stat().st_size
        assert 0 < kept < file.size
        assert not cache.path(file).exists()
        server.sent["a.tar"] = 0
        server.bytes_per_second = None
        assert cache.fetch(file).read_bytes() == content
        assert server.sent["a.tar"] == file.size - kept


def test_processes_and_threads_fetch_a_file_once(tmp_path):
    content = bytes(300_000)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a.tar").write_bytes(content)
    with FaultyServer(tmp_path / "s", {"slow": 1.0}) as server:
        cache = remote.open_cache(tmp_path / "cache", 1)
        file = RemoteFile(f"{server.url}/a.tar", len(content))
        words = [sys.executable, "-c", KILLED, str(cache.folder), file.url, str(file.size)]
        others = [subprocess.Popen(words) for _ in range(2)]
        threads = [threading.Thread(target=cache.fetch, args=(file,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [other.wait(60) for other in others] == [0, 0]
        assert server.sent["a.tar"] == len(content)
    assert cache.path(file).read_bytes() == content


def test_a_wrong_checksum_is_fetched_again_once(tars, caplog):
    place = to_memory(tars)
    memory, name = fsspec.filesystem("memory"), f"{place}/shard-000001.tar"
    good = memory.cat_file(name)
    bad = bytearray(good)
    bad[600] ^= 1
    memory.pipe_file(name, bytes(bad))
    source = tar_shards(place)
    with pytest.raises(RunFailed, match=r"shard-000001.tar: twice its SHA-256 was not that of"):
        source.read(20)
    assert "shard-000001.tar: not the checksum of shards.json; fetched again" in logged(caplog)[0]
    memory.pipe_file(name, good)
    assert source.read(20) == tar_shards(str(tars)).read(20)


def test_what_is_removed_or_damaged_in_the_cache_comes_again(tars, tmp_path, caplog):
    source = tar_shards(to_memory(tars), 1, (), str(tmp_path / "c"))
    first = source.read(0)
    file = source.fetcher.cache.path(source.fetcher.files[0])
    file.unlink()
    assert source.read(0) == first  # still open
    os.truncate(source.fetcher.cache.fetch(source.fetcher.files[0]), 100)
    again = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert again.read(0) == first
    assert "was damaged in" in logged(caplog)[-1]


def test_the_least_recently_used_go_first(tmp_path):
    (tmp_path / "s").mkdir()
    cache = remote.open_cache(tmp_path / "cache", 3500 / 1e9)
    files = [RemoteFile(f"memory://b/{i}.tar", 1000) for i in range(4)]
    for file in files:
        fsspec.filesystem("memory").pipe_file(file.url, bytes(1000))
    for age, file in zip((3, 2, 1), files, strict=False):
        os.utime(cache.fetch(file), (time.time() - 100 * age,) * 2)
    cache.fetch(files[0])  # is used again
    old, new = (cache.folder / f".{letter * 64}.500.part" for letter in "ab")
    mine = [cache.folder / name for name in ("photos.tar", "foo.part")]  # not of the cache
    for path in mine:
        path.write_bytes(bytes(10_000))
        os.utime(path, (0, 0))
    for part in (old, new):  # of a process that was killed long ago, and of one at work
        part.write_bytes(b"")
    os.utime(old, (0, 0))
    cache.fetch(files[3])
    there = [cache.path(file).exists() for file in files]
    assert there == [True, False, True, True]  # with what is reserved that is the limit
    assert new.exists()
    assert not old.exists()
    assert all(path.exists() for path in mine)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_said_with_the_setting(tmp_path, monkeypatch):
    cache = remote.open_cache(tmp_path, 7)
    file = RemoteFile("memory://b/a.tar", 100_000)
    fsspec.filesystem("memory").pipe_file(file.url, bytes(100_000))
    (tmp_path / f".{file.name}.{file.size}.part").symlink_to("/dev/full")
    monkeypatch.setattr(FileCache, "make_room", lambda *args: None)
    with pytest.raises(
        RunFailed, match=r"No space left on device.*data\.cache=DIR.*data\.cache_gb"
    ):
        cache.fetch(file)
    monkeypatch.setattr(FileCache, "make_room", lambda *args: os.mkdir("/proc/none"))
    with pytest.raises(RunFailed, match=r"data\.cache=.* cannot be written"):
        cache.fetch(file)


def test_a_limit_below_what_is_mixed_is_said(tars):
    size = (tars / "shard-000000.tar").stat().st_size
    with pytest.raises(
        UserError, match=r"data\.cache_gb=1e-06: up to 3 shards.*data\.cache_gb="
    ) as e:
        tar_shards(to_memory(tars), 10, (), None, 1e-6)
    value = float(str(e.value).rpartition("set data.cache_gb=")[2].split()[0])
    assert 3 * size <= value * 1e9 <= 3.1 * size
    tar_shards(to_memory(tars), 10, (), None, value)


class Response:
    def __init__(self, status):
        self.status_code = status


class NoCredentialsError(Exception):
    pass


def failing(error):
    class Files:
        def open(self, *args, **kwargs):
            raise error

        ls = info = open

    return lambda url: Files()


def hidden(error):
    missing = FileNotFoundError("x")
    missing.__cause__ = error
    return missing


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (
            "s3://b/d",
            PermissionError("Access Denied"),
            r"s3://b/d: access is denied \(403\): .*AWS_P",
        ),
        ("s3://b/d", NoCredentialsError("x"), r"login is needed \(401\): .*AWS_ACCESS_KEY_ID"),
        ("s3://b/d", FileNotFoundError("The specified bucket does not exist"), "no such bucket"),
        ("gs://b/d", OSError("Forbidden: b/d"), "GOOGLE_APPLICATION_CREDENTIALS"),
        ("hf://datasets/a/b", FileNotFoundError("x"), "no such .*HF_TOKEN"),
        ("http://127.0.0.1/x.tar", hidden(TimeoutError("slow")), r"TimeoutError: slow, 6 times"),
    ],
)
def test_a_server_that_refuses_says_what_to_set(place, error, message, monkeypatch):
    monkeypatch.setattr(remote, "file_system", failing(error))
    with pytest.raises((UserError, RunFailed), match=message):
        tar_shards(place)


def test_statuses_of_http(tars, monkeypatch):
    statuses = {"000001.tar": 403, "000002.tar": 404}
    with FaultyServer(tars, statuses=statuses) as server:
        source = tar_shards(server.url)
        assert source.read(0)
        with pytest.raises(UserError, match=r"000001.tar: access is denied \(403\): .*netrc"):
            source.read(20)
        with pytest.raises(UserError, match=r"000002.tar: no such bucket, folder or file \(404\)"):
            source.read(40)  # no image is to blame
        with pytest.raises(UserError, match="where a server lists no folder, name the tars"):
            tar_shards(f"{server.url}/none")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="pip install 'ssl-xcit\\[remote\\]' s3fs"):
        tar_shards("s3://b/d")
    with pytest.raises(UserError, match="nope:// is not known"):
        tar_shards("nope://b/d")


def test_a_refusal_in_a_loader_process_is_one_line(tars):
    with FaultyServer(tars, statuses={"000001.tar": 403, "000000.tar": 403}) as server:
        source = tar_shards(server.url)
        with pytest.raises(UserError, match=r"^http\S+tar: access is denied \(403\): .*token$"):
            batches(source, 1, 60, batch_size=20)


def test_retry_after_and_pauses(monkeypatch):
    pauses, calls = [], []
    monkeypatch.setattr(remote, "PAUSE", 1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)

    def busy():
        calls.append(1)
        headers = {"Retry-After": "20"} if len(calls) == 1 else {}
        request = SimpleNamespace(real_url="http://h/x")
        raise aiohttp.ClientResponseError(request, (), status=429, headers=headers)

    with pytest.raises(RunFailed, match=r"status 429, 8 times in a row"):
        remote.retried(busy, "http://h/x")
    assert pauses[0] == 20
    for pause, middle in zip(pauses[1:], (2, 4, 8, 16, 30, 30), strict=True):
        assert middle / 2 <= pause <= middle * 1.5
    with pytest.raises(TypeError):  # ours, and not the server's
        remote.retried(lambda: len(5), "http://h/x")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["shards"][0].update(file="../../etc/x.tar"),
        lambda index: index["shards"][0].update(file="/etc/x.tar"),
        lambda index: index["shards"][0].update(bytes=-5),
        lambda index: index["shards"][0].update(tar_sha256="../../../x"),
        lambda index: index["listing"].update(sha256="../x"),
        lambda index: index.pop("listing"),
        lambda index: index.update(shards=7),
    ],
)
def test_a_hostile_index_is_not_used(tars, change, caplog):
    index = json.loads((tars / INDEX).read_text())
    change(index)
    (tars / INDEX).write_text(json.dumps(index))
    source = tar_shards(to_memory(tars))
    assert len(source) == 60
    assert "is no index with checksums" in logged(caplog)[0]
    assert all(file.url.startswith("memory://bucket/train/shard-") for file in source.fetcher.files)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["offsets"].__setitem__(0, -1),
        lambda row: row["offsets"].__setitem__(0, 10**7),
        lambda row: row["sizes"].__setitem__(0, 10**9),
        lambda row: row["sizes"].__setitem__(0, 2**70),
        lambda row: row["keys"].pop(),
        lambda row: row["keys"].__setitem__(0, 5),
        lambda row: row.update(other=1),
        lambda row: row.pop("skipped"),
    ],
)
def test_a_hostile_listing_is_said(tars, tmp_path, change):
    sizes = {}
    rows = [
        json.loads(line) for line in gzip.decompress((tars / LISTING).read_bytes()).splitlines()
    ]
    for row in rows:
        sizes[row["tar"]] = (tars / "shard-000000.tar").stat().st_size
    assert len(tar_listing.read_listings(tars / LISTING, sizes, "x")) == 3
    change(rows[0])
    with gzip.open(tmp_path / "l.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(UserError, match="x is no listing of ssl-xcit shard"):
        tar_listing.read_listings(tmp_path / "l.gz", sizes, "x")
    content = (tars / LISTING).read_bytes()
    for damaged in (b"no gzip", content[:-20], content[:50] + b"x" * 9 + content[59:]):
        (tmp_path / "l.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="is no listing"):
            tar_listing.read_listings(tmp_path / "l.gz", sizes, "x")


def test_patterns():
    assert expanded("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expanded("{9..10}-{0..1}.tar") == ["9-0.tar", "9-1.tar", "10-0.tar", "10-1.tar"]
    for bad in ("a-{5..1}.tar", "a-{0..99999999}.tar", "a-{x,y}.tar"):
        with pytest.raises(UserError, match=r"data\.root: a-"):
            expanded(bad)
    with pytest.raises(UserError, match="in the last part only"):
        find_tars("memory://b/*/x.tar")
    with pytest.raises(MissingPath, match=r"memory://b: no .*404"):
        find_tars("memory://b")
    fsspec.filesystem("memory").pipe_file("memory://b/readme.txt", b"")
    with pytest.raises(MissingPath, match="no tar shards"):
        find_tars("memory://b")


@pytest.mark.parametrize("window", [1, 7, 30, 1000])
def test_upcoming_shards_are_those_that_are_read(window):
    sizes = np.array([4, 1, 7, 3, 10])
    told = []
    announced = Shards(sizes, window, lambda moment, upcoming: told.append((moment, upcoming())))
    starts = np.r_[0, sizes.cumsum()]
    for position in range(60):
        announced.announce(5, position)
        moment, upcoming = told[-1]
        pass_index, place = divmod(position, 25)
        assert moment == (5, pass_index, place // window)
        end = min((place // window + 1) * window, 25) + 25 * pass_index  # of the window
        after = min(end % 25 // window * window + window, 25) - end % 25  # images of the next one
        images = [image_at(5, p, 25, announced) for p in range(position, end + after)]
        read = {int(np.searchsorted(starts, i, side="right")) - 1 for i in images}
        assert read <= set(upcoming)
        assert len(upcoming) == len(set(upcoming))


def test_shards_are_there_before_they_are_read(tars, tmp_path):
    source = tar_shards(to_memory(tars), 20, (), str(tmp_path / "c"))
    source.shards.announce(3, 0)
    deadline = time.monotonic() + 30
    upcoming = source.shards.upcoming(3, 0)
    while not all(source.fetcher.cache.path(source.fetcher.files[s]).exists() for s in upcoming):
        assert time.monotonic() < deadline
        time.sleep(0.01)
