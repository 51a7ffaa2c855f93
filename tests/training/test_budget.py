"""How long a run may take, in words and in steps."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch

from ssl_xcit.errors import UserError
from ssl_xcit.training import budget
from ssl_xcit.training.budget import (
    LEFT_OUT,
    Speed,
    Stopwatch,
    check_one_device,
    online_share,
    parse_budget,
    steps_within,
)
from ssl_xcit.utils.hardware import seconds_since_start


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1.5d", 129_600), ("3 m", 180)]
)
def test_times_in_words(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "10", "m", "0m", "-5m", "10 minutes", "1h30m"])
def test_words_that_are_no_time(text):
    with pytest.raises(UserError, match=r"such as 90s, 10m, 2h"):
        parse_budget(text)


def test_steps_fill_what_start_evaluation_and_report_leave(monkeypatch):
    monkeypatch.setattr(budget, "seconds_since_start", lambda: 20.0)
    steps = steps_within("10m", Speed(0.5, 60.0), 0.0)
    assert 20.0 + 0.5 * steps + 60.0 + budget.REPORT == pytest.approx(0.99 * 600, abs=0.5)
    assert steps_within("10m", Speed(0.5, 60.0), 0.05) == int(steps / 1.05)
    with pytest.raises(UserError, match=r"the start has taken 20 s.*give at least budget=\d+s"):
        steps_within("80s", Speed(0.5, 60.0), 0.0)


def test_online_evaluation_counts_where_there_is_time_for_one():
    online = {"every_steps": 500, "eval_budget": 0.05}
    assert online_share(online, 499) == 0.0
    assert 0.0 < online_share(online, 500) <= 0.05
    assert online_share(None, 10_000) == 0.0


def test_the_first_steps_do_not_count(monkeypatch):
    """Steps of one second behind slow ones; the trial ends when its time is up."""
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    watch, trainer = Stopwatch(12.0), Mock(lightning.Trainer, should_stop=False)
    module = SimpleNamespace(output=SimpleNamespace(loss=torch.zeros(())))
    for number in range(100):
        now[0] += 5.0 if number < LEFT_OUT else 1.0
        watch.on_train_batch_end(trainer, module)
        if trainer.should_stop:
            break
    assert watch.step_seconds() == pytest.approx(1.0)
    assert len(watch.ends) >= LEFT_OUT + budget.FEWEST
    assert now[0] < 40.0


def test_one_device_only():
    check_one_device(1)
    with pytest.raises(UserError, match="give epochs or max_steps"):
        check_one_device(2)


def test_this_process_has_been_running_for_a_while():
    assert 0.0 < seconds_since_start() < 86_400.0
