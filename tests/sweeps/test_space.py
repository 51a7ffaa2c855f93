"""What a sweep varies, against Hydra's own grid and Optuna's distributions."""

import re

import pytest
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.space import overrides_of, read_space, rounded


@pytest.fixture
def loader():
    GlobalHydra.instance().clear()
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.mark.parametrize(
    "words",
    [
        ["optim.lr=1e-4,5e-4", "objective.teacher_temp=0.04,0.07", "epochs=3"],
        ["seed=range(1,6)", "model=xcit_nano_12_p16,xcit_nano_12_p8"],
        ["seed=range(0,10,3)", "optim.lr=range(0.1,0.5,0.1)"],
        [
            "objective.ema=range(0.999,0.9999,0.00005)",
            "optim.wd=range(0.999998,0.999999,0.0000001)",
        ],
        ["augment.global_scale=[0.2,1],[0.4,1]", "+more.x='a b','c'"],
        ["trainer=glob(*)"],
        ["seed=4"],
    ],
)
def test_a_grid_is_hydras(words, loader):
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (theirs,) = BasicSweeper.split_arguments(parsed, None)
    space = read_space(words, loader)
    ours = [{*space.fixed, *overrides_of(values)} for values in space.grid()]

    def plain(row):  # 0.30000000000000004 is written 0.3 here
        return {re.sub(r"\d\.\d{15,}", lambda m: f"{float(m[0]):.12g}", word) for word in row}

    assert ours == [plain(row) for row in theirs]


@pytest.mark.parametrize(
    ("value", "low", "high", "typed"),
    [
        (0.00123456789, 1e-4, 1e-2, "0.001235"),
        (0.9999712345678, 0.999, 0.99999, "0.99997123"),
        (1000.123456789, 1000, 1001, "1000.123"),
        (0.1234111, 0.12341, 1, "0.12341"),
        (1.0, 0, 1, "1"),
        (0.0, -1, 1, "0"),
    ],
)
def test_a_drawn_number_has_the_digits_that_matter(value, low, high, typed):
    number = rounded(value, FloatDistribution(low, high))
    assert overrides_of({"a": number}) == [f"a={typed}"]
    assert float(typed) == number


def test_distributions_are_those_that_are_named(loader):
    words = ["a=tag(log,interval(1e-4,1e-2))", "b=interval(0,1)", "c=int(interval(1,4))"]
    words += ["d=0.04,0.07", "e=range(2,9,3)"]
    assert read_space(words, loader).swept == {
        "a": FloatDistribution(1e-4, 1e-2, log=True),
        "b": FloatDistribution(0, 1),
        "c": IntDistribution(1, 4),
        "d": CategoricalDistribution(["0.04", "0.07"]),
        "e": IntDistribution(2, 8, step=3),
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra/launcher=joblib", "launcher=local, submitit or ray"),
        ("hydra/sweeper=optuna", "sweep=grid, random or optuna"),
        ("optim.lr=interval(1,0)", "from a lower to a higher"),
        ("optim.lr=tag(log,interval(0,1))", "above 0"),
        ("model=glob(nothing*)", "no such value"),
    ],
)
def test_what_cannot_be_swept(word, message, loader):
    with pytest.raises(UserError, match=message):
        read_space([word], loader)


def test_an_interval_is_no_grid(loader):
    with pytest.raises(UserError, match="sweep=random or sweep=optuna"):
        list(read_space(["optim.lr=interval(0.1,1)"], loader).grid())
