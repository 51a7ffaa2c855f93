"""Every recipe composes, names what exists and takes a step at reduced size; runs that start from
weights keep what they know while a fresh head learns.
"""

import math
import re
import shutil
import sys
from pathlib import Path

import lightning
import pytest
import torch
from commands import SMALL, metrics, run
from hydra.utils import instantiate
from omegaconf import OmegaConf
from test_conf import CONF, RECIPES, load, options
from tiny_run import make_run, published

from ssl_xcit import load_backbone
from ssl_xcit.data.photos import photos
from ssl_xcit.training.build import make_module
from ssl_xcit.training.datamodule import multi_crop_data
from ssl_xcit.training.init_weights import read_start
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.schedules import BackboneUnfreezeSchedule
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.utils.validation import parse

ROOT = CONF.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
TINY = [o for o in SMALL if not o.startswith(("epochs", "objective.", "augment."))]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_at_reduced_size(recipe, tmp_path):
    cfg = load("pretrain", f"experiment={recipe}")
    if OmegaConf.is_missing(cfg.data, "root"):
        cfg.data.root = str(tmp_path)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    cfg.pop("by_model", None)  # to which nothing refers any more
    with torch.device("meta"):
        whole = instantiate(cfg.model)
    assert whole.patch_size <= cfg.augment.local_size
    cfg.model = {
        "_target_": "ssl_xcit.models.xcit.XCiT", "embed_dim": 32, "depth": 2, "num_heads": 4,
        "patch_size": whole.patch_size, "in_chans": 3, "drop_path": cfg.model.drop_path,
    }  # fmt: skip
    cfg.augment.global_size, cfg.augment.local_size = 48, 32
    cfg.objective.head.hidden_dim, prototypes = 16, "bottleneck_dim" in cfg.objective.head
    if prototypes:
        cfg.objective.head.bottleneck_dim = 8
    cfg.batch_size = 8
    if cfg.init.needed:
        cfg.init.ckpt = str(make_run(tmp_path / "first", patch_size=whole.patch_size))
    elif prototypes and cfg.objective.num_prototypes is not None:
        cfg.objective.num_prototypes = 32
    settings, start = read_start(parse(PretrainSettings, cfg), tmp_path / "run")
    assert (start is not None) == (settings.init.ckpt is not None)
    plan, preprocess = make_plan(settings, 1000, 1), instantiate(settings.preprocess)
    module = make_module(settings, plan, preprocess, start)
    before = [p.clone() for p in module.student.parameters()]
    augment = instantiate(settings.augment)
    data = multi_crop_data(photos(), augment, 8, 1, 0, preprocess, num_workers=0)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.global_step == 1
    candidates = plan.objective.num_prototypes if prototypes else 2 * cfg.batch_size
    assert 0.0 < module.output.loss.item() < 1.2 * math.log(candidates)
    moved = [
        not torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True)
    ]
    assert any(moved) == (settings.optim.warmup_start > 0)  # others begin at a rate of 0


def test_the_recipe_of_imagenet_has_a_row_for_each_published_architecture():
    table = load("pretrain", "experiment=imagenet").by_model
    sizes = {name for name in options("model") if not name.endswith("_p4")} - {"xcit_micro_4_p8"}
    assert set(table) == sizes
    documented = (ROOT / "docs/recipes.md").read_text()
    for name in sizes:
        assert re.search(rf"\| {name} \| \d+ \| \d+ \|", documented), name


@pytest.mark.slow
def test_the_table_is_what_the_script_counts():
    import recipes

    table = (ROOT / "docs/recipes.md").read_text()
    assert recipes.row("nano_12", 16) in table
    assert recipes.row("medium_24", 8) in table


def test_release_is_its_table():
    share = BackboneUnfreezeSchedule(3, 4)
    assert [share(step) for step in range(9)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert BackboneUnfreezeSchedule(0, 0)(0) == 1


def state_of(folder):
    return torch.load(folder, weights_only=True)["state_dict"]


def differs(one, two, part):
    keys = [k for k in one if k.startswith(part) and not re.search("running|num_batches", k)]
    assert keys
    return [k for k in keys if not torch.equal(one[k], two[k])]


BEGIN = [
    "init.ckpt=w.pth", "epochs=0.06", "batch_size=8", "num_workers=0", "eval_data=none",
    "~callbacks.online", "callbacks.snapshots=null", "report=null", "trainer=cpu",
    "trainer.precision=32-true", "model.embed_dim=32", "model.depth=2", "model.num_heads=4",
    "augment.global_size=32", "augment.local_size=16", "augment.num_local=4",
    "objective=dino", "objective.num_prototypes=32",
    "objective.head.hidden_dim=16", "objective.head.bottleneck_dim=8",
    "callbacks.checkpoints.every_steps=2", "callbacks.checkpoints.keep_last=9",
    "init.freeze_epochs=1", "init.max_freeze=0.4", "optim.max_warmup=0.3",
]  # fmt: skip


def test_the_backbone_stays_until_it_is_released_and_a_run_goes_on_without_the_file(capsys):
    published(Path("w.pth"))
    assert run("pretrain", "name=a", *BEGIN) == 0
    out = capsys.readouterr().out
    assert (
        "starts from w.pth (teacher), with a fresh head; the backbone is frozen for 4 steps" in out
    )
    saved = {n: state_of(Path(f"runs/a/checkpoints/step-{n:06d}.ckpt")) for n in (2, 4, 6, 11)}
    start = {f"student.backbone.{k}": v for k, v in load_backbone("w.pth").state_dict().items()}
    assert differs(start, saved[2], "student.backbone") == []
    assert differs(start, saved[4], "student.backbone") == []
    teacher = {k.replace("student", "teacher"): v for k, v in start.items()}
    assert differs(teacher, saved[4], "teacher.backbone") == []
    assert len(differs(saved[2], saved[4], "student.head.mlp")) > 0
    assert len(differs(start, saved[6], "student.backbone")) > 50
    # stopped within the frozen part, and the file gone: the same weights in the end
    shutil.copytree("runs/a", "runs/b")
    for path in Path("runs/b/checkpoints").glob("step-*"):
        if path.stem != "step-000002":
            path.unlink()
    Path("runs/b/summary.json").unlink()
    Path("w.pth").unlink()
    assert run("pretrain", "name=b", *BEGIN) == 0
    again = state_of(Path("runs/b/checkpoints/step-000011.ckpt"))
    assert differs(saved[11], again, "") == []
    rows = [[row["step"], row["loss"]] for row in metrics("runs/a")]
    assert rows == [[row["step"], row["loss"]] for row in metrics("runs/b")]
    assert run("pretrain", "name=c", *BEGIN) == 2
    assert "w.pth: no such file" in capsys.readouterr().err


def test_without_freezing_a_fresh_head_moves_the_backbone():
    published(Path("w.pth"))
    assert run("pretrain", "name=a", *BEGIN, "init.max_freeze=0", "epochs=0.02") == 0
    start = {f"student.backbone.{k}": v for k, v in load_backbone("w.pth").state_dict().items()}
    last = sorted(Path("runs/a/checkpoints").glob("step-*"))[-1]
    assert len(differs(start, state_of(last), "student.backbone")) > 50


def test_a_head_is_kept_with_its_center():
    folder = make_run(Path("first"))
    before = state_of(folder / "checkpoints/step-000006.ckpt")
    words = [w for w in BEGIN if not w.startswith(("init.ckpt", "objective.num_prototypes"))]
    words += ["init.ckpt=first", "init.head=kept", "optim.lr=1e-9", "epochs=0.006"]
    assert run("pretrain", "name=a", *words) == 0
    last = sorted(Path("runs/a/checkpoints").glob("step-*"))[-1]
    after = state_of(last)
    head = {k.replace("teacher", "student"): v for k, v in before.items() if "teacher.head" in k}
    for key, value in head.items():
        assert torch.allclose(after[key], value, atol=1e-6), key
    assert after["objective.center.center"].shape == before["objective.center.center"].shape
    assert OmegaConf.load("runs/a/config.yaml").objective.num_prototypes == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.embed_dim=64"], "add model.embed_dim=32"),
        (["model.in_chans=1"], "add model.in_chans=3"),
        (["init.head=some"], "init.head=some"),
        (["init.head=kept"], "has no projection head of DINO; init.head=fresh"),
        (["init.ckpt=none.pth"], "none.pth: no such file"),
        (["init.ckpt=xcit_nano_12_p8"], "name of an architecture"),
        (["init.freeze_epochs=-1"], "init.freeze_epochs=-1"),
        (["init.ckpt=run", "init.head=kept"], "add objective.num_prototypes=24"),
    ],
)
def test_what_cannot_be_started_from(words, message, capsys):
    published(Path("w.pth"))
    make_run(Path("run"))
    assert run("pretrain", "name=a", *BEGIN, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs/a/checkpoints").exists()


def test_recipes_that_need_weights_say_so(capsys):
    for recipe in ("continue", "high_resolution"):
        assert run("pretrain", f"experiment={recipe}") == 2
        assert "init.ckpt is needed: this recipe starts from weights" in capsys.readouterr().err
