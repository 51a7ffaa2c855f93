"""What a sweep varies, against Hydra's own grid and against the distributions by name."""

import numpy as np
import pytest
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import stats

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.space import Interval, combinations, read_space, sampled


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
        ["augment.global_scale=[0.2,1],[0.4,1]", "+more.x='a b','c'"],
        ["trainer=glob(*)"],
        ["seed=4"],
    ],
)
def test_a_grid_is_hydras(words, loader):
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    (theirs,) = BasicSweeper.split_arguments(parsed, None)
    space = read_space(words, loader)
    ours = [{*space.fixed, *combination} for combination in combinations(space)]

    def plain(rows):  # 0.30000000000000004 is written 0.3 here
        return [{w.replace("0.30000000000000004", "0.3") for w in row} for row in rows]

    assert plain(ours) == plain(map(set, theirs))


def test_samples_have_the_distribution_that_is_named(loader):
    words = ["optim.lr=tag(log,interval(1e-4,1e-2))", "optim.weight_decay=interval(0,1)"]
    words += ["seed=int(interval(1,4))", "objective.teacher_temp=0.04,0.07"]
    space = read_space(words, loader)
    rows = [dict(w.split("=") for w in sampled(space, 0, n)) for n in range(2000)]
    lr = np.log(np.array([float(r["optim.lr"]) for r in rows]) / 1e-4) / np.log(100)
    for values in (lr, [float(r["optim.weight_decay"]) for r in rows]):
        assert stats.kstest(values, "uniform").pvalue > 0.01
    assert {r["seed"] for r in rows} == {"1", "2", "3", "4"}
    assert 900 < sum(r["objective.teacher_temp"] == "0.07" for r in rows) < 1100
    assert sampled(space, 0, 7) == sampled(space, 0, 7) != sampled(space, 1, 7)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra/launcher=joblib", "launcher=basic, joblib"),
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
        list(combinations(read_space(["optim.lr=interval(0,1)"], loader)))
    assert Interval(0, 10, step=5).values == ("0", "5", "10")
