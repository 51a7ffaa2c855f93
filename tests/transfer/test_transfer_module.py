"""A step of training on labelled images, and its samples."""

from copy import deepcopy
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from layouts import picture
from toys import data

from ssl_xcit.data.order import crop_seed, image_at
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.datamodule import TrainingData
from ssl_xcit.training.schedules import Polynomial, Steps
from ssl_xcit.transfer.classification.augment import ClassificationAugment
from ssl_xcit.transfer.classification.data import classification_data
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.dataset import TransferDataset, collate, part_sizes, with_fraction
from ssl_xcit.transfer.evaluate import bad_images_words, evaluate
from ssl_xcit.transfer.module import Transfer, clip_all_
from ssl_xcit.transfer.param_groups import transfer_groups


@pytest.fixture
def images(tmp_path):
    return classification_data(str(data("classification", tmp_path / "data"))).train


def plain_task():
    torch.manual_seed(0)
    backbone = XCiT(32, 2, 2, 8)
    return Classification(
        backbone, ("a", "b"), 32, mixup=0.0, cutmix=0.0, erase_prob=0.0, label_smoothing=0.1
    )


def fit(module, images, steps, folder, callbacks=(), repeats=1):
    augment = ClassificationAugment(32, rand_augment_ops=0)
    dataset = TransferDataset(images, augment, 3, RGB, repeats)
    batches = TrainingData(dataset, collate, lambda batch: batch, 4, steps, num_workers=0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=batches)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_equal_a_plain_loop(accumulate, images, tmp_path):
    """Smoothed cross-entropy, one global clip, AdamW in groups, the average after the step."""
    task = plain_task()
    other, average = deepcopy(task), deepcopy(task)
    rates = [1e-3, 3e-3, 2e-3]
    groups = transfer_groups(task, 0.05, 0.5)
    module = Transfer(
        task, groups, rates.__getitem__, torch.optim.AdamW, clip_norm=0.5, ema=0.9,
        accumulate=accumulate,
    )  # fmt: skip
    seen = []

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append((batch.images.clone(), batch.targets.clone()))

    fit(module, images, 3, tmp_path, [Keep()])

    optimizer = torch.optim.AdamW(transfer_groups(other, 0.05, 0.5))
    for step, (pixels, targets) in enumerate(seen):
        optimizer.zero_grad()
        for x, y in zip(pixels.chunk(accumulate), targets.chunk(accumulate), strict=True):
            logits = other.backbone.head(other.backbone(normalise(x, RGB)))
            soft = torch.full((len(y), 2), 0.05)
            soft[torch.arange(len(y)), y] = 0.95
            (-(soft * logits.log_softmax(1)).sum(1).mean() / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group["lr_scale"]
        optimizer.step()
        for mine, theirs in zip(average.parameters(), other.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 1.0 if step == 0 else 0.1)  # the first is copied
    for (name, ours), theirs in zip(task.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name
    for ours, theirs in zip(module.evaluated().parameters(), average.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert module.report(3) == {"lr": 2e-3}


def test_a_step_that_is_not_finite_changes_nothing_and_five_end_the_run(images, tmp_path):
    module = Transfer(plain_task(), [], lambda step: 1e-3, torch.optim.AdamW)
    module.groups = transfer_groups(module.task, 0.0)
    before = {k: v.clone() for k, v in module.task.state_dict().items()}

    class Poison(lightning.Callback):
        def on_train_start(self, trainer, module):
            losses = module.task.losses
            module.task.losses = lambda *given: {
                k: v * torch.nan for k, v in losses(*given).items()
            }

    with pytest.raises(FloatingPointError, match="5 steps in a row"):
        fit(module, images, 8, tmp_path, [Poison()])
    assert all(torch.equal(before[k], v) for k, v in module.task.state_dict().items())
    assert list(tmp_path.glob("nonfinite-step-*.json"))


def test_all_gradients_are_clipped_together():
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for value, p in enumerate(parameters[:2], start=3):
        p.grad = torch.tensor([float(value), 0.0, 0.0])
    norms = clip_all_(parameters, 1.0)
    assert norms.tolist() == [3.0, 4.0, 0.0]
    assert torch.allclose(
        torch.stack([p.grad[0] for p in parameters[:2]]), torch.tensor([0.6, 0.8])
    )


def test_samples_are_functions_of_their_position(images):
    dataset = TransferDataset(images, ClassificationAugment(32), 5, RGB)
    torch.manual_seed(1)
    first = [dataset[position] for position in range(20)]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = [dataset[position] for position in reversed(range(20))][::-1]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.image, two.image)
        assert (one.target, one.place) == (two.target, two.place)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())  # training's own numbers stay
    count = len(images.images)
    assert [s.place for s in first] == [image_at(5, p, count) for p in range(20)]
    assert not torch.equal(first[0].image, dataset.augmented(first[0].place, 1)[0])
    assert torch.equal(first[3].image, dataset.augmented(first[3].place, crop_seed(5, 3, count))[0])


def test_parts_of_a_batch_are_those_of_chunk():
    for count in range(1, 9):
        for num_images in range(count, 20):
            chunks = torch.arange(num_images).chunk(count)
            assert part_sizes(num_images, count) == [len(chunk) for chunk in chunks]


def test_bad_test_images_are_counted(images, tmp_path):
    task = plain_task()
    clean = evaluate(task, images, num_workers=0)
    assert clean.details["left_out"] == {"count": 0, "of": 8, "examples": []}
    assert bad_images_words(clean.details["left_out"]) is None
    bad = images.images.name(3)
    Path(bad).write_bytes(b"no image")
    damaged = evaluate(task, images, num_workers=0)
    left_out = damaged.details["left_out"]
    assert (left_out["count"], left_out["of"]) == (1, 8)
    (example,) = left_out["examples"]
    assert example["image"] == bad
    assert bad_images_words(left_out) == (
        f"1 of 8 test images could not be read and are left out, such as {bad} "
        f"({example['reason']})"
    )
    assert sum(row["images"] for row in damaged.details["per_class"]) == 7


def test_repeated_augmentation_shows_an_image_several_times_in_a_row(images):
    dataset = TransferDataset(images, ClassificationAugment(32), 5, RGB, repeats=3)
    count = len(images.images)
    samples = [dataset[position] for position in range(3 * count)]
    places = [s.place for s in samples]
    assert places[::3] == places[1::3] == places[2::3]
    assert sorted(places[::3]) == list(range(count))  # each image once in as many thirds
    assert not torch.equal(samples[0].image, samples[1].image)


def test_bad_images_and_targets_are_replaced_and_listed(tmp_path):
    root = data("classification", tmp_path / "data")
    (root / "train/class-0/0.png").write_bytes(b"no image")
    source = classification_data(str(root)).train
    dataset = TransferDataset(source, ClassificationAugment(32), 0, RGB)
    batch = collate([dataset[p] for p in range(len(source.images))])
    assert [bad.name.rsplit("/", 2)[1:] for bad in batch.replaced] == [["class-0", "0.png"]]
    assert batch.images.shape == (len(source.images), 3, 32, 32)
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    assert collate([dataset[0]]).indices == -1


def test_a_share_of_the_labels_has_all_classes(tmp_path):
    for i in range(40):
        picture(tmp_path / f"class-{i % 4}" / f"{i}.png", i)
    train = classification_data(str(tmp_path), test_fraction=0.25).train
    part = with_fraction(train, 0.2, 0)
    labels = np.asarray(part.images.labels)
    assert sorted(np.bincount(labels).tolist()) == [2, 2, 2, 2]
    for i in range(len(part.images)):
        assert part.images.name(i).rsplit("/", 2)[1] == part.class_names[part.read_target(i, 1, 1)]
    assert part.digest != with_fraction(train, 0.2, 1).digest
    assert with_fraction(train, 1.0, 0) is train


def test_schedules_equal_torchs():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weight, lr=0.3)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 18], 0.1)
    ours = Steps(0.3, [0.75, 0.9], 20)
    for step in range(20):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    optimizer = torch.optim.SGD(weight, lr=0.3)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, 20, 2.0)
    ours = Polynomial(0.3, 20, power=2.0)
    for step in range(25):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    # mmcv: during the warm-up the decayed rate times 1 - (1 - k) (1 - ratio)
    warm = Steps(1e-4, [0.5], 1000, 500, 1e-7)
    for step in (0, 100, 499):
        expected = 1e-4 * (1 - (1 - step / 500) * (1 - 1e-3))
        assert warm(step) == pytest.approx(expected)
