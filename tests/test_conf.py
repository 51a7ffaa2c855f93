"""Every choice of every group composes, and what it names can be made."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ssl_xcit.errors import UserError
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.utils.validation import parse

CONF = Path(__file__).resolve().parent.parent / "conf"


def options(group):
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


TRANSFER_RECIPES = [
    name
    for name in options("experiment")
    if name.startswith(("builtin_", "ade20k_", "coco_")) or name == "imagenet_supervised"
]
RECIPES = sorted({*options("experiment")} - {*TRANSFER_RECIPES})


def load(command, *overrides):
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        return compose(command, overrides=list(overrides))


def settings(*overrides):
    cfg = load("pretrain", *overrides)
    if OmegaConf.is_missing(cfg.data, "root"):
        cfg.data.root = "."
    return parse(PretrainSettings, cfg)


@pytest.mark.parametrize("name", options("model"))
def test_models(name):
    cfg = load("pretrain", "experiment=none", f"model={name}")
    with torch.device("meta"):
        model = instantiate(cfg.model)
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, model.embed_dim)


@pytest.mark.parametrize("data", options("data"))
@pytest.mark.parametrize("trainer", options("trainer"))
def test_data_and_trainers_compose(data, trainer):
    cfg = load("pretrain", "experiment=none", f"data={data}", f"trainer={trainer}")
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
        make_plan(settings(*words), images, devices)
    assert str(raised.value).endswith(f": set {fitting}")
    told = [word.rstrip(",") for word in fitting.split() if "=" in word]
    if "trainer.devices=1" in told:
        devices, told = 1, ["batch_size=3"]
    plan = make_plan(settings(*words, *told), images, devices)
    assert images - devices < plan.per_device_batch * devices <= images  # and none larger does


@pytest.mark.parametrize(
    ("batch_size", "fitting"), [(30, "batch_size=28 or batch_size=32"), (3, "batch_size=4")]
)
def test_a_batch_that_does_not_divide_names_the_nearest(batch_size, fitting):
    with pytest.raises(UserError, match=f"does not divide among 4 devices: set {fitting}$"):
        make_plan(settings(f"batch_size={batch_size}"), 100, 4)


@pytest.mark.parametrize("experiment", RECIPES)
def test_experiments_compose(experiment):
    given = settings(f"experiment={experiment}")
    assert make_plan(given, 1_281_167, 8).total_steps > 10_000


# published: GPUs x batch, peak rate, floor, drop path, smallest global crop, local crops
PUBLISHED = {
    "small_12_p16": (16 * 64, 1e-3, 4e-5, 0.05, 0.3, 8),
    "medium_24_p16": (32 * 32, 1e-3, 1e-5, 0.15, 0.3, 8),
    "medium_24_p8": (96 * 10, 9.375e-4, 1e-5, 0.15, 0.32, 6),
    "large_24_p16": (80 * 14, 1.09e-3, 1e-5, 0.3, 0.32, 8),
    "large_24_p8": (128 * 4, 5e-4, 1e-5, 0.3, 0.32, 8),
}


BY_LENGTH = ("num_prototypes", "ema", "teacher_temp_start", "teacher_temp")


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_imagenet_recipe_is_the_published_one(size):
    batch, lr, floor, drop_path, split, num_local = PUBLISHED[size]
    given = settings("experiment=imagenet", f"model=xcit_{size}")
    plan = make_plan(given, 1_281_167, 8)
    assert given.batch_size == batch
    assert plan.lr == pytest.approx(lr, rel=5e-3)
    assert (given.optim.warmup_start, given.optim.min_lr) == (floor, floor)
    assert given.model["drop_path"] == drop_path
    assert given.augment["global_scale"] == [split, 1.0]
    assert given.augment["local_scale"] == [0.05, split]
    assert given.augment["num_local"] == num_local
    assert plan.warmup_steps / plan.total_steps == pytest.approx(0.0333, abs=1e-3)
    derived = plan.record()
    temperatures = ("teacher_temp_start", "teacher_temp", "teacher_temp_epochs")
    assert [derived[name] for name in temperatures] == [0.04, 0.07, 30]
    assert derived["freeze_steps"] == round(plan.steps_per_epoch)
    assert derived["num_prototypes"] == 65536


def test_defaults_on_imagenet_are_the_references():
    plan = make_plan(settings("data=imagenet", "experiment=none"), 1_281_167, 1)
    assert plan.lr == pytest.approx(5e-4)
    assert plan.warmup_steps == pytest.approx(10 * plan.steps_per_epoch, abs=1)
    derived = plan.record()
    assert [derived[k] for k in BY_LENGTH] == [65536, 0.996, 0.04, 0.04]


def test_small_data_is_scaled_and_a_number_overrides():
    words = ["data=folder", "data.root=.", "experiment=none"]
    plan = make_plan(settings(*words), 5000, 1)
    assert [plan.record()[k] for k in BY_LENGTH] == [1024, 0.99, 0.02, 0.04]
    assert plan.warmup_steps <= 0.1 * plan.total_steps
    plan = make_plan(settings(*words, "objective.num_prototypes=77"), 5000, 1)
    assert plan.record()["num_prototypes"] == 77


def test_short_runs_have_a_faster_teacher():
    words = ["data=folder", "data.root=.", "experiment=none", "epochs=10"]
    for images, expected in (
        (5000, [1024, 0.98, 0.04, 0.04]),
        (50_000, [8192, 0.99, 0.02, 0.04]),
        (500_000, [32768, 0.996, 0.04, 0.04]),
    ):
        derived = make_plan(settings(*words), images, 1).record()
        assert [derived[k] for k in BY_LENGTH] == expected


@pytest.mark.parametrize(("batch", "scaling", "factor"), [(512, "linear", 2), (4096, "sqrt", 2)])
def test_the_rate_follows_the_batch(batch, scaling, factor):
    words = ["data=folder", "data.root=.", f"batch_size={batch}", f"optim.lr_scaling={scaling}"]
    assert make_plan(settings(*words), 5000, 1).lr == pytest.approx(factor * 5e-4)
