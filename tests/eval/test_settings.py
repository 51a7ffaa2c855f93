"""Settings of evaluators, tasks and commands that are refused; defaults that yaml files hold."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from omegaconf import OmegaConf

import ssl_xcit.conf
from ssl_xcit.errors import UserError
from ssl_xcit.eval.commands.embed import EmbedSettings
from ssl_xcit.eval.commands.eval import EvalSettings
from ssl_xcit.eval.evaluators.protocol import Evaluator, Task, as_list
from ssl_xcit.eval.online import OnlineEvaluation
from ssl_xcit.eval.tasks.linear_augmented import AugmentedProbe
from ssl_xcit.utils.validation import Checker, parse

CONF = Path(ssl_xcit.conf.__file__).parent
WHOLE, ABOVE_0, FRACTION = "a whole number of at least 1", "a number above 0", "above 0 and below 1"
KINDS = "one or more of cls, patch, cls_patch, last4, last4_patch"
REFUSED = [
    ("runner.evaluate", "feature_dtype", "int8", "float16 or float32"),
    ("runner.evaluate", "near_duplicates", 1.5, FRACTION),
    ("runner.evaluate", "batch_size", 0, WHOLE),
    ("runner.evaluate", "evaluators", {"linear": 5}, "must be"),
    ("evaluators.knn.KNN", "k", [], WHOLE),
    ("evaluators.knn.KNN", "k", [0], WHOLE),
    ("evaluators.knn.KNN", "k", 2.5, WHOLE),
    ("evaluators.knn.KNN", "temperature", 0.0, ABOVE_0),
    ("evaluators.knn.KNN", "temperature", [], ABOVE_0),
    ("evaluators.knn.KNN", "index", "flat", "ivf or hnsw or null"),
    ("evaluators.knn.KNN", "recall", 0.0, "above 0 and of at most 1"),
    ("evaluators.knn.FewShot", "shots", [0], WHOLE),
    ("evaluators.knn.FewShot", "draws", 0, WHOLE),
    ("evaluators.linear.LinearProbe", "lrs", [], ABOVE_0),
    ("evaluators.linear.LinearProbe", "lrs", -0.1, ABOVE_0),
    ("evaluators.linear.LinearProbe", "lrs", True, ABOVE_0),
    ("evaluators.linear.LinearProbe", "epochs", 0, WHOLE),
    ("evaluators.linear.LinearProbe", "val_fraction", 1.0, FRACTION),
    ("evaluators.linear.LinearProbe", "weight_decays", [-1.0], "a number of at least 0"),
    ("evaluators.linear.LinearProbe", "kinds", ["clss"], KINDS),
    ("evaluators.linear.LinearProbe", "kinds", [], KINDS),
    ("evaluators.logistic.Logistic", "strengths", [], f"{ABOVE_0} or a list of numbers above 0"),
    ("evaluators.logistic.Logistic", "strengths", [0.0], "above 0 or null"),
    ("evaluators.logistic.Regression", "kinds", [], KINDS),
    ("evaluators.clustering.Clustering", "runs", 0, WHOLE),
    ("evaluators.class_retrieval.ClassRetrieval", "max_bank", 0, f"{WHOLE} or null"),
    ("evaluators.baselines.colour_histogram", "bins", 300, "of at most 256"),
    ("evaluators.exported_knn.ExportedKNN", "k", 0, WHOLE),
    ("tasks.attention_jaccard.AttentionJaccard", "size", 0, WHOLE),
    ("tasks.attention_jaccard.AttentionJaccard", "mass", 1.0, FRACTION),
    ("tasks.copy_detection.CopyDetection", "gem", 0.0, f"{ABOVE_0} or null"),
    ("tasks.copy_detection.CopyDetection", "root", True, "a folder"),
    ("tasks.landmark_retrieval.Retrieval", "scales", [], ABOVE_0),
    ("tasks.landmark_retrieval.Retrieval", "scales", [0.0], ABOVE_0),
    ("tasks.landmark_retrieval.Retrieval", "crop_queries", 1, "true or false"),
    ("tasks.segmentation.Segmentation", "iterations", True, WHOLE),
    ("tasks.segmentation.Segmentation", "held_fraction", 1.0, FRACTION),
    ("tasks.segmentation.Segmentation", "strengths", [-1.0], ABOVE_0),
    ("tasks.segmentation.Segmentation", "max_bank", -1, WHOLE),
    ("tasks.video_segmentation.VideoSegmentation", "num_context", -1, "of at least 0"),
    ("tasks.video_segmentation.VideoSegmentation", "topk", 0, WHOLE),
    ("tasks.video_segmentation.VideoSegmentation", "temperature", 0.0, ABOVE_0),
    ("tasks.linear_augmented.AugmentedProbe", "lrs", [], ABOVE_0),
    ("tasks.linear_augmented.AugmentedProbe", "epochs", 0, f"{ABOVE_0} or null"),
    ("tasks.linear_augmented.AugmentedProbe", "scale", [0.5], "[low,high], two numbers"),
    ("tasks.linear_augmented.AugmentedProbe", "scale", [0.5, 1.2], "[low,high], two numbers"),
    ("tasks.linear_augmented.AugmentedProbe", "nane", "x", "did you mean x.name?"),
    ("online.OnlineEvaluation", "every_steps", 0, WHOLE),
    ("online.OnlineEvaluation", "max_images", 1, "a whole number of at least 2"),
    ("online.OnlineEvaluation", "networks", [], "[teacher], [student] or [teacher,student]"),
    ("online.OnlineEvaluation", "networks", ["techer"], "[teacher], [student] or"),
    ("online.OnlineEvaluation", "networks", "teacher", "[teacher], [student] or"),
    ("online.OnlineEvaluation", "eval_budget", 0.0, "above 0 and of at most 1 or null"),
]


@pytest.mark.parametrize(("target", "key", "value", "message"), REFUSED)
def test_values_out_of_range_are_refused_by_name(target, key, value, message):
    node = {"_target_": f"ssl_xcit.eval.{target}", key: value}
    with pytest.raises(UserError) as error:
        Checker({}).target(node, "x")
    assert str(error.value).startswith(f"x.{key}")
    assert message in str(error.value)


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


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        yield {
            EvalSettings: compose("eval", ["ckpt=x", "tasks=[linear_dino]"]),
            EmbedSettings: compose("embed", ["ckpt=x", "out=f.npy", "data.root=in"]),
        }


@pytest.mark.parametrize(
    ("command", "key", "value", "message"),
    [
        (EvalSettings, "which", "techer", "which=techer must be teacher or student"),
        (EvalSettings, "batch_size", 0, f"batch_size=0 must be {WHOLE}"),
        (EvalSettings, "num_workers", -1, "num_workers=-1 must be a whole number of at least 0"),
        (EvalSettings, "per_class", "yes", "per_class=yes must be true or false"),
        (EvalSettings, "evaluation.evaluators.linear.lrs", "many", "linear.lrs=many must be"),
        (EvalSettings, "evaluation.tasks.linear_dino.kinds", "x", "kinds=x must be one or more"),
        (EvalSettings, "evaluation.baselines.colour_histogram.bins", 0, "bins=0 must be"),
        (EmbedSettings, "features", "tokens", "features=tokens must be cls, patch"),
        (EmbedSettings, "dtype", "int8", "dtype=int8 must be float32 or float16"),
        (EmbedSettings, "index", "pq", "index=pq must be flat, ivf or hnsw"),
        (EmbedSettings, "size", 0, f"size=0 must be {WHOLE} or null"),
        (EmbedSettings, "data.max_bad_fraction", 2, "data.max_bad_fraction=2 must be"),
    ],
)
def test_a_commands_settings(composed, command, key, value, message):
    cfg = composed[command].copy()
    parse(command, cfg)
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError) as error:
        parse(command, cfg)
    assert message in str(error.value)
