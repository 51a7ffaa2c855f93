"""Batches: the same whatever the workers, whatever happens to them, and whatever is bad."""

import json
import logging
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ssl_xcit.data.bad import BadSamples
from ssl_xcit.data.decode import RGB
from ssl_xcit.data.fused import FusedMultiCrop
from ssl_xcit.data.loader import (
    Restarting,
    default_workers,
    loader_options,
    look_at_all,
    usable_cores,
)
from ssl_xcit.data.module import CropDataset, MultiCropData, check_images, plain_loader, stack
from ssl_xcit.data.multicrop import Replaced, TorchvisionMultiCrop
from ssl_xcit.data.order import image_at
from ssl_xcit.data.sources import Files, Subset
from ssl_xcit.errors import RunFailed

SMALL = {"global_size": 32, "local_size": 16, "num_local": 3}


def batches(source, workers, start_step=0, steps=4, augment=None):
    augment = FusedMultiCrop(**SMALL) if augment is None else augment
    data = MultiCropData(source, augment, 6, steps, 3, RGB, num_workers=workers)
    data.load_state_dict({"step": start_step})
    return list(data.train_dataloader())


@pytest.mark.parametrize("augment", [FusedMultiCrop, TorchvisionMultiCrop])
def test_crops_do_not_depend_on_workers_or_on_where_a_run_began(photos_pair, augment):
    source, augment = Subset(photos_pair.train, np.arange(0, 40)), augment(**SMALL)
    alone = batches(source, 0, augment=augment)
    assert len(alone) == 4
    for workers in (1, 2, 4):
        for a, b in zip(alone, batches(source, workers, augment=augment), strict=True):
            assert torch.equal(a.global_crops, b.global_crops)
            assert torch.equal(a.local_crops, b.local_crops)
            assert torch.equal(a.indices, b.indices)
    resumed = batches(source, 0, start_step=2, augment=augment)
    assert [b.indices.tolist() for b in resumed] == [b.indices.tolist() for b in alone[2:]]
    assert torch.equal(resumed[0].local_crops, alone[2].local_crops)
    order = [i for b in alone for i in b.indices.tolist()]
    assert order == [image_at(3, position, 40) for position in range(24)]


def gradient_image(height=90, width=120):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    return pixels


def test_bad_images_cost_a_line_and_change_no_other(tmp_path, caplog):
    """Two folders, alike but for bad images in one: all other crops are identical."""
    bad = {2, 3, 7, 11}
    for name in ("all_good", "some_bad"):
        (tmp_path / name).mkdir()
        for i in range(20):
            path = tmp_path / name / f"{i:02d}.png"
            if name == "some_bad" and i in bad:
                path.write_bytes(b"<html>")
            else:
                Image.fromarray(np.roll(gradient_image(), i, axis=1)).save(path)
    sources = {
        name: Files([str(p) for p in sorted((tmp_path / name).iterdir())])
        for name in ("all_good", "some_bad")
    }
    good, mixed = (batches(source, 0, steps=10) for source in sources.values())
    stood_in = 0
    for a, b in zip(good, mixed, strict=True):
        for i in range(6):
            wanted, used = int(a.indices[i]), int(b.indices[i])
            if wanted in bad:
                stood_in += 1
                assert used == {2: 4, 3: 4, 7: 8, 11: 12}[wanted]
            else:
                assert used == wanted
                assert torch.equal(a.global_crops[i], b.global_crops[i])
                assert torch.equal(a.local_crops[i], b.local_crops[i])
    assert stood_in == 12  # 60 positions are 3 passes
    found = [r for b in mixed for r in b.replaced]
    assert {r.place for r in found} == bad
    assert all("cannot identify" in r.reason for r in found)

    report = BadSamples(tmp_path / "run/bad_samples.jsonl", 20, 0.5)
    with caplog.at_level(logging.WARNING):
        for batch in mixed:
            report.add(batch.replaced)
    rows = [json.loads(x) for x in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert sorted(row["place"] for row in rows) == sorted(bad)  # once each
    assert caplog.text.count("bad image:") == 1
    again = BadSamples(tmp_path / "run/bad_samples.jsonl", 20, 0.5)  # a run that goes on
    again.add(found)
    assert len((tmp_path / "run/bad_samples.jsonl").read_text().splitlines()) == 4
    assert len(again) == 4
    one, other = (BadSamples(tmp_path / "two/bad_samples.jsonl", 20, 0.09) for _ in range(2))
    one.add(found[:1])  # two ranks: each knows of the other's when it adds its own
    with pytest.raises(RunFailed, match="2 of 20"):
        other.add([Replaced(19, "x", "y")])


def test_too_many_bad_images_end_the_run(tmp_path):
    report = BadSamples(tmp_path / "bad_samples.jsonl", 100, 0.02)
    report.add([Replaced(1, "/x/a/1.jpg", "empty file"), Replaced(5, "/x/a/5.jpg", "empty file")])
    with pytest.raises(RunFailed) as failed:
        report.add([Replaced(7, "/x/b/7.png", "OSError: image file is truncated")])
    for word in (
        "3 of 100 images are bad (3.0 %", "allows 2 %", "2 empty files, 1 truncated",
        "2 in /x/a, 1 in /x/b", "/x/a/1.jpg", "ssl-xcit check",
    ):  # fmt: skip
        assert word in str(failed.value)
    again = BadSamples(tmp_path / "bad_samples.jsonl", 100, 0.02)  # the same command once more
    with pytest.raises(RunFailed, match="3 of 100"):
        again.add([Replaced(1, "/x/a/1.jpg", "empty file")])
    BadSamples(tmp_path / "bad_samples.jsonl", 100, 0.03).add([Replaced(1, "a", "b")])


def test_a_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"place": 3, "name": "a", "reason": "b"}\n{"place": 4, "na')
    report = BadSamples(path, 10, 1.0)
    assert len(report) == 1
    report.add([Replaced(9, "x", "y")])
    assert set(BadSamples(path, 10, 1.0).known) == {3, 9}


def test_bad_images_in_a_row_do_not_end_a_run(tmp_path):
    """An interrupted copy: the last 60 of 400; others than neighbours stand in."""
    Image.fromarray(gradient_image()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    paths = [str(tmp_path / ("bad.png" if i >= 340 else "good.png")) for i in range(400)]
    seen = batches(Files(paths), 0, steps=60)
    assert all(isinstance(b.indices, torch.Tensor) for b in seen)
    assert len({int(i) for b in seen for i in b.indices}) > 200


def test_nothing_readable(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    source = Files([str(tmp_path / f"{i}.png") for i in range(3)])
    with pytest.raises(ValueError, match=r"none of 3 images tried can be read.*0.png"):
        check_images(source, 32, RGB)
    dataset = CropDataset(source, FusedMultiCrop(**SMALL), 0, RGB)
    batch = stack([dataset[0], dataset[1]])
    assert len(batch.replaced) == 64
    data = MultiCropData(source, FusedMultiCrop(**SMALL), 2, 1, 0, RGB, 0, max_bad_fraction=1.0)
    with pytest.raises(RunFailed, match="none of 32 images tried"):
        data.on_before_batch_transfer(batch, 0)


def test_evaluation_leaves_bad_images_out(tmp_path, caplog):
    Image.fromarray(gradient_image()).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    source = Files([str(tmp_path / "bad.jpg"), str(tmp_path / "good.png")])
    with caplog.at_level(logging.WARNING):
        pixels, good = next(iter(plain_loader(source, 48, 48, 2, 0, RGB)))
    assert good.tolist() == [False, True]
    assert pixels[1].any()
    assert "bad image left out" in caplog.text


def test_small_images_are_said_once(photos_pair, caplog):
    check_images(photos_pair.test, 64, RGB)
    assert not caplog.text
    check_images(photos_pair.test, 224, RGB)
    assert caplog.text.count("smaller than the crop of 224") == 1


def test_workers_share_the_cores_of_the_machine():
    assert default_workers(1) == min(12, max(0, usable_cores() - 1))
    assert default_workers(10_000) == 0


def kill_children():
    """The loader processes, which are copies of this one."""
    for child in multiprocessing.active_children():
        child.kill()


class Accident:
    """Numbers; at some of them the process comes to harm, once each."""

    def __init__(self, folder, at, how):
        self.folder, self.at, self.how = folder, at, how

    def __call__(self, index):
        if index in self.at:
            mark = self.folder / f"{index}"
            if not mark.exists():
                mark.touch()
                if self.how == "hang":
                    time.sleep(100)
                os.kill(os.getpid(), self.how)
        return index


def numbers(look, count=40, start=0, timeout=300.0):
    return look_at_all(look, count, 2, start, timeout, chunk=4)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.loader.POLL", 0.5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, "hang"])
def test_a_worker_that_dies_or_hangs_changes_nothing(tmp_path, quick, caplog, how):
    with caplog.at_level(logging.WARNING):
        loader = numbers(Accident(tmp_path, {17}, how), timeout=5.0)
        found = [n for chunk in loader for n in chunk]
    assert found == list(range(40))
    if how in (signal.SIGKILL, signal.SIGSEGV):
        assert how.name in caplog.text
        assert ("out of memory?" in caplog.text) == (how == signal.SIGKILL)
    else:
        assert "within 5 s (worker_timeout)" in caplog.text
    assert re.search(r"started again at batch [0-4],", caplog.text)


def test_the_third_accident_ends_it(tmp_path, quick):
    loader = numbers(Accident(tmp_path, {8, 60, 110}, signal.SIGKILL), count=200)
    with pytest.raises(RunFailed, match=r"3rd time within 100 batches, at batch 2\d"):
        list(loader)
    again = numbers(Accident(tmp_path, {8, 60, 110}, signal.SIGKILL), count=200, start=20)
    assert [n for chunk in again for n in chunk] == list(range(80, 200))


def test_a_worker_killed_within_a_message_does_not_hang_the_reader(tmp_path, quick):
    """A megabyte through a pipe of 64 KB, nobody reads, the writer dies."""
    look = Accident(tmp_path, set(), 0)
    loader = look_at_all(lambda i: bytes(2**20) + bytes([look(i)]), 12, 1, chunk=1)
    found = []
    for chunk in loader:
        found += [item[-1] for item in chunk]
        if len(found) in (3, 6):
            time.sleep(0.3)
            kill_children()
    assert found == list(range(12))


def test_errors_of_the_program_are_not_accidents(quick):
    def look(index):
        if index == 9:
            raise RuntimeError("a bug")
        return index

    with pytest.raises(RuntimeError, match="a bug"):
        list(numbers(look))


def test_a_slow_batch_is_waited_for(quick):
    def look(index):
        time.sleep(1.2 if index == 5 else 0.0)
        return index

    loader = numbers(look, count=12, timeout=30.0)
    assert [n for chunk in loader for n in chunk] == list(range(12))
    assert loader.waited > 1.0
    assert loader.done == 3


def test_killed_while_training_the_crops_stay_the_same(photos_pair, quick, caplog):
    source = Subset(photos_pair.train, np.arange(60))
    expected = batches(source, 0, steps=12)
    data = MultiCropData(source, FusedMultiCrop(**SMALL), 6, 12, 3, RGB, num_workers=2)
    seen = []
    with caplog.at_level(logging.WARNING):
        for step, batch in enumerate(data.train_dataloader()):
            seen.append(batch)
            if step == 3:
                kill_children()
    assert "SIGKILL" in caplog.text
    assert len(seen) == 12
    for a, b in zip(expected, seen, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)


def test_restarting_without_workers_is_the_loader():
    def make(first):
        return DataLoader(range(first * 2, 10), 2, **loader_options(0))

    assert [b.tolist() for b in Restarting(make, 5, start=3)] == [[6, 7], [8, 9]]
    assert len(Restarting(make, 5, start=3)) == 5
