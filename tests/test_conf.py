"""Every choice of every group composes, and what it names can be made."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.pretrain import make_plan

CONF = Path(__file__).resolve().parent.parent / "conf"


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def load(command, *overrides):
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        return compose(command, overrides=list(overrides))


@pytest.mark.parametrize("name", options("model"))
def test_models(name):
    cfg = load("pretrain", f"model={name}", "data=folder")
    with torch.device("meta"):
        model = instantiate(cfg.model)
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, model.embed_dim)


@pytest.mark.parametrize("data", options("data"))
@pytest.mark.parametrize("trainer", options("trainer"))
def test_data_and_trainers_compose(data, trainer):
    cfg = load("pretrain", f"data={data}", f"trainer={trainer}")
    assert cfg.augment.global_size > cfg.augment.local_size
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert cfg.augment.local_size >= model.patch_size
    instantiate(cfg.augment)
    instantiate(cfg.callbacks)
    instantiate(cfg.evaluation)


@pytest.mark.parametrize(
    ("images", "devices", "accumulate", "fitting"),
    [
        (12, 1, 1, "batch_size=12 or less"),
        (12, 1, 20, "batch_size=12 or less, and trainer.accumulate=12 or less"),
        (13, 4, 1, "batch_size=12 or less, a multiple of the 4 devices"),
        (
            13,
            4,
            5,
            "batch_size=12 or less, a multiple of the 4 devices, and trainer.accumulate=3 or less",
        ),
        (3, 4, 1, "trainer.devices=1"),
    ],
)
def test_a_batch_that_fits_is_named_and_fits(images, devices, accumulate, fitting):
    words = ["batch_size=64", f"trainer.accumulate={accumulate}"]
    with pytest.raises(UserError) as raised:
        make_plan(load("pretrain", *words), images, devices)
    assert str(raised.value).endswith(f": set {fitting}")
    told = [word.rstrip(",") for word in fitting.split() if "=" in word]
    if "trainer.devices=1" in told:
        devices, told = 1, ["batch_size=3"]
    plan = make_plan(load("pretrain", *words, *told), images, devices)
    assert images - devices < plan.per_device_batch * devices <= images  # and none larger does


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiments_compose(experiment):
    cfg = load("pretrain", f"experiment={experiment}")
    plan = make_plan(cfg, 1_281_167, 8)
    assert plan.total_steps > 10_000
    OmegaConf.to_container(cfg.objective, resolve=True, throw_on_missing=True)


def test_imagenet_recipe_is_the_published_one():
    cfg = load("pretrain", "experiment=imagenet_small_12_p16")
    plan = make_plan(cfg, 1_281_167, 8)
    assert plan.lr == pytest.approx(1e-3)
    assert plan.warmup_steps / plan.total_steps == pytest.approx(0.0333, abs=1e-3)
    assert (plan.teacher_temp_start, plan.teacher_temp, plan.teacher_temp_epochs) == (
        0.04,
        0.07,
        30,
    )
    assert plan.freeze_steps == round(plan.steps_per_epoch)
    assert plan.num_prototypes == 65536
    assert cfg.model.drop_path == 0.05


def test_defaults_on_imagenet_are_the_references():
    plan = make_plan(load("pretrain", "data=imagenet"), 1_281_167, 1)
    assert plan.lr == pytest.approx(5e-4)
    assert plan.warmup_steps == pytest.approx(10 * plan.steps_per_epoch, abs=1)
    assert (plan.ema, plan.teacher_temp_start, plan.teacher_temp) == (0.996, 0.04, 0.04)
    assert plan.num_prototypes == 65536


def test_small_data_is_scaled_and_a_number_overrides():
    plan = make_plan(load("pretrain", "data=folder"), 5000, 1)
    assert (plan.num_prototypes, plan.ema, plan.teacher_temp_start) == (1024, 0.99, 0.02)
    assert plan.warmup_steps <= 0.1 * plan.total_steps
    plan = make_plan(load("pretrain", "data=folder", "objective.num_prototypes=77"), 5000, 1)
    assert plan.num_prototypes == 77
