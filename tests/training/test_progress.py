"""Plain lines of a run without a terminal."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning

from ssl_xcit.training import progress
from ssl_xcit.training.progress import ProgressBar


def test_an_early_line_says_how_long_it_will_take(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(ProgressBar, "news", lambda *_: "loss 1.0")
    bar, module = ProgressBar(lines=4), Mock(lightning.LightningModule)
    trainer = Mock(lightning.Trainer, max_steps=1000, global_step=0, is_global_zero=True)
    bar.on_train_start(trainer, module)
    for step in range(1, 1001):
        clock.now += 4.0
        trainer.global_step = step
        bar.on_train_batch_end(trainer, module)
    assert capsys.readouterr().out.splitlines() == [
        "step 3/1000  loss 1.0  1 h 6 min left",
        "step 250/1000  loss 1.0  50 min left",
        "step 500/1000  loss 1.0  33 min 20 s left",
        "step 750/1000  loss 1.0  16 min 40 s left",
        "step 1000/1000  loss 1.0  0 s left",
    ]
