"""Pictures on their way to whatever loggers there are."""

import logging
import os
from importlib import resources

import numpy as np
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from ssl_xcit.training.loggers import FailsafeLogger, give_images, takes_images
from ssl_xcit.training.wandb_run import WandbRun

PICTURE = np.zeros((8, 12, 3), np.uint8)


class Board:
    """What TensorBoard's writer takes."""

    def __init__(self):
        self.added = []

    def add_image(self, tag, img_tensor, global_step=None, walltime=None, dataformats="CHW"):
        self.added.append((tag, img_tensor.shape, global_step, dataformats))


class BoardLogger(CSVLogger):
    """As Lightning's TensorBoardLogger: no log_image, an experiment that adds images."""

    def __init__(self):
        self.board = Board()

    @property
    def experiment(self):
        return self.board


def test_tensorboard_gets_rows_by_columns_by_channels():
    inner = BoardLogger()
    logger = FailsafeLogger("tensorboard", [lambda: inner])
    logger.log_image("pictures", [PICTURE], 7)
    logger.log_image("two", [PICTURE, PICTURE], 8)
    assert inner.board.added == [
        ("pictures", (8, 12, 3), 7, "HWC"),
        ("two/0", (8, 12, 3), 8, "HWC"),
        ("two/1", (8, 12, 3), 8, "HWC"),
    ]


def test_tensorboard_writes_what_its_own_reader_finds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = (resources.files("ssl_xcit.conf") / "logger" / "tensorboard.yaml").read_text()
    settings = OmegaConf.create(text).tensorboard
    logger = FailsafeLogger("tensorboard", [lambda: instantiate(settings, save_dir=str(tmp_path))])
    logger.log_metrics({"loss": 2.5}, 7)
    logger.log_image("pictures", [PICTURE], 7)
    logger.finalize("success")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(s.step, s.value) for s in found.Scalars("loss")] == [(7, 2.5)]
    (image,) = found.Images("pictures")
    assert (image.step, image.height, image.width) == (7, 8, 12)


def test_wandb_gets_files(tmp_path):
    inner = WandbRun(save_dir=str(tmp_path), offline=True, project="p")
    logger = FailsafeLogger("wandb", [lambda: inner])
    try:
        logger.log_image("pictures", [PICTURE], 7)
    finally:
        logger.finish(0)
    assert "WANDB_MODE" not in os.environ  # later runs of this process may be on line
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    (file,) = tmp_path.rglob("media/images/*.png")
    assert file.name.startswith("pictures_")


def test_loggers_without_pictures_are_left_alone(tmp_path, caplog):
    plain = CSVLogger(tmp_path)
    assert not takes_images(plain)
    assert takes_images(BoardLogger())
    give_images(plain, "pictures", [PICTURE], 0)
    logger = FailsafeLogger("csv", [lambda: plain])
    logger.log_image("pictures", [PICTURE], 0)
    assert logger.inner is plain
    assert not caplog.records
    assert takes_images(logger)  # it may go off line and on


def test_one_that_fails_is_said_once_and_left_out(caplog):
    inner = BoardLogger()
    inner.board.add_image = None  # calling it fails
    logger = FailsafeLogger("tensorboard", [lambda: inner])
    with caplog.at_level(logging.WARNING):
        logger.log_image("pictures", [PICTURE], 0)
        logger.log_image("pictures", [PICTURE], 1)
    assert len(caplog.records) == 1
    assert "the run goes on without it" in caplog.text
    assert logger.inner is None


def test_without_any_logger_nothing_happens():
    def fail():
        raise OSError("no server")

    logger = FailsafeLogger("wandb", [fail])
    logger.log_image("pictures", [PICTURE], 0)
    assert logger.inner is None
