"""Fine-tuning in seconds: a tiny backbone, six images of each task, and the words of a command."""

from pathlib import Path

from layouts import coco, mask_folders, picture

KINDS = ("classification", "segmentation", "detection")
MODEL = [
    "model=xcit_micro_4_p8", "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
]  # fmt: skip
OF_KIND = {
    "classification": ["augment.size=32"],
    "segmentation": [
        "augment.size=64", "augment.crop=64", "task.channels=16", "task.class_weights=null",
    ],
    "detection": [
        "augment.sides=[64,72]", "augment.crop_sides=[72]", "augment.crop_range=[48,64]",
        "augment.longest=128", "task.side=64", "task.channels=16", "task.box_channels=16",
        "task.anchor_scale=4", "task.rpn_samples=16", "task.roi_samples=16", "task.proposals=20",
    ],
}  # fmt: skip


def data(kind: str, root: Path) -> Path:
    """A data set of the task in `root`."""
    if kind == "classification":
        for part, count in (("train", 4), ("test", 2)):
            for i in range(2 * count):
                picture(root / part / f"class-{i % 2}" / f"{i}.png", i)
        return root
    if kind == "segmentation":
        return mask_folders(root, {"train": 6, "val": 3}, names=["sky", "grass", "cat"])
    return coco(root, 6, 3)


def words(kind: str, root: Path, *more: str) -> list[str]:
    """`finetune` with its settings; those of `more` win."""
    given = [
        f"transfer={kind}", f"data.root={root}", *MODEL, *OF_KIND[kind], "drop_path=0.2",
        "epochs=2", "batch_size=2", "num_workers=0", "report=null", "trainer=cpu",
        "trainer.precision=32-true", "callbacks.online=null", "callbacks.metrics.every_steps=2",
        "callbacks.checkpoints.every_steps=3", "callbacks.checkpoints.keep_last=9",
        "optim.lr=1e-3",
    ]  # fmt: skip
    keys = {word.split("=")[0] for word in more}
    return ["finetune", *(w for w in given if w.split("=")[0] not in keys), *more]
