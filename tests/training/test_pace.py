"""Runs of a budget on a machine that slows down, is killed, and goes on."""

import json
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch

from ssl_xcit.training import pace
from ssl_xcit.training.pace import MOMENTS, Pace, Revision, Timeline

BUDGET, AFTER, START = 180.0, 12.0, 15.0  # seconds


def test_a_timeline_is_joined_where_it_is_revised():
    timeline = Timeline(1000)
    assert [timeline.place(step) for step in (0, 7, 1000)] == [0, 7, 1000]
    for step, last in ((200, 900), (450, 1100), (1000, 1040)):
        before = timeline.place(step)
        timeline.revisions.append(Revision(step, before, last))
        assert timeline.place(step) == before
    places = [timeline.place(step) for step in range(1041)]
    assert all(0.5 < b - a < 2.0 for a, b in pairwise(places))
    assert timeline.place(199) == 199
    assert timeline.place(timeline.last) == pytest.approx(1000)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Takes steps of a Pace, of `seconds(step)` each, up to the last or `until`; returns it and the
    seconds of the process.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(pace, "seconds_since_start", lambda: clock.now)
    (tmp_path / "run.json").write_text('{"run_id": "a", "plan": {"num_images": 5}}')
    module = SimpleNamespace(output=SimpleNamespace(loss=torch.zeros(())), timeline=None)

    def take(seconds, start=0, planned=1000, until=None, ranks=1):
        clock.now = START if not start else 6.0
        callback = Pace(tmp_path, BUDGET, planned)
        loop = SimpleNamespace(max_steps=callback.timeline.last)
        trainer = Mock(lightning.Trainer, global_step=start, world_size=ranks, is_global_zero=True)
        trainer.fit_loop = SimpleNamespace(epoch_loop=loop)
        callback.on_train_start(trainer, module)
        while trainer.global_step < min(loop.max_steps, until or 10**9):
            trainer.global_step += 1
            clock.now += seconds(trainer.global_step)
            callback.on_train_batch_end(trainer, module)
        assert module.timeline is callback.timeline
        return callback, clock.now

    return take


@pytest.mark.parametrize(
    "seconds",
    [
        lambda step: 0.15,
        lambda step: 0.15 if step < 250 else 0.2,  # the processor gets hot
        lambda step: 0.12 + 0.1 * step / 1000,
        lambda step: 0.3 if 300 < step < 400 else 0.15,  # other work
        lambda step: 0.11,
    ],
)
def test_a_run_ends_with_its_budget_whatever_its_speed(train, tmp_path, seconds):
    Pace.begin(tmp_path, AFTER)
    callback, passed = train(seconds)
    assert passed + AFTER == pytest.approx(BUDGET, rel=0.04)
    assert len(callback.timeline.revisions) == len(MOMENTS)
    assert callback.timeline.place(callback.timeline.last) == pytest.approx(1000)
    about = json.loads((tmp_path / "run.json").read_text())
    plan = {"num_images": 5, "planned_steps": 1000, "total_steps": callback.timeline.last}
    assert about == {"run_id": "a", "plan": plan}


def test_a_killed_run_keeps_what_was_decided_and_makes_up_for_what_it_lost(train, tmp_path):
    Pace.begin(tmp_path, AFTER)
    first, passed = train(lambda step: 0.17, until=520)
    second, more = train(lambda step: 0.17, start=500)
    kept = first.timeline.revisions
    assert len(kept) == 2
    assert second.timeline.revisions[: len(kept)] == kept
    assert passed + more + AFTER == pytest.approx(BUDGET, rel=0.04)
    again, _ = train(lambda step: 0.4, start=0)  # slower, but nothing is left to be decided
    assert again.timeline == second.timeline


def test_the_rest_is_neither_cut_short_nor_endless(train, tmp_path):
    Pace.begin(tmp_path, AFTER)
    callback, _ = train(lambda step: 10.0, planned=100)
    before = 100
    for revision in callback.timeline.revisions:
        assert 2 * (revision.last - revision.step) in (
            before - revision.step,
            before - revision.step + 1,
        )
        before = revision.last
    Pace.begin(tmp_path, AFTER)
    callback, _ = train(lambda step: 0.001, planned=100)
    assert callback.timeline.last <= 200


def test_what_is_slow_once_tells_nothing(train, tmp_path):
    Pace.begin(tmp_path, AFTER)
    callback, _ = train(lambda step: 30.0 if step == 1 else 0.13)
    expected = (0.99 * BUDGET - AFTER - START - 30.0) / 0.13
    assert callback.timeline.revisions[0].last == pytest.approx(expected, abs=2)


def test_several_ranks_and_a_full_disk_decide_nothing_new(train, tmp_path, monkeypatch, caplog):
    Pace.begin(tmp_path, AFTER)
    first, _ = train(lambda step: 0.2, until=300)
    kept = list(first.timeline.revisions)
    assert len(kept) == 1
    ranks, _ = train(lambda step: 0.3, start=250, ranks=2)
    assert ranks.timeline.revisions == kept

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pace, "write_json", full)
    alone, _ = train(lambda step: 0.3, start=250)
    assert alone.timeline.revisions == kept
    assert [r.getMessage() for r in caplog.records] == [
        "pace.json could not be written (No space left on device); training goes on"
    ]


def test_without_its_file_nothing_is_revised(train, tmp_path):
    callback, _ = train(lambda step: 10.0, planned=100)
    assert callback.timeline == Timeline(100)
    assert not (tmp_path / pace.FILE).exists()
