"""Commands from Python, against the same commands as a person types them."""

import asyncio
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from commands import SMALL, last_state, metrics, run

import ssl_xcit
from ssl_xcit.errors import UserError
from ssl_xcit.runs import flat, written

SETTINGS = dict(word.split("=", 1) for word in SMALL)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder to work in, with a run of the command line."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    assert run("pretrain", "name=typed", *SMALL) == 0
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def called(here):
    return ssl_xcit.pretrain(name="called", **SETTINGS)


def test_the_same_run_as_typed(here, called):
    assert called.folder == Path("runs/called")
    assert called.finished
    for ours, theirs in zip(last_state(called.folder), last_state("runs/typed"), strict=True):
        assert str(ours) == str(theirs)
    typed = metrics("runs/typed")
    losses = [loss for loss in called.metrics["loss"] if math.isfinite(loss)]
    assert losses == [float(row["loss"]) for row in typed if row["loss"]]
    assert len(losses) > 2
    assert set(called.results) >= {"pretrained"}
    assert called.results["pretrained"]["knn_k20"] > 0
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(called.backbone(images), ssl_xcit.load_backbone("runs/typed")(images))


def test_a_finished_run_is_returned_at_once(called):
    began = time.monotonic()
    assert ssl_xcit.pretrain(name="called", **SETTINGS) == called
    assert time.monotonic() - began < 15


@pytest.mark.slow
def test_evaluate_and_show(called):
    few = [word.split("=", 1) for word in SMALL if word.startswith("evaluation.")]
    numbers = called.evaluate(**dict(few))
    assert numbers["pretrained"] == called.results["pretrained"]
    shown = called._repr_html_()
    assert "k-NN 20" in shown
    assert f"{called.results['pretrained']['knn_k20']:.1f}" in shown
    assert called.report.read_text().startswith("<!")


def test_nested_settings_and_values():
    settings = {"optim": {"lr": 1e-3, "optimizer": {"fused": True}}, "report": None, "k": [1, 2]}
    words = [f"{key}={written(value)}" for key, value in flat(settings)]
    assert words == ["optim.lr=0.001", "optim.optimizer.fused=true", "report=null", "k=[1,2]"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sise": 8}, "did you mean batch_size"),
        ({"optim": {"lr": "fast"}}, "optim.lr=fast"),
        ({"root": "nowhere"}, "nowhere"),
        ({"model": "xcit_nano_12_p61"}, "did you mean xcit_nano_12_p16"),
    ],
)
def test_wrong_settings_raise(here, settings, message):
    with pytest.raises(UserError, match=message):
        ssl_xcit.pretrain(**settings)


def in_a_loop(work):
    """As in a notebook's cell: the event loop of the thread is running."""

    async def cell():
        return work()

    return asyncio.run(cell())


def in_a_thread(work):
    """Where there is neither a loop nor a way to hear signals."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("call", [in_a_loop, in_a_thread])
def test_with_an_event_loop_and_without(here, called, call):
    name = call.__name__
    run = call(lambda: ssl_xcit.pretrain(name=name, **SETTINGS))
    assert str(last_state(run.folder)[0]) == str(last_state(called.folder)[0])


def test_ctrl_c_keeps_the_run(here, called):
    """Interrupted after a step; the same call ends with the weights of the other run."""
    folder = Path("runs/interrupted")

    def interrupt():
        while not list(folder.glob("checkpoints/step-000003.ckpt")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        ssl_xcit.pretrain(name="interrupted", **SETTINGS)
    assert not ssl_xcit.Run(folder).finished
    with pytest.raises(UserError, match="the same call goes on"):
        _ = ssl_xcit.Run(folder).results
    again = ssl_xcit.pretrain(name="interrupted", **SETTINGS)
    assert str(last_state(again.folder)[0]) == str(last_state(called.folder)[0])
