"""The published recipes: their numbers, and a step at reduced size."""

import lightning
import pytest
from hydra.utils import instantiate
from layouts import ade20k, coco, picture
from omegaconf import OmegaConf
from test_conf import TRANSFER_RECIPES, load
from toys import OF_KIND

from ssl_xcit.training.datamodule import TrainingData
from ssl_xcit.training.run_dir import identity
from ssl_xcit.training.settings import FinetuneSettings
from ssl_xcit.transfer.build import make_task, make_transfer, make_transfer_plan
from ssl_xcit.transfer.dataset import TransferDataset, collate
from ssl_xcit.utils.validation import as_plain, parse

PUBLISHED = {  # training images, batch, steps, peak rate, weight decay, warm-up steps, images
    "imagenet_supervised": (1_281_167, 1024, 500_455, 1e-3, 0.05, 6256),
    "coco_mask_rcnn": (117_266, 16, 263_848, 1e-4, 0.05, 500),
    "ade20k_fpn": (20_210, 16, 80_000, 6e-5, 0.01, 1500),
    "ade20k_upernet": (20_210, 16, 160_000, 6e-5, 0.01, 1500),
}


def settings(recipe, *words):
    given = ["data.root=.", "ckpt=x", *words]
    return parse(FinetuneSettings, load("finetune", f"experiment={recipe}", *given))


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_numbers_are_the_published_ones(recipe):
    images, batch, steps, lr, decay, warmup = PUBLISHED[recipe]
    given = settings(recipe)
    plan = make_transfer_plan(given, images, 8)
    assert given.batch_size == batch
    assert plan.total_steps == steps
    assert plan.lr == pytest.approx(lr)
    assert plan.warmup_steps == warmup
    assert given.optim.optimizer["weight_decay"] == decay
    assert given.optim.layer_decay == 1.0
    assert given.optim.clip_norm is None
    assert given.drop_path == 0.05
    assert given.optim.no_decay == ("1d" if recipe == "imagenet_supervised" else "norm")
    task, augment = given.task, given.augment
    rate = instantiate(given.optim.schedule)(
        start=plan.lr, total_steps=steps, warmup_steps=warmup,
        warmup_start=given.optim.warmup_start,
    )  # fmt: skip
    if recipe == "imagenet_supervised":
        values = [task[k] for k in ("mixup", "cutmix", "mix_prob", "switch_prob", "erase_prob")]
        assert values == [0.8, 1.0, 1.0, 0.5, 0.25]
        assert (task["label_smoothing"], task["alpha"], task["crop_ratio"]) == (0.1, 0.5, 1.0)
        assert (augment["size"], augment["rand_augment_magnitude"]) == (224, 9)
        assert (given.repeats, given.ema) == (3, None)
        assert (rate(0), rate(warmup)) == (1e-6, pytest.approx(1e-3))
        assert rate(steps) == pytest.approx(1e-5)
    elif recipe == "coco_mask_rcnn":
        assert augment["sides"] == list(range(480, 801, 32))
        assert (augment["crop_sides"], augment["crop_range"]) == ([400, 500, 600], [384, 600])
        assert rate(0) == pytest.approx(1e-7)
        epoch = steps / 36
        drops = [rate(round(at * epoch)) for at in (26.9, 27.1, 32.9, 33.1)]
        assert drops == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])
    else:
        assert (augment["size"], augment["crop"], augment["scale"]) == (512, 512, [0.5, 2.0])
        assert task["head"] == ("upernet" if "upernet" in recipe else "semantic_fpn")
        assert rate(steps) == 0
        assert rate(steps // 2) == pytest.approx(lr / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "metric"),
    [
        (["transfer=classification"], "top1"),
        (["transfer=classification", "task.multi_label=true"], "mAP"),
        (["transfer=classification", "task.multi_label=true", "main_metric=F1"], "F1"),
        (["transfer=segmentation"], "miou"),
        (["transfer=detection"], "box_AP"),
    ],
)
def test_the_main_metric_is_the_first_number_of_the_task(words, metric):
    given = parse(FinetuneSettings, load("finetune", *words))
    assert given.main_metric == metric
    assert given.callbacks["online"]["best"] == metric
    assert given.sweep.metric == metric
    assert "metric_of_labels" not in identity(as_plain(given), [])


def images_of(kind, root):
    if kind == "segmentation":
        return ade20k(root)
    if kind == "detection":
        return coco(root)
    for i in range(8):
        picture(root / ("train" if i < 6 else "val") / f"class-{i % 2}" / f"{i}.png", i)
    return root


@pytest.mark.parametrize("recipe", TRANSFER_RECIPES)
def test_a_step_at_reduced_size(recipe, tmp_path):
    kind = OmegaConf.to_container(load("finetune", f"experiment={recipe}"))["transfer"]
    root = images_of(kind, tmp_path / "data")
    given = settings(
        recipe, f"data.root={root}", "ckpt=null", "model=xcit_micro_4_p8", "model.embed_dim=32",
        "model.depth=2", "model.num_heads=2", "batch_size=2", *OF_KIND[kind],
    )  # fmt: skip
    data, preprocess = instantiate(given.data.source), instantiate(given.preprocess)
    plan = make_transfer_plan(given, len(data.train.images), 1)
    task = make_task(given, None, data.train, preprocess)
    module = make_transfer(given, plan, task)
    before = [p.clone() for p in task.parameters()]
    dataset = TransferDataset(data.train, instantiate(given.augment), 0, preprocess, given.repeats)
    batches = TrainingData(dataset, collate, lambda batch: batch, 2, 2, num_workers=0)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=batches)
    assert trainer.global_step == 2
    assert module.guard.skipped == 0
    assert any((a != b).any() for a, b in zip(before, task.parameters(), strict=True))
