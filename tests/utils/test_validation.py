"""Settings are checked by the annotations of what they are given to, before anything starts."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import pytest
from annotated_types import Ge, Le
from omegaconf import OmegaConf
from test_conf import load

from ssl_xcit.cli import commands, settings_for
from ssl_xcit.errors import UserError
from ssl_xcit.training.settings import PretrainSettings, place_keys
from ssl_xcit.utils.validation import (
    FREE,
    REST,
    Checker,
    Count,
    NonNegative,
    Positive,
    Words,
    as_plain,
    hints_of,
    links_in,
    located,
    marked,
    parse,
)

GIVEN = {
    "embed": ["out=f.npy"],
    "export": ["format=onnx"],
    "film": ["video=v.mp4"],
    "report": [],
    "search": ["index=f.npy", "image=i.png"],
    "shard": ["out=o"],
    "sweep": ["dir=d"],
}


@dataclass(frozen=True)
class Inner:
    size: Count
    names: Sequence[str]


@dataclass(frozen=True)
class Outer:
    lr: Annotated[Positive, FREE]
    share: Annotated[float, Ge(0), Le(1)] | None
    kind: Literal["a", "b", 3]
    inner: Inner
    on: Annotated[bool, FREE]
    pair: Annotated[Sequence[float], Words("two numbers")]
    others: Annotated[Mapping[str, Any], REST]
    maybe: NonNegative | None = None


class Own:
    @classmethod
    def make(cls, root, x):
        pass


def own(root: "NotThere", x: "int"):
    pass


GOOD = {
    "lr": 1, "share": None, "kind": "a", "inner": {"size": 2, "names": ["x"]}, "on": True,
    "pair": [1, 2.5], "else": {"deep": [1]},
}  # fmt: skip


def test_what_is_right_becomes_typed_and_plain_again():
    settings = parse(Outer, OmegaConf.create(GOOD))
    assert settings.inner == Inner(2, ["x"])
    assert settings.others == {"else": {"deep": [1]}}
    assert as_plain(settings) == GOOD
    assert list(marked(Outer, FREE)) == ["lr", "on"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", 0, "lr=0 must be a number above 0"),
        ("lr", True, "lr=true must be a number above 0"),
        ("lr", "many", "lr=many must be a number above 0"),
        ("lr", None, "lr=null must be a number above 0"),
        ("lr", [1.0], "lr=[1.0] must be a number above 0"),
        ("lr", float("nan"), "lr=nan must be a number above 0"),
        ("lr", float("inf"), "lr=inf must be a number above 0"),
        ("share", 2, "share=2 must be a number of at least 0 and of at most 1 or null"),
        ("kind", "c", "kind=c must be a, b or 3"),
        ("inner.size", 1.5, "inner.size=1.5 must be a whole number of at least 1"),
        ("inner.size", 0, "inner.size=0 must be a whole number of at least 1"),
        ("inner.names", "x", "inner.names=x must be a list of texts"),
        ("inner.names", [1], "inner.names=[1] must be a list of texts"),
        ("inner.sise", 1, "inner.sise: no such setting; did you mean inner.size?"),
        ("inner", 5, "inner=5 must be a group of settings"),
        ("on", 1, "on=1 must be true or false"),
        ("pair", ["x"], "pair=[x] must be two numbers"),
        ("maybe", -1, "maybe=-1 must be a number of at least 0 or null"),
    ],
)
def test_a_line_names_key_value_and_what_is_allowed(key, value, message):
    cfg = OmegaConf.create(GOOD)
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(UserError) as raised:
        parse(Outer, cfg)
    assert str(raised.value) == message


def test_what_is_missing_is_named():
    with pytest.raises(UserError, match=r"^inner\.names is needed: add inner\.names="):
        parse(Outer, OmegaConf.create(GOOD | {"inner": {"size": 1}}))


def test_a_target_is_checked_by_its_signature():
    node = {"_target_": "ssl_xcit.training.checkpoint.SaveCheckpoints", "every_steps": 0}
    cfg = GOOD | {"callbacks": {"one": node}}
    with pytest.raises(UserError, match=r"^callbacks\.one\.every_steps=0 must be a whole number"):
        parse(Outer, OmegaConf.create(cfg))
    node |= {"every_steps": 5, "evry": 1}
    with pytest.raises(UserError, match=r"^callbacks\.one\.evry: no such setting"):
        parse(Outer, OmegaConf.create(cfg))
    cfg["callbacks"] = {"one": {"_target_": "ssl_xcit.training.gone.Gone", "x": 1}}
    with pytest.raises(UserError, match=r"^_target_=ssl_xcit\.training\.gone\.Gone cannot be"):
        parse(Outer, OmegaConf.create(cfg))


def test_targets_of_any_module_are_found_or_named():
    cfg = GOOD | {"one": {"_target_": "test_validation.Own.make", "root": 5, "x": 1}}
    assert parse(Outer, OmegaConf.create(cfg)).others["one"]["x"] == 1
    assert located("test_validation.Own.make") == Own.make
    assert hints_of("test_validation.own") == {"root": Any, "x": Any}
    for path, message in (
        ("ssl_xcit.eval.evaluators.knn", "is no function or class"),
        (5, "must be the dotted path"),
        (None, "must be the dotted path"),
    ):
        cfg["one"] = {"_target_": path, "x": 1}
        with pytest.raises(UserError, match=message):
            parse(Outer, OmegaConf.create(cfg))


def test_helpers_of_a_recipe_are_taken_when_something_refers_to_them(composed):
    cfg, _ = composed["pretrain"]
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    cfg.width = {"small": 16}
    with pytest.raises(UserError, match=r"^width: no such setting"):
        parse(PretrainSettings, cfg)
    cfg.objective.head.hidden_dim = "${width.small}"
    assert parse(PretrainSettings, cfg).objective.head["hidden_dim"] == 16
    cfg.data.base = "."
    cfg.data.source = {"_target_": "test_validation.own", "root": "${data.base}/x", "x": 1}
    settings = parse(PretrainSettings, cfg)
    assert as_plain(settings)["width"] == {"small": 16}
    assert "data.source.root" in place_keys(as_plain(settings))
    assert "data.source.x" not in place_keys(as_plain(settings))


def test_a_value_that_follows_another_is_named_by_the_other():
    node = {"_target_": "ssl_xcit.training.checkpoint.SaveCheckpoints", "every_steps": "${steps}"}
    with pytest.raises(UserError, match=r"^steps=0 must be"):
        parse(Outer, OmegaConf.create(GOOD | {"steps": 0, "callbacks": {"one": node}}))


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_class(main):
    return next(hint for name, hint in get_type_hints(main).items() if name != "return")


@pytest.fixture(scope="module")
def composed():
    """Every command's settings, composed once, and its `main`."""
    made = {}
    for command in commands():
        cfg = load(command, *GIVEN.get(command, []))
        for key in ("ckpt", "data.root", "run", "dir"):
            if OmegaConf.is_missing(cfg, key.split(".")[0]) or (
                "." in key and "data" in cfg and OmegaConf.is_missing(cfg.data, "root")
            ):
                OmegaConf.update(cfg, key, "x")
        module, _, name = cfg.main.rpartition(".")
        made[command] = cfg, getattr(__import__(module, fromlist=[name]), name)
    return made


def test_the_yaml_of_every_command_holds_by_its_own_annotations(composed):
    for cfg, main in composed.values():
        settings = settings_for(main, cfg)
        assert type(settings) in get_type_hints(main).values()


LIBRARIES = ("trainer.", "optim.optimizer.", "logger.")


def with_value(plain, key, value):
    changed = deepcopy(plain)
    *path, last = key.split(".")
    node = changed
    for name in path:
        node = node[name]
    node[last] = value
    return changed


def complaint(main, plain, links):
    """What is said of these settings; nothing when they hold."""
    try:
        Checker(links).value(settings_class(main), plain, "")
    except UserError as error:
        return str(error)
    return ""


def test_every_setting_of_every_command_is_checked(composed):
    """A list of lists is no value of any of ours; what libraries take, they check themselves."""
    unchecked = set()
    for command, (cfg, main) in composed.items():
        plain, links = OmegaConf.to_container(cfg, resolve=True), links_in(cfg)
        for key, _ in leaves(plain):
            if key.rpartition(".")[2].startswith("_") or key.startswith(LIBRARIES):
                continue
            if key in links.values() or key == "data.source.out":  # results are not read as images
                continue
            others = {k: v for k, v in links.items() if k != key}
            message = complaint(main, with_value(plain, key, [[["no"]]]), others)
            if not message.startswith(f"{key}=[[[no]]] must be "):
                unchecked.add(f"{command} {key}: {message}")
    assert not unchecked, "; ".join(sorted(unchecked))


def test_an_unknown_key_is_refused_at_any_depth(composed):
    taken = set()
    for command, (cfg, main) in composed.items():
        plain, links = OmegaConf.to_container(cfg, resolve=True), links_in(cfg)
        for node in {key.rpartition(".")[0] for key, _ in leaves(plain)}:
            if f"{node}.".startswith(LIBRARIES) or node in ("logger", "model"):
                continue
            name = f"{node}.unheard_of".lstrip(".")
            if f"{name}: no such setting" not in complaint(main, with_value(plain, name, 1), links):
                taken.add(f"{command} {name}")
    assert not taken, "; ".join(sorted(taken))


OUT_OF_RANGE = [
    ("pretrain", "epochs", 0, "a number above 0"),
    ("pretrain", "epochs", "abc", "a number above 0"),
    ("pretrain", "batch_size", 0, "a whole number of at least 1"),
    ("pretrain", "batch_size", 4.5, "a whole number of at least 1"),
    ("pretrain", "seed", -1, "a whole number of at least 0"),
    ("pretrain", "optim.lr", -1, "a number above 0"),
    ("pretrain", "optim.min_lr", None, "a number of at least 0"),
    ("pretrain", "objective.clip_norm", 0, "a number above 0"),
    ("pretrain", "objective.teacher_temp", 0, "a number above 0 or null"),
    ("pretrain", "objective.head.hidden_dim", 0, "a whole number of at least 1"),
    ("pretrain", "objective.center_momentum", 1, "a number of at least 0 and below 1"),
    ("pretrain", "num_workers", -1, "a whole number of at least 0 or null"),
    ("pretrain", "data.max_bad_fraction", -1, "a number of at least 0 and of at most 1"),
    ("pretrain", "worker_timeout", 0, "a number above 0"),
    ("pretrain", "collective_timeout", 0, "a number above 0"),
    ("pretrain", "max_skipped", 0, "a whole number of at least 1"),
    ("pretrain", "trainer.accumulate", 0, "a whole number of at least 1"),
    ("pretrain", "callbacks.health.queue", 1, "a whole number of at least 2"),
    ("pretrain", "callbacks.health.patience", "abc", "a whole number of at least 1"),
    ("pretrain", "callbacks.checkpoints.keep_last", 0, "a whole number of at least 1"),
    ("pretrain", "callbacks.metrics.max_data_wait", 2, "a number of at least 0 and of at most 1"),
    ("pretrain", "augment.num_local", -1, "a whole number of at least 0"),
    ("pretrain", "augment.jitter_prob", "often", "a number of at least 0 and of at most 1"),
    ("pretrain", "augment.solarise_prob", 0.2, "3 probabilities, 0 to 1"),
    ("pretrain", "augment.global_size", 22.5, "a whole number of at least 1"),
    ("pretrain", "compile", "maybe", "true or false"),
    ("pretrain", "init.head", "some", "fresh or kept"),
    ("pretrain", "init.freeze_epochs", -1, "a number of at least 0"),
    ("pretrain", "resume.data", "other", "same or changed"),
    ("pretrain", "report", True, "a group of settings or null"),
    ("eval", "which", "techer", "teacher or student"),
    ("eval", "batch_size", 0, "a whole number of at least 1"),
    ("check", "num_workers", -1, "a whole number of at least 0 or null"),
    ("stats", "max_images", 0, "a whole number of at least 1"),
    ("shard", "images_per_shard", 0, "a whole number of at least 1"),
]


@pytest.mark.parametrize(
    ("command", "key", "value", "allowed"), OUT_OF_RANGE, ids=lambda word: str(word)
)
def test_values_out_of_range(composed, command, key, value, allowed):
    cfg, main = composed[command]
    wrong = cfg.copy()
    OmegaConf.update(wrong, key, value)
    with pytest.raises(UserError) as raised:
        settings_for(main, wrong)
    assert str(raised.value).startswith(f"{key}=")
    assert str(raised.value).endswith(f" must be {allowed}")
