"""Settings are checked by the annotations of what they are given to, before anything starts."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

import pytest
from annotated_types import Ge, Le
from omegaconf import OmegaConf
from test_conf import load

from ssl_xcit.cli import commands, settings_for
from ssl_xcit.errors import UserError
from ssl_xcit.eval.commands.visualize import PATCH
from ssl_xcit.training.settings import PretrainSettings, place_keys
from ssl_xcit.utils.validation import (
    FREE,
    PLACE,
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
    marked_parameters,
    parse,
)

GIVEN = {
    "embed": ["out=f.npy"],
    "eval": ["tasks=[linear_dino]"],
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
    assert parse(PretrainSettings, cfg).objective["head"]["hidden_dim"] == 16
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
            if f"{node}.".startswith(LIBRARIES) or node in ("logger", "model", "metric_of_labels"):
                continue  # names of any kind stand there
            name = f"{node}.unheard_of".lstrip(".")
            if f"{name}: no such setting" not in complaint(main, with_value(plain, name, 1), links):
                taken.add(f"{command} {name}")
    assert not taken, "; ".join(sorted(taken))


REFUSED = {  # what is allowed -> commands or targets, with words that are refused
    "a number above 0": (
        "pretrain epochs=0 epochs=abc objective.clip_norm=0 worker_timeout=0 "
        "collective_timeout=0; stats worker_timeout=0; "
        "eval.tasks.video_segmentation.VideoSegmentation temperature=0.0; "
        "data.shards.tar_shards cache_gb=0; data.shards.labelled_shards cache_gb=-1"
    ),
    "a whole number of at least 1": (
        "pretrain batch_size=0 batch_size=4.5 objective.head.hidden_dim=0 max_skipped=0 "
        "trainer.accumulate=0 callbacks.health.patience=abc callbacks.checkpoints.keep_last=0 "
        "augment.global_size=22.5; eval batch_size=0; stats max_images=0 max_images=null; "
        "shard images_per_shard=0; atlas max_images=0; film every=0; search k=0 k=2.5; "
        "sweep top=0; visualize max_images=0 columns=0; check min_side=0; "
        "eval.runner.evaluate batch_size=0; eval.evaluators.knn.FewShot draws=0; "
        "eval.evaluators.linear.LinearProbe epochs=0; "
        "eval.evaluators.clustering.Clustering runs=0; "
        "eval.evaluators.exported_knn.ExportedKNN k=0; "
        "eval.tasks.attention_jaccard.AttentionJaccard size=0; "
        "eval.tasks.segmentation.Segmentation iterations=true max_bank=-1; "
        "eval.tasks.video_segmentation.VideoSegmentation topk=0; "
        "eval.online.OnlineEvaluation every_steps=0; data.fused.FusedMultiCrop local_size=0; "
        "data.preprocess.preprocess max_pixels=0; data.shards.tar_shards window=0; "
        "eval.viz.snapshots.Snapshots images=0; models.xcit.XCiT embed_dim=0; "
        "models.xcit.create_model in_chans=0"
    ),
    "a whole number of at least 0": (
        "pretrain seed=-1 augment.num_local=-1; atlas seed=-1; shard seed=-1; "
        "eval.tasks.video_segmentation.VideoSegmentation num_context=-1; "
        "data.fused.FusedMultiCrop num_local=-1; models.xcit.create_model num_classes=-1"
    ),
    "a number above 0 or auto": "pretrain optim.lr=-1 optim.lr=0 optim.lr=best",
    "a number of at least 0": "pretrain optim.min_lr=null init.freeze_epochs=-1",
    "a number above 0 or null": (
        "pretrain objective.teacher_temp=0; film max_seconds=0; visualize teacher_temp=0; "
        "eval.tasks.copy_detection.CopyDetection gem=0.0; "
        "eval.tasks.linear_augmented.AugmentedProbe epochs=0"
    ),
    "a number of at least 0 and below 1": (
        "pretrain objective.center_momentum=1; data.folders.labelled_folders test_fraction=1; "
        "models.xcit.XCiT drop_path=1.0"
    ),
    "a whole number of at least 0 or null": (
        "pretrain num_workers=-1; check num_workers=-1; eval num_workers=-1; "
        "atlas num_workers=-1; shard num_workers=some"
    ),
    "a number of at least 0 and of at most 1": (
        "pretrain data.max_bad_fraction=-1 callbacks.metrics.max_data_wait=2 "
        "augment.jitter_prob=often; embed data.max_bad_fraction=2; film overlay=2; "
        "visualize overlay=2; check data.max_bad_fraction=-1; "
        "data.multicrop.TorchvisionMultiCrop grey_prob=2"
    ),
    "a whole number of at least 2": (
        "pretrain callbacks.health.queue=1; report max_images=1; "
        "eval.online.OnlineEvaluation max_images=1; "
        "eval.viz.snapshots.Snapshots moments=1 moments=true; models.head.DINOHead num_prototypes=1"
    ),
    "3 probabilities, 0 to 1": (
        "pretrain augment.solarise_prob=0.2; "
        "data.fused.FusedMultiCrop blur_prob=[1.0,0.1,1.5] blur_prob=often"
    ),
    "true or false": (
        "eval per_class=7; film side_by_side=1; "
        "visualize over_time=1; shard shuffle=7; "
        "eval.tasks.landmark_retrieval.Retrieval crop_queries=1; "
        "data.folders.folder labels=some; export formats.onnx.patches=2; "
        "models.xcit.XCiT tokens_norm=1"
    ),
    "true or false or auto": "pretrain compile=maybe",
    "fresh or kept": "pretrain init.head=some",
    "same or changed": "pretrain resume.data=other",
    "a group of settings or null": "pretrain report=true; eval.runner.evaluate evaluators.linear=5",
    "teacher or student": (
        "eval which=techer; atlas which=both; export which=both; film which=both; "
        "report which=both; visualize which=both"
    ),
    "a number above 0 or a list of numbers above 0": (
        "eval evaluation.evaluators.linear.lrs=many; "
        "eval.evaluators.knn.KNN temperature=0.0 temperature=[]; "
        "eval.evaluators.linear.LinearProbe lrs=[] lrs=-0.1 lrs=true; "
        "eval.tasks.landmark_retrieval.Retrieval scales=[] scales=[0.0]; "
        "eval.tasks.segmentation.Segmentation strengths=[-1.0]; "
        "eval.tasks.linear_augmented.AugmentedProbe lrs=[]"
    ),
    "one or more of cls, patch, cls_patch, last4, last4_patch": (
        "eval evaluation.tasks.linear_dino.kinds=x; "
        "eval.evaluators.linear.LinearProbe kinds=[clss] kinds=[]; "
        "eval.evaluators.logistic.Regression kinds=[]"
    ),
    "a whole number of at least 1 and of at most 256": (
        "eval evaluation.baselines.colour_histogram.bins=0; "
        "eval.evaluators.baselines.colour_histogram bins=300"
    ),
    "cls, patch, cls_patch, last4 or last4_patch": "embed features=tokens",
    "float32 or float16": "embed dtype=int8",
    "flat, ivf or hnsw": "embed index=pq",
    "a whole number of at least 1 or null": (
        "embed size=0; film head=0 size=big; visualize size=large; "
        "eval.evaluators.class_retrieval.ClassRetrieval max_bank=0"
    ),
    "test, train or all": "atlas part=validation",
    "a whole number of at least 8 and of at most 256 or null": "atlas thumbnail=1000",
    "a number of at least 1": "atlas perplexity=0",
    "text": "atlas device=7",
    "text or a list of texts": "export format=3",
    "attention or pca": "film kind=mask",
    "1 or 2, of the two class-attention blocks": "film block=3; visualize block=3 block=true",
    "a number of at least 0.001 and below 1001": "film fps=0 fps=0.0001",
    "some of attention, pca, channels, neighbours, prototypes": (
        "visualize kinds=[] kinds=[attention,pictures] kinds=7"
    ),
    "a number above 0 and of at most 1": (
        "visualize mass=0 mass=.nan; eval.evaluators.knn.KNN recall=0.0"
    ),
    "a number or null": "visualize threshold=.inf",
    PATCH: (
        "visualize patch=5 patch=[] patch=[0.5] patch=[1,2,3] patch=[-1,2] patch=[0.5,1.5] "
        "patch=[a,b] patch=[.nan,0.5] patch=[true,1] patch=[0.5,2]"
    ),
    "a whole number of at least 1 and of at most 128": (
        "stats preprocess.channels=0; data.preprocess.preprocess channels=0"
    ),
    "float16 or float32": "eval.runner.evaluate feature_dtype=int8",
    "a number above 0 and below 1 or null": "eval.runner.evaluate near_duplicates=1.5",
    "a whole number of at least 1 or a list of whole numbers of at least 1": (
        "eval.evaluators.knn.KNN k=[] k=[0] k=2.5; eval.evaluators.knn.FewShot shots=[0]"
    ),
    "ivf or hnsw or null": "eval.evaluators.knn.KNN index=flat",
    "a number above 0 and below 1": (
        "eval.evaluators.linear.LinearProbe val_fraction=1.0; "
        "eval.tasks.attention_jaccard.AttentionJaccard mass=1.0; "
        "eval.tasks.segmentation.Segmentation held_fraction=1.0"
    ),
    "a number of at least 0 or a list of numbers of at least 0": (
        "eval.evaluators.linear.LinearProbe weight_decays=[-1.0]"
    ),
    "a number above 0 or a list of numbers above 0 or null": (
        "eval.evaluators.logistic.Logistic strengths=[] strengths=[0.0]"
    ),
    "a folder": "eval.tasks.copy_detection.CopyDetection root=true",
    "[low,high], two numbers above 0 and of at most 1": (
        "eval.tasks.linear_augmented.AugmentedProbe scale=[0.5] scale=[0.5,1.2]"
    ),
    "[teacher], [student] or [teacher,student]": (
        "eval.online.OnlineEvaluation networks=[] networks=[techer] networks=teacher"
    ),
    "a number above 0 and of at most 1 or null": "eval.online.OnlineEvaluation eval_budget=0.0",
    "[low,high] with 0 < low <= high <= 1": (
        "data.fused.FusedMultiCrop global_scale=[0.5,0.4] local_scale=[0,0.4]"
    ),
    "4 numbers: three of 0 to 1, and hue of 0 to 0.5": (
        "data.fused.FusedMultiCrop jitter=[0.4,0.4,0.2] jitter=[0.4,0.4,0.2,0.6]"
    ),
    "[low,high] with 0 < low <= high": "data.fused.FusedMultiCrop blur_radius=[0.0,2.0]",
    "3 whole numbers of 0 to 255": "data.preprocess.preprocess background=[0,0,256]",
    "[low,high] with low < high or null": "data.preprocess.preprocess value_range=[3,3]",
    "text or a list of text or null": "data.folders.folder root=[a,null]",
    "classes or numbers or null": (
        "data.lists.labelled_lists label_kind=words; data.sets.labelled_arrays label_kind=words"
    ),
    "CIFAR10, CIFAR100, STL10 or ImageNet": "data.sets.torchvision_set name=MNIST",
    "a whole number of at least 16": "eval.viz.snapshots.Snapshots size=8",
}


def refused():
    for allowed, text in REFUSED.items():
        for part in text.split("; "):
            subject, *words = part.split()
            yield from ((subject, word, allowed) for word in words)


@pytest.mark.parametrize(("subject", "word", "allowed"), refused())
def test_a_value_that_is_refused(composed, subject, word, allowed):
    """One line names the key, the value, and all that is allowed."""
    key, given = word.partition("=")[0], OmegaConf.from_dotlist([word])
    if "." in subject:
        node = {"_target_": f"ssl_xcit.{subject}", **OmegaConf.to_container(given)}
        check = partial(Checker({}).target, node, "x")
    else:
        cfg, main = composed[subject]
        wrong = cfg.copy()
        OmegaConf.update(wrong, key, OmegaConf.select(given, key), merge=False)
        check = partial(settings_for, main, wrong)
    with pytest.raises(UserError) as raised:
        check()
    assert re.match(rf"(x\.)?{re.escape(key)}=", str(raised.value))
    assert str(raised.value).endswith(f" must be {allowed}")


@pytest.mark.parametrize("word", ["patch=null", "patch=[0.5,1]", "patch=[120,300]", "kinds=pca"])
def test_other_forms_of_a_setting(composed, word):
    cfg, main = composed["visualize"]
    settings_for(main, OmegaConf.merge(cfg, OmegaConf.from_dotlist([word])))


@pytest.mark.parametrize("root", ["images", 2024, ["a", 7], None])
def test_a_folder_may_look_like_a_number(root):
    Checker({}).target({"_target_": "ssl_xcit.data.folders.folder", "root": root}, "x")


@pytest.mark.parametrize(
    ("target", "places"),
    [
        ("folders.folder", "root labels out"),
        ("folders.labelled_folders", "root test_root"),
        ("lists.path_list", "file root image_column label_column backslashes label_kind"),
        ("lists.labelled_lists", "file test_file root labels test_labels image_column label_column "
         "backslashes label_kind"),
        ("sets.arrays", "file labels member label_kind"),
        ("sets.labelled_arrays",
         "file labels test_file test_labels member test_member label_kind"),
        ("sets.huggingface", "root label_kind"),
        ("sets.labelled_huggingface", "root label_kind"),
        ("sets.torchvision_set", "root download"),
        ("sets.labelled_torchvision", "root download"),
        ("shards.tar_shards", "root cache cache_gb"),
        ("shards.labelled_shards", "root test_root cache cache_gb"),
        ("photos.photos", "cache"),
        ("photos.labelled_photos", "cache"),
        ("preprocess.preprocess", "stats"),
    ],
)  # fmt: skip
def test_parameters_that_say_only_where_images_lie(target, places):
    assert marked_parameters(f"ssl_xcit.data.{target}", PLACE) == places.split()
