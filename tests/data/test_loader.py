"""Batches: the same whatever the workers, whatever happens to them, and whatever is bad."""

import _multiprocessing
import errno
import itertools
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from samples import SMALL, encoded, gradient_image, put
from torch.utils.data import DataLoader

from ssl_xcit.data import loader as loading
from ssl_xcit.data.bad_samples import BadSamples
from ssl_xcit.data.checks import inspect_in_process
from ssl_xcit.data.crop_dataset import CropDataset, check_images, plain_loader, stack
from ssl_xcit.data.fused import FusedMultiCrop
from ssl_xcit.data.loader import NoWorkers, ResilientLoader, cause_of, parallel_map
from ssl_xcit.data.multicrop import Replaced, TorchvisionMultiCrop
from ssl_xcit.data.order import Positions, image_at
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.sources import Files, Subset
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.training.datamodule import multi_crop_data
from ssl_xcit.utils import hardware


def batches(source, workers, start_step=0, steps=4, augment=None):
    augment = FusedMultiCrop(**SMALL) if augment is None else augment
    data = multi_crop_data(source, augment, 6, steps, 3, RGB, num_workers=workers)
    data.load_state_dict({"step": start_step})
    return list(data.train_dataloader())


def same_crops(one, other):
    pairs = [(one.global_crops, other.global_crops), (one.local_crops, other.local_crops)]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def good_and_bad(tmp_path):
    """Two paths: an image, and a file that is none."""
    put(tmp_path / "good.png", encoded(gradient_image()))
    put(tmp_path / "bad.jpg", b"<html>")
    return str(tmp_path / "good.png"), str(tmp_path / "bad.jpg")


@pytest.mark.parametrize("augment", [FusedMultiCrop, TorchvisionMultiCrop])
def test_crops_do_not_depend_on_workers_or_on_where_a_run_began(photos_pair, augment):
    source, augment = Subset(photos_pair.train, np.arange(0, 40)), augment(**SMALL)
    alone = batches(source, 0, augment=augment)
    assert len(alone) == 4
    for workers in (1, 2, 4):
        for a, b in zip(alone, batches(source, workers, augment=augment), strict=True):
            assert same_crops(a, b)
            assert torch.equal(a.indices, b.indices)
    resumed = batches(source, 0, start_step=2, augment=augment)
    assert [b.indices.tolist() for b in resumed] == [b.indices.tolist() for b in alone[2:]]
    assert same_crops(resumed[0], alone[2])
    order = [i for b in alone for i in b.indices.tolist()]
    assert order == [image_at(3, position, 40) for position in range(24)]


@pytest.mark.parametrize("augment", [FusedMultiCrop, TorchvisionMultiCrop])
def test_stages_end_at_a_step(photos_pair, augment):
    """Crops of each step are those of a recipe of its stage; also of a rank, and resumed."""
    source = Subset(photos_pair.train, np.arange(0, 40))
    numbers = {"global_size": 24, "num_local": 1}, {"num_local": 0}
    stages = [{"until": share, **n} for share, n in zip((0.25, 0.6), numbers, strict=True)]
    plain, staged = augment(**SMALL), augment(**SMALL, stages=stages)
    whole = batches(source, 1, augment=staged)
    for step, batch in enumerate(whole):  # 4 steps: shares 0, 0.25, 0.5, 0.75
        recipe = {0: {**SMALL, **numbers[0]}, 3: SMALL}.get(step, {**SMALL, **numbers[1]})
        assert same_crops(batch, batches(source, 0, augment=augment(**recipe))[step])
    assert same_crops(whole[3], batches(source, 0, augment=plain)[3])
    assert same_crops(batches(source, 0, start_step=2, augment=staged)[0], whole[2])
    halves = CropDataset(source, staged, 3, RGB, images_per_step=6, total_steps=4)
    for rank in range(2):  # three images of each step
        for step, place in enumerate(Positions(0, 4, 3, rank, 2)):
            part = halves[place].global_crops
            assert torch.equal(part, whole[step // 3].global_crops[3 * rank + step % 3])
    assert staged.described(1000) == (
        "2 x 24 + 1 x 16 until step 250, 2 x 32 until step 600, then 2 x 32 + 3 x 16"
    )


@pytest.mark.parametrize(
    "stages",
    [
        [{"until": 0.5}], [{"global_size": 32}], [{"until": 0.5, "jitter": 1}],
        [{"until": 0.5, "num_local": 1}, {"until": 0.5, "num_local": 2}],
        [{"until": 1.5, "num_local": 1}], [{"until": 0.5, "global_size": 0}],
        [{"until": 0.5, "local_size": 12.5}],
    ],
)  # fmt: skip
def test_stages_that_are_none(stages):
    with pytest.raises(UserError, match=r"augment\.stages: .* is not a stage: it needs until"):
        FusedMultiCrop(stages=stages)


def test_bad_images_cost_a_line_and_change_no_other(tmp_path, caplog):
    """Two folders, alike but for bad images in one: all other crops are identical."""
    stand_in = {2: 4, 3: 4, 7: 8, 11: 12}
    images = [encoded(np.roll(gradient_image(), i, axis=1)) for i in range(20)]
    for i, image in enumerate(images):
        put(tmp_path / f"all_good/{i:02d}.png", image)
        put(tmp_path / f"some_bad/{i:02d}.png", b"<html>" if i in stand_in else image)
    folders = [sorted(map(str, (tmp_path / name).iterdir())) for name in ("all_good", "some_bad")]
    good, mixed = (batches(Files(paths), 0, steps=10) for paths in folders)
    stood_in = 0
    for a, b in zip(good, mixed, strict=True):
        wanted = a.indices.tolist()
        assert b.indices.tolist() == [stand_in.get(i, i) for i in wanted]
        whole = torch.tensor([i not in stand_in for i in wanted])
        stood_in += (~whole).sum().item()
        assert torch.equal(a.global_crops[whole], b.global_crops[whole])
        assert torch.equal(a.local_crops[whole], b.local_crops[whole])
    assert stood_in == 12  # 60 positions are 3 passes
    replaced = [r for b in mixed for r in b.replaced]
    assert {r.place for r in replaced} == set(stand_in)
    assert all("cannot identify" in r.reason for r in replaced)

    path = tmp_path / "run/bad_samples.jsonl"
    report = BadSamples(path, 20, 0.5)
    with caplog.at_level(logging.WARNING):
        for batch in mixed:
            report.add(batch.replaced)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["place"] for row in rows) == sorted(stand_in)  # once each
    assert caplog.text.count("bad image:") == 1
    again = BadSamples(path, 20, 0.5)  # a run that goes on
    again.add(replaced)
    assert len(path.read_text().splitlines()) == len(again) == 4
    one, other = (BadSamples(tmp_path / "two/bad_samples.jsonl", 20, 0.09) for _ in range(2))
    one.add(replaced[:1])  # two ranks: each knows of the other's when it adds its own
    with pytest.raises(RunFailed, match="2 of 20"):
        other.add([Replaced(19, "x", "y")])


def test_too_many_bad_images_end_the_run(tmp_path):
    path, one = tmp_path / "bad_samples.jsonl", Replaced(1, "/x/a/1.jpg", "empty file")
    report = BadSamples(path, 100, 0.02)
    report.add([one, Replaced(5, "/x/a/5.jpg", "empty file")])
    with pytest.raises(RunFailed) as failed:
        report.add([Replaced(7, "/x/b/7.png", "OSError: image file is truncated")])
    for word in (
        "3 of 100 images are bad (3.0 %", "allows 2 %", "2 empty files, 1 truncated",
        "2 in /x/a, 1 in /x/b", "/x/a/1.jpg", "ssl-xcit check",
    ):  # fmt: skip
        assert word in str(failed.value)
    with pytest.raises(RunFailed, match="3 of 100"):
        BadSamples(path, 100, 0.02).add([one])  # the same command once more
    BadSamples(path, 100, 0.03).add([one])


def test_a_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"place": 3, "name": "a", "reason": "b"}\n{"place": 4, "na')
    report = BadSamples(path, 10, 1.0)
    assert len(report) == 1
    report.add([Replaced(9, "x", "y")])
    assert set(BadSamples(path, 10, 1.0).known) == {3, 9}


def test_bad_images_in_a_row_do_not_end_a_run(good_and_bad):
    """An interrupted copy: the last 60 of 400; others than neighbours stand in."""
    good, bad = good_and_bad
    seen = batches(Files([good] * 340 + [bad] * 60), 0, steps=60)
    assert all(isinstance(b.indices, torch.Tensor) for b in seen)
    assert len({int(i) for b in seen for i in b.indices}) > 200


def test_nothing_readable(good_and_bad):
    source = Files([good_and_bad[1]] * 3)
    with pytest.raises(ValueError, match=r"none of 3 images tried can be read.*bad.jpg"):
        check_images(source, 32, RGB)
    dataset = CropDataset(source, FusedMultiCrop(**SMALL), 0, RGB)
    batch = stack([dataset[0], dataset[1]])
    assert len(batch.replaced) == 64
    data = multi_crop_data(source, FusedMultiCrop(**SMALL), 2, 1, 0, RGB, 0, max_bad_fraction=1.0)
    with pytest.raises(RunFailed, match="none of 32 images tried"):
        data.on_before_batch_transfer(batch, 0)


def test_evaluation_leaves_bad_images_out(good_and_bad, caplog):
    source = Files([*good_and_bad[::-1]])
    with caplog.at_level(logging.WARNING):
        pixels, good = next(iter(plain_loader(source, 48, 48, 2, 0, RGB)))
    assert good.tolist() == [False, True]
    assert pixels[1].any()
    assert "bad image skipped" in caplog.text


def test_small_images_are_said_once(photos_pair, caplog):
    check_images(photos_pair.test, 64, RGB)
    assert not caplog.text
    check_images(photos_pair.test, 224, RGB)
    assert caplog.text.count("smaller than the crop of 224") == 1


def test_workers_share_the_cores_of_the_machine():
    assert hardware.default_workers(1) == min(12, max(0, hardware.usable_cores() - 1))
    assert hardware.default_workers(10_000) == 0


def accident(folder, at, harm):
    """Numbers; at some of them the process comes to harm, once each."""

    def function(index):
        mark = folder / f"{index}"
        if index in at and not mark.exists():
            mark.touch()
            time.sleep(100) if harm == "hang" else os.kill(os.getpid(), harm)
        return index

    return function


def numbers(function, count=40, start=0, timeout=300.0):
    return parallel_map(function, count, 2, start, timeout, chunk=4)


def received(loader):
    return [item for chunk in loader for item in chunk]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.loader.POLL", 0.5)


@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, "hang"])
def test_a_worker_that_dies_or_hangs_changes_nothing(tmp_path, quick, caplog, harm):
    with caplog.at_level(logging.WARNING):
        loader = numbers(accident(tmp_path, {17}, harm), timeout=5.0)
        assert received(loader) == list(range(40))
    if harm in (signal.SIGKILL, signal.SIGSEGV):
        assert harm.name in caplog.text
        assert ("out of memory?" in caplog.text) == (harm == signal.SIGKILL)
    else:
        assert "within 5 s (worker_timeout)" in caplog.text
    assert re.search(r"started again at batch [0-4],", caplog.text)


def test_the_third_accident_ends_it(tmp_path, quick):
    function = accident(tmp_path, {8, 60, 110}, signal.SIGKILL)
    with pytest.raises(RunFailed, match=r"3rd time within 100 batches, at batch 2\d"):
        list(numbers(function, count=200))
    assert received(numbers(function, count=200, start=20)) == list(range(80, 200))


def test_a_worker_killed_within_a_message_does_not_hang_the_reader(quick):
    """A megabyte through a pipe of 64 KB, nobody reads, the writer dies."""
    last_bytes = []
    for (item,) in parallel_map(lambda i: bytes(2**20) + bytes([i]), 12, 1, chunk=1):
        last_bytes.append(item[-1])
        if len(last_bytes) in (3, 6):
            time.sleep(0.3)
            for child in multiprocessing.active_children():
                child.kill()
    assert last_bytes == list(range(12))


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RuntimeError("a bug"), RuntimeError, "a bug"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), NoWorkers,
         r"\(OSError: .Errno 24. Too many open files\): raise the"),
    ],
)  # fmt: skip
def test_errors_of_the_program_are_not_accidents(quick, error, raised, message):
    def function(index):
        if index == 9:
            raise error
        return index

    with pytest.raises(raised, match=message):
        list(numbers(function))


def test_a_slow_batch_is_waited_for(quick):
    def function(index):
        time.sleep(1.2 if index == 5 else 0.0)
        return index

    loader = numbers(function, count=12, timeout=30.0)
    assert received(loader) == list(range(12))
    assert loader.waited > 1.0
    assert loader.done == 3


def tensor(index):
    """Sent through shared memory, whose descriptor comes through a socket."""
    return torch.full((4,), index)


def values_of(loader):
    return [int(one[0]) for one in received(loader)]


@pytest.fixture
def socket_settings(monkeypatch):
    """Where multiprocessing's sockets are, as a process that has made none finds it."""
    settings = multiprocessing.current_process()._config
    monkeypatch.setitem(settings, "tempdir", None)
    return settings


@pytest.mark.parametrize("name", ["long" * 40, "gone/away", "a file"])
def test_a_temporary_folder_that_holds_no_sockets(tmp_path, monkeypatch, socket_settings, name):
    if "long" in name:
        (tmp_path / name).mkdir()
    if "file" in name:
        (tmp_path / name).touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    assert values_of(numbers(tensor)) == list(range(40))
    used = Path(socket_settings["tempdir"])
    assert used.is_dir()
    assert tmp_path not in used.parents
    shutil.rmtree(used)


def test_no_folder_holds_sockets(monkeypatch, socket_settings):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(tempfile, "mkdtemp", mock.Mock(side_effect=full))
    monkeypatch.setenv("TMPDIR", "/somewhere")
    with pytest.raises(NoWorkers, match=r"TMPDIR=/somewhere.*hold none: set TMPDIR to a short"):
        values_of(numbers(tensor))


def test_the_folder_of_the_sockets_is_removed_on_the_way(socket_settings, quick, caplog):
    for number, (one,) in enumerate(parallel_map(tensor, 400, 1, chunk=1)):
        assert int(one[0]) == number
        if number == 4:
            shutil.rmtree(socket_settings["tempdir"])
    assert number == 399
    assert "the connection to a loader process broke (FileNotFoundError" in caplog.text
    assert "nothing is lost" in caplog.text


class Unsendable:
    """What the queue's thread in the worker fails on."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words", "tries"),
    [
        (RuntimeError("can't start new thread"), "ulimit -u", 1),
        (OSError("AF_UNIX path too long"), "set TMPDIR to a short path", 1),
        (RuntimeError("unable to write to shared memory"), "enlarge /dev/shm", 3),
        (ValueError("two\nlines"), "(ValueError: two)", 3),
    ],
)
def test_a_batch_that_cannot_be_sent(quick, caplog, capfd, error, words, tries):
    loader = parallel_map(lambda _: Unsendable(error), 4, 1)
    began = time.monotonic()
    with pytest.raises(RunFailed) as failed:
        list(loader)
    assert time.monotonic() - began < 10.0
    assert re.match(r"loader process \d+ ended \(\w*Error: ?", str(failed.value))
    assert words in str(failed.value)
    assert isinstance(failed.value, NoWorkers) == (tries == 1)
    assert caplog.text.count("started again") == tries - 1
    assert capfd.readouterr().err == ""
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("words", "remedy", "passes"),
    [
        ("RuntimeError: received 0 items of ancdata", "ulimit -n", False),
        ("OSError: [Errno 30] Read-only file system: '/x/pymp-1'", "TMPDIR", False),
        ("RuntimeError: unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)",
         "out of memory", True),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory", "out of memory", True),
        ("MemoryError: ", "out of memory", True),
        ("RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left",
         "enlarge /dev/shm", True),
        ("OSError: [Errno 28] No space left on device", None, None),  # while shards are written
    ],
)  # fmt: skip
def test_words_of_python_and_torch_have_a_remedy(words, remedy, passes):
    cause = cause_of(words)
    assert (cause and cause.passes) == passes
    assert remedy is None or remedy in cause.remedy


def test_a_worker_that_fails_before_it_loads(quick, monkeypatch, capfd):
    error = RuntimeError("can't start new thread")
    monkeypatch.setattr(torch, "set_num_threads", mock.Mock(side_effect=error))
    with pytest.raises(NoWorkers, match="ulimit -u"):
        values_of(numbers(tensor))
    assert capfd.readouterr().err == ""


def nothing_is_left(threads):
    """Neither processes nor more threads than before, soon."""
    deadline = time.monotonic() + 5.0
    while multiprocessing.active_children() or threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("owner", "name", "number", "error", "words"),
    [
        (os, "fork", 1, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory"),
        (os, "fork", 2, BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "ulimit -u"),
        (threading.Thread, "start", 1, RuntimeError("can't start new thread"), "ulimit -u"),
        (threading.Thread, "start", 3, RuntimeError("can't start new thread"), "ulimit -u"),
        (_multiprocessing, "SemLock", 1, OSError(errno.ENOSPC, "No space left"), "/dev/shm must"),
        (_multiprocessing, "SemLock", 9, OSError(errno.ENOSPC, "No space left"), "/dev/shm must"),
    ],
)
def test_workers_that_cannot_be_started(monkeypatch, capfd, owner, name, number, error, words):
    threads, function, calls = threading.active_count(), getattr(owner, name), itertools.count(1)

    def failing(*args, **kwargs):
        if next(calls) >= number:
            raise error
        return function(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(NoWorkers, match="loader processes cannot be started") as failed:
            values_of(numbers(tensor))
    assert words in str(failed.value)
    del failed
    assert capfd.readouterr().err == ""
    nothing_is_left(threads)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert values_of(numbers(tensor)) == list(range(40))


@pytest.mark.parametrize("room", [2, 14, 20])
def test_few_open_files(quick, room):
    """Too few to start, or to receive tensors, or hardly enough."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = [number for number in range(before[0]) if number not in used][room]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        assert values_of(parallel_map(tensor, 64, 1)) == list(range(64))
    except NoWorkers as failed:
        assert "ulimit -n 65536" in str(failed)  # noqa: PT017
    else:
        assert room > 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_whoever_waits_may_be_called_away(quick):
    def function(index):
        time.sleep(100.0 if index >= 4 else 0.0)
        return index

    loader = parallel_map(function, 8, 1, chunk=4)
    batches = iter(loader)
    next(batches)
    loader.while_waiting = mock.Mock(side_effect=KeyboardInterrupt)
    began, threads = time.monotonic(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert time.monotonic() - began < 3.0
    assert loader.done == 1
    nothing_is_left(threads)


def test_an_accident_does_not_keep_whoever_is_called_away(tmp_path, quick, caplog):
    loader = numbers(accident(tmp_path, {0}, signal.SIGKILL))

    def leave():
        if (tmp_path / "0").exists():
            raise KeyboardInterrupt

    loader.while_waiting = leave
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    assert "started again" not in caplog.text


def test_restarting_without_workers_is_the_loader():
    def make(first):
        return DataLoader(range(first * 2, 10), 2, **loading.loader_options(0))

    assert [b.tolist() for b in ResilientLoader(make, 5, start=3)] == [[6, 7], [8, 9]]
    assert len(ResilientLoader(make, 5, start=3)) == 5


def mean_of_a_large_image(index: int) -> float:
    """By OpenCV's threads, where there are several."""
    large = np.full((2000, 2000, 3), index, np.uint8)
    return float(cv2.resize(large, (500, 500), interpolation=cv2.INTER_AREA).mean())


def test_opencv_was_used_before_the_workers_begin(tmp_path):
    """Its threads are not in a copy of the process, which would wait for them."""
    put(tmp_path / "good.png", encoded(gradient_image()))
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        mean_of_a_large_image(0)
        chunks = parallel_map(mean_of_a_large_image, 4, 1, timeout=10, chunk=2)
        assert list(chunks) == [[0, 1], [2, 3]]
        assert cv2.getNumThreads() == 4
        mean_of_a_large_image(0)
        assert not inspect_in_process(Files(["good.png"], str(tmp_path)), RGB, 0).reason
    finally:
        cv2.setNumThreads(before)
