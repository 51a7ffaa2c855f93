"""Evaluators and tasks: settings that do not go together, defaults that yaml files hold."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

import ssl_xcit.conf
from ssl_xcit.errors import UserError
from ssl_xcit.eval.evaluators.protocol import Evaluator, Task, as_list
from ssl_xcit.eval.online import OnlineEvaluation
from ssl_xcit.eval.tasks.linear_augmented import AugmentedProbe

CONF = Path(ssl_xcit.conf.__file__).parent


@pytest.mark.parametrize(
    "options", [{"epochs": 1, "steps": 1}, {"epochs": None}, {"scale": [0.5, 0.2]}]
)
def test_settings_that_do_not_go_together(options):
    with pytest.raises(UserError, match=r"the other to null|must not fall"):
        AugmentedProbe("x", **{"lrs": [0.1], **options})
    with pytest.raises(UserError, match=r"evaluators has none; ~callbacks\.online"):
        OnlineEvaluation({"knn": None})


@pytest.mark.parametrize("name", [file.stem for file in sorted((CONF / "tasks").glob("*.yaml"))])
def test_a_tasks_yaml_has_every_setting_and_the_defaults(name):
    file = CONF / "tasks" / f"{name}.yaml"
    assert file.read_text().startswith(f"# @package evaluation.tasks.{name}\n# ")
    node = OmegaConf.to_container(OmegaConf.load(file))
    task = get_object(node.pop("_target_"))
    assert Task in task.__mro__
    parameters = inspect.signature(task).parameters
    if task is not AugmentedProbe:  # of which there are two protocols
        assert set(node) == set(parameters)
        defaults = {key: parameters[key].default for key in node if key != "root"}
        as_lists = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
        assert as_lists == {key: value for key, value in node.items() if key != "root"}


def test_every_evaluator_of_the_yaml_is_one():
    settings = OmegaConf.load(CONF / "evaluation" / "standard.yaml")
    for node in settings.evaluators.values():
        assert Evaluator in get_object(node["_target_"]).__mro__
    assert as_list(settings.evaluators.knn.k) == [10, 20, 100, 200]
    assert as_list("cls") == ["cls"]
