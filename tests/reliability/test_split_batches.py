"""Row 15: a batch on 2 and 4 ranks, against one: the same losses and weights after 50 steps."""

from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from ranks import on_ranks

from ssl_xcit.data.picture import RGB
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.build import make_module
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.utils.ranks import summed_
from ssl_xcit.utils.validation import parse

STEPS, BATCH = 50, 8
TOY = [
    "experiment=photos", f"batch_size={BATCH}", f"epochs={STEPS}", "model.embed_dim=16",
    "model.depth=1", "model.num_heads=2", "model.drop_path=0.3", "augment.num_local=2",
    "objective_defaults.hidden_dim=32",
]  # fmt: skip
OBJECTIVES = {
    "dino": ["objective.num_prototypes=64", "objective.koleo=0.1"],
    "swav": ["objective.num_prototypes=8"],
    "infonce": ["objective.queue=16", "objective.projected=cls_patch", "objective.spread=1"],
    "simdino": [],
    "region": [
        "objective.terms.dino.num_prototypes=64",
        "objective.terms.region.num_prototypes=64",
    ],
    "ibot": [
        "objective.terms.dino.num_prototypes=64",
        "objective.terms.ibot.start=0.2",
        "objective.terms.ibot.prototypes.num_prototypes=64",
    ],
    "distillation": [
        "objective.queue=16",
        "objective.teacher=TEACHER",
        "objective.mixup=true",
    ],
}


def write_teacher(file):
    torch.manual_seed(5)
    backbone = XCiT(32, 1, 2, 8)
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "architecture": backbone.architecture, "preprocess": {}}
    torch.save(content, file)


def trained(objective, dtype, teacher, rank=0, ranks=1):
    """Losses over the batch, and student and teacher after 50 steps on this rank's part."""
    words = [w.replace("TEACHER", str(teacher)) for w in OBJECTIVES[objective]]
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        cfg = compose("pretrain", [*TOY, f"objective={objective}", *words])
    settings = parse(PretrainSettings, cfg)
    plan = make_plan(settings, 4 * BATCH, 1, steps=STEPS)  # images enough for the queue
    module = make_module(settings, plan, RGB).to(dtype)
    if objective == "distillation":
        module.objective.frozen_teacher.network.to(dtype)

    def backward(loss):
        loss.backward()
        for p in module.student.parameters():  # as DistributedDataParallel does
            if p.grad is not None:
                summed_(p.grad).div_(ranks)

    trainer = SimpleNamespace(world_size=ranks, global_rank=rank, global_step=0, num_devices=ranks)
    module._trainer = trainer
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.manual_backward = backward
    module.setup("fit")
    module.on_train_start()
    losses, own = [], slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        trainer.global_step = step
        images = torch.randn(1, BATCH, 3, 1, 1, generator=generator, dtype=torch.float64)
        views = [
            (images + torch.randn(2, BATCH, 3, side, side, generator=generator)).to(dtype)[:, own]
            for side in (32, 16)
        ]
        losses.append(module.step(views).loss.item())
    return losses, {name: value.clone() for name, value in module.state_dict().items()}


def work(rank, ranks, teacher):
    names = OBJECTIVES if ranks == 2 else ["dino"]
    made = {name: trained(name, torch.float64, teacher, rank, ranks) for name in names}
    made["float32"] = trained("dino", torch.float32, teacher, rank, ranks)
    return made


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    file = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    write_teacher(file)
    return file


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory, teacher):
    folders = {ranks: tmp_path_factory.mktemp("ranks") for ranks in (2, 4)}
    return {n: on_ranks(n, folder, work, n, teacher) for n, folder in folders.items()}


@pytest.fixture(scope="module")
def of_one(teacher):
    made = {name: trained(name, torch.float64, teacher) for name in OBJECTIVES}
    return {**made, "float32": trained("dino", torch.float32, teacher)}


def difference(ours, theirs):
    """The largest of a tensor to the largest value of that tensor."""
    return max(
        ((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-2)).item()
        for name, value in theirs.items()
        if value.is_floating_point()
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ranks", "name"),
    [*((2, name) for name in [*OBJECTIVES, "float32"]), (4, "dino"), (4, "float32")],
)
def test_row_15_ranks_learn_what_one_learns(of_ranks, of_one, ranks, name):
    losses, weights = of_one[name]
    tolerance = 1e-4 if name == "float32" else 1e-10
    every = of_ranks[ranks]
    for made in every:
        assert made[name][0] == pytest.approx(losses, rel=tolerance)
        assert difference(made[name][1], weights) < tolerance
        assert difference(made[name][1], every[0][name][1]) == 0.0
    print(f"{name} on {ranks} ranks: {difference(every[0][name][1], weights):.1e}")
