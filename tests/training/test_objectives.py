"""Objectives as the training step calls them: settings, sums, distillation, state, bad input."""

from functools import partial

import pytest
import torch
from commands import NO_ONLINE, run

from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.models.head import DINOHead, MaskedHead, ProjectionHead
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.objectives.coding_rate import isotropy
from ssl_xcit.objectives.dino import DINO
from ssl_xcit.objectives.distillation import Distillation
from ssl_xcit.objectives.esvit import Region
from ssl_xcit.objectives.ibot import IBOT
from ssl_xcit.objectives.infonce import InfoNCE
from ssl_xcit.objectives.koleo import koleo_loss
from ssl_xcit.objectives.objective import (
    ONE_PROTOTYPE,
    UNIFORM,
    Embedded,
    Inputs,
    RunLength,
    chosen_by_length,
)
from ssl_xcit.objectives.prototype_loss import dino_loss
from ssl_xcit.objectives.simdino import SimDINO
from ssl_xcit.objectives.similarity import patch_similarity_loss, queue_similarity_loss
from ssl_xcit.objectives.sinkhorn import sinkhorn_knopp
from ssl_xcit.objectives.weighted_sum import WeightedSum
from ssl_xcit.training.frozen_teacher import TeacherBackbone, load_frozen_teacher
from ssl_xcit.utils.ranks import BatchPart

LENGTH = RunLength(100, 4, 25.0, 100, 4.0)
SMALL = [word for word in NO_ONLINE if not word.startswith(("objective", "epochs"))]
TEMPERATURES = {"ema": 0.9, "teacher_temp_start": 0.04, "teacher_temp": 0.04}
head = partial(DINOHead, hidden_dim=8, bottleneck_dim=6)
projection = partial(ProjectionHead, out_dim=6, hidden_dim=8)


def embedded(views=4, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    cls = torch.randn(views, 4, width, generator=g)
    patches = (
        torch.randn(2, 4, width, 3, 3, generator=g),
        torch.randn(views - 2, 4, width, 2, 2, generator=g),
    )
    return Embedded(cls.requires_grad_(), patches)


def dino(**settings):
    return DINO(LENGTH, head, num_prototypes=8, **{**TEMPERATURES, **settings})


def test_dinos_switches():
    """Balanced rows instead of centered ones; KoLeo of each global view."""
    objective = dino(centering="sinkhorn", koleo=0.5)
    student_head, teacher_head = objective.make_head(5), objective.make_head(5)
    seen, student = embedded(2, seed=1), embedded()
    targets = objective.targets(teacher_head, seen, Inputs([]), 0)
    logits = teacher_head(seen.cls)
    rows = sinkhorn_knopp(logits.flatten(0, 1), 0.04).unflatten(0, (2, 4))
    assert torch.allclose(targets.rows, rows)
    loss, parts = objective.loss(student_head, student, targets, 0)
    expected = dino_loss(student_head(student.cls), rows, 0.1)
    spread = koleo_loss(student.cls[0]) + koleo_loss(student.cls[1])
    assert loss.item() == pytest.approx((expected + 0.5 * spread).item(), rel=1e-5)
    assert parts.keys() == {"dino", "koleo"}
    before = objective.center.center.clone()
    objective.update_([targets])
    assert torch.equal(objective.center.center, before)  # there is none to move
    dino().update_([dino().targets(teacher_head, seen, Inputs([]), 0)])


def test_the_center_sees_all_parts_of_a_batch():
    whole, parted = dino(), dino()
    shared, seen = whole.make_head(5), embedded(2)
    whole.update_([whole.targets(shared, seen, Inputs([]), 0)])
    halves = [Embedded(seen.cls[:, i : i + 2]) for i in (0, 2)]
    parted.update_([parted.targets(shared, half, Inputs([]), 0) for half in halves])
    assert torch.allclose(whole.center.center, parted.center.center, atol=1e-7)


def test_a_sum_is_the_weighted_sum_of_its_terms():
    terms = {
        "dino": partial(DINO, head=head, num_prototypes=8, **TEMPERATURES),
        "region": partial(Region, head=head, num_prototypes=8, **TEMPERATURES),
        "none": partial(SimDINO, head=projection, ema=0.9),
    }
    total = WeightedSum(LENGTH, terms, {"dino": 0.5, "region": 2.0, "none": 0.0}, ema=0.99)
    heads, student, seen = total.make_head(5), embedded(), embedded(2, seed=1)
    assert total.takes_patches
    assert set(heads.keys()) == {"dino", "region"}
    targets = total.targets(heads, seen, Inputs([]), 3)
    loss, parts = total.loss(heads, student, targets, 3)
    expected = 0.0
    for name, weight in (("dino", 0.5), ("region", 2.0)):
        alone = terms[name](LENGTH)
        alone_targets = alone.targets(heads[name], seen, Inputs([]), 3)
        value, _ = alone.loss(heads[name], student, alone_targets, 3)
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-6)
        expected += weight * value.item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    total.update_([targets])
    assert {k.split(".")[1] for k in total.state_dict()} == {"dino", "region"}
    assert total.derived()["region"]["num_prototypes"] == 8
    assert len(list(total.frozen(heads, 0))) == 2  # prototypes of both, in the first epoch
    for odd in ({"dino": 1.0}, {"dino": 0.0, "region": 0.0, "none": 0.0}):
        with pytest.raises(UserError, match=r"objective\.weights"):
            WeightedSum(LENGTH, terms, odd, ema=0.99)


@pytest.mark.parametrize("kind", [InfoNCE, SimDINO])
def test_class_token_and_mean_patch_in_a_row(kind):
    objective = kind(LENGTH, projection, ema=0.9, projected="cls_patch")
    shared, student, seen = objective.make_head(5), embedded(), embedded(2, seed=1)
    assert objective.takes_patches
    targets = objective.targets(shared, seen, Inputs([]), 0)

    def rows(given):
        patches = [p.flatten(-2).mean(-1) for p in given.patches if len(p)]
        return shared(torch.cat((given.cls, torch.cat(patches)), dim=-1))

    assert torch.equal(targets, rows(seen))
    alone = kind(LENGTH, projection, ema=0.9)
    assert not alone.takes_patches
    loss, _ = objective.loss(shared, student, targets, 0)
    seen_alone = Embedded(torch.cat((student.cls, torch.cat(
        [p.flatten(-2).mean(-1) for p in student.patches])), dim=-1))  # fmt: skip
    expected, _ = alone.loss(shared, seen_alone, targets, 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_masked_patches_by_a_loop():
    prototypes = partial(DINO, head=head, num_prototypes=8, **TEMPERATURES)
    objective = IBOT(LENGTH, MaskedHead, prototypes, ratio=(0.2, 0.6), probability=0.75, start=0.5)
    student_head, teacher_head = objective.make_head(5), objective.make_head(5)
    views = [torch.zeros(2, 4, 3, 24, 24), torch.zeros(2, 4, 3, 16, 16)]
    early = objective.inputs(views, 8, 49, BatchPart(0, 4, 4))
    assert not early.mask.masked.any()  # half of the run is 50 steps
    torch.manual_seed(0)
    inputs = objective.inputs(views, 8, 50, BatchPart(0, 4, 4))
    masked = inputs.mask.masked
    assert masked.shape == (2, 4, 3, 3)
    assert masked.flatten(2).any(-1).sum() == 6
    student, seen = embedded(), embedded(2, seed=1)
    targets = objective.targets(teacher_head, seen, inputs, 60)
    loss, _ = objective.loss(student_head, student, targets, 60)
    expected, rows = 0.0, []
    for g in range(2):
        for b in range(4):
            costs = []
            for i, j in masked[g, b].nonzero().tolist():
                rows.append(teacher_head.projection(seen.patches[0][g, b, :, i, j]))
                q = (rows[-1] / 0.04).softmax(-1)
                s = student_head.projection(student.patches[0][g, b, :, i, j]) / 0.1
                costs.append(-(q * s.log_softmax(-1)).sum())
            expected += torch.stack(costs).mean() / 8 if costs else 0.0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    objective.update_([targets])
    center = 0.1 * torch.stack(rows).mean(dim=0)
    assert torch.allclose(objective.prototypes.center.center, center, atol=1e-6)
    nothing = objective.targets(teacher_head, seen, early, 60)
    value, _ = objective.loss(student_head, student, nothing, 60)
    assert value.item() == 0.0
    value.backward()
    objective.update_([nothing])
    assert torch.allclose(objective.prototypes.center.center, center, atol=1e-6)


def teacher_of(backbone, size=None):
    return TeacherBackbone(backbone.eval(), Preprocess(), size, Preprocess())


def test_distillation_by_a_loop():
    torch.manual_seed(0)
    teacher = teacher_of(XCiT(16, 1, 2, 8))
    objective = Distillation(
        LENGTH, partial(ProjectionHead, num_layers=1, batch_norm=False), lambda *_, **__: teacher,
        teacher="x", queue=6, local_weight=0.3, mixup=False, ema=0.9,
    )  # fmt: skip
    project, views = objective.make_head(5), [torch.randn(2, 4, 3, 24, 24)]
    student = embedded(3)
    rows = torch.randn(5, 16)
    objective.queue.push_(rows)
    targets = objective.targets(project, None, Inputs(views), 0)
    features = [teacher.network.forward_features(view) for view in views[0]]
    for g in range(2):
        assert torch.allclose(targets.embeddings[g], features[g].cls, atol=1e-5)
        assert torch.allclose(targets.patches[g], features[g].patches.movedim(1, -1), atol=1e-5)
    loss, parts = objective.loss(project, student, targets, 0)
    bank = torch.cat((rows, features[0].cls))
    pairs = [(0, 0), (1, 1), (2, 0), (2, 1)]
    terms = [
        queue_similarity_loss(project(student.cls[v]), features[g].cls, bank, 0.07)
        for v, g in pairs
    ]
    patches = project(student.patches[0].movedim(2, -1))
    local = [
        patch_similarity_loss(patches[g], features[g].patches.movedim(1, -1), 0.07)
        for g in range(2)
    ]
    assert parts["global"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    assert parts["local"].item() == pytest.approx(torch.stack(local).mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx((parts["global"] + 0.3 * parts["local"]).item(), rel=1e-5)
    objective.update_([targets])
    assert int(objective.queue.count) == 9
    assert objective.state_dict().keys() == {"queue.rows", "queue.count", "teacher_sha256"}


def test_a_run_does_not_go_on_with_another_teacher():
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        teacher = teacher_of(XCiT(16, 1, 2, 8))
        made.append(
            Distillation(LENGTH, projection, lambda *_, t=teacher, **__: t, "x", queue=6, ema=0.9)
        )
    made[0].load_state_dict(made[0].state_dict())
    with pytest.raises(UserError, match=r"begun with other weights of objective\.teacher"):
        made[1].load_state_dict(made[0].state_dict())


def test_advice_names_settings_that_there_are():
    terms = {"a": partial(DINO, head=head, num_prototypes=8, **TEMPERATURES)}
    total = WeightedSum(LENGTH, terms, {"a": 1.0}, ema=0.9)
    assert "objective.terms.a.teacher_temp" in total.advice[UNIFORM]
    assert "center_momentum" not in dino(centering="sinkhorn").advice[ONE_PROTOTYPE]


def distilled(length, **more):
    teacher = teacher_of(XCiT(16, 1, 2, 8))
    given = {"teacher": "x", "queue": 6, "ema": 0.9, **more}
    to_teacher = partial(ProjectionHead, hidden_dim=8)
    return Distillation(length, to_teacher, lambda *_, **__: teacher, **given)


def test_distillation_beside_another_objective():
    """A sum of both losses, of one pass of each network."""
    prototypes = partial(DINO, head=head, num_prototypes=8, **TEMPERATURES)
    terms = {"dino": prototypes, "distillation": distilled}
    total = WeightedSum(LENGTH, terms, {"dino": 1.0, "distillation": 0.5}, ema=0.9)
    assert total.takes_teacher
    assert total.takes_patches
    torch.manual_seed(0)
    heads = total.make_head(16)
    images, student = torch.randn(2, 4, 3, 24, 24), embedded(width=16)
    seen = Embedded(student.cls[:2].detach(), student.patches[:1])
    targets = total.targets(heads, seen, Inputs([images]), 0)
    loss, parts = total.loss(heads, student, targets, 0)
    assert loss.item() == pytest.approx((parts["dino"] + 0.5 * parts["distillation"]).item())
    loss.backward()
    assert all(p.grad is not None for p in heads["distillation"].parameters())


def test_a_teacher_without_a_grid_is_refused(tmp_path):
    timm = pytest.importorskip("timm")
    for name in ("pit_ti_224", "crossvit_tiny_240"):
        file = str(tmp_path / f"{name}.pth")
        torch.save(timm.create_model(name, num_classes=0).state_dict(), file)
        with pytest.raises(UserError, match="not a square grid of patches: set local_weight=0"):
            load_frozen_teacher(f"timm/{name}", file, patches=True)
    assert load_frozen_teacher(f"timm/{name}", file).width > 0


def test_the_temperature_ends_within_its_share_of_a_short_run():
    """Though an epoch is most of the run; a run that was begun by epochs goes on so."""
    short = LENGTH._replace(steps_per_epoch=800.0, total_steps=1000, epochs=1.25)
    settings = {"num_prototypes": 8, "teacher_temp_start": 0.02, "teacher_temp": 0.04, "ema": 0.9}
    rising = DINO(short, head, **settings).teacher_temp
    assert [rising(0), rising(299), rising(300)] == [0.02, 0.04, 0.04]
    assert 0.029 < rising(150) < 0.031
    begun = DINO(short._replace(begun={"teacher_temp_epochs": 0.375}), head, **settings)
    assert begun.teacher_temp(799) == 0.02
    again = short._replace(begun=DINO(short, head, **settings).derived())
    assert DINO(again, head, **settings).teacher_temp == rising


def test_mixed_images_are_mixed_alike_at_all_sizes():
    teacher = teacher_of(XCiT(16, 1, 2, 8))
    objective = Distillation(
        LENGTH, projection, lambda *_, **__: teacher, teacher="x", queue=6, mixup=True, ema=0.9
    )
    large = torch.arange(4.0)[None, :, None, None, None].expand(2, 4, 3, 8, 8)
    torch.manual_seed(3)
    mixed = objective.inputs([large, large[..., :4, :4]], 8, 0, BatchPart(0, 4, 4)).views
    assert torch.equal(mixed[0][..., :4, :4], mixed[1])
    assert not torch.equal(mixed[0], large)
    pairs = mixed[0][0, :, 0, 0, 0]
    assert pairs[:2].sum() == pytest.approx(1.0)  # 0 with 1, and 2 with 3
    assert pairs[2:].sum() == pytest.approx(5.0)
    for start, stop in ((0, 2), (2, 4)):  # on two ranks
        torch.manual_seed(3)
        part = BatchPart(start, stop - start, 4)
        assert torch.equal(
            objective.inputs([large[:, start:stop]], 8, 0, part).views[0][0],
            mixed[0][0, start:stop],
        )
    odd = objective.inputs([large[:, 1:4]], 8, 0, BatchPart(1, 3, 4)).views[0][0]
    assert (odd[0] == 1.0).all()  # its neighbour is elsewhere


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_teachers_of_timm(name, tmp_path):
    """Embeddings are timm's pooled features before its classifier, from images of any size."""
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=7)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    grey = Preprocess(3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    teacher = load_frozen_teacher(f"timm/{name}", str(tmp_path / "w.pth"), grey)
    sizes = {"dynamic_img_size": True} if name.startswith("vit") else {}
    reference = timm.create_model(name, num_classes=0, **sizes).eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith(("fc.", "head."))}
    reference.load_state_dict(state)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(reference.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        expected = reference((images - mean) / std)
    embeddings, patches = teacher((images - 0.5) / 0.25, True)
    assert torch.allclose(embeddings, expected, atol=1e-4)
    assert patches.shape == (2, *((2, 2) if name == "resnet18" else (4, 4)), teacher.width)


def test_contrast_minus_the_isotropy_of_what_the_head_sees():
    """Of the global views; of the class token alone, or of the mean patch too."""
    for projected in ("cls", "cls_patch"):
        objective = InfoNCE(LENGTH, projection, ema=0.9, projected=projected, spread=0.5)
        student_head, student = objective.make_head(5), embedded()
        seen = Embedded(student.cls[:2].detach(), student.patches[:1])
        targets = objective.targets(student_head, seen, Inputs([]), 0)
        loss, parts = objective.loss(student_head, student, targets, 0)
        features = [*student.cls[:2]]
        if projected == "cls_patch":
            features += [*student.patches[0].mean(dim=(3, 4))]
        filled = sum(isotropy(view) for view in features) / len(features)
        assert parts["isotropy"].item() == pytest.approx(filled.item(), rel=1e-6)
        plain = InfoNCE(LENGTH, projection, ema=0.9, projected=projected)
        contrast, without = plain.loss(student_head, student, targets, 0)
        assert loss.item() == pytest.approx((contrast - 0.5 * filled).item(), rel=1e-6)
        assert without == {}


def test_what_an_objective_refuses(tmp_path):
    with pytest.raises(UserError, match=r"batch_size=1 .* an image is told from the others"):
        InfoNCE(LENGTH._replace(batch_size=1), projection, ema=0.9)
    with pytest.raises(UserError, match=r"objective\.queue=3 does not hold a batch of 4"):
        InfoNCE(LENGTH, projection, queue=3, ema=0.9)
    with pytest.raises(UserError, match=r"objective\.queue=3 does not hold a batch of 4"):
        Distillation(LENGTH, projection, lambda *_, **__: None, teacher="x", queue=3, ema=0.9)
    singly = LENGTH._replace(accumulate=4)
    for objective in (InfoNCE, SimDINO):
        with pytest.raises(UserError, match=r"trainer\.accumulate=4: an image is told"):
            objective(singly, projection, ema=0.9)
    uneven = LENGTH._replace(batch_size=6, accumulate=2, devices=2)
    assert uneven.compared == 2  # three images of each device are two and one
    with pytest.raises(
        UserError,
        match=r"objective\.queue=38 would still .* told from itself, .* set objective\.queue=20",
    ):
        InfoNCE(LENGTH._replace(num_images=40), projection, queue=38, ema=0.9)
    with pytest.raises(UserError, match=r"the same share of the 4 rows"):
        DINO(
            LENGTH._replace(accumulate=2), head, centering="sinkhorn", num_prototypes=8,
            **TEMPERATURES,
        )  # fmt: skip
    with pytest.raises(UserError, match=r"objective\.koleo=0\.1: a single image"):
        DINO(singly, head, koleo=0.1, num_prototypes=8, **TEMPERATURES)
    patches = partial(Region, head=head, num_prototypes=99, centering="sinkhorn", **TEMPERATURES)
    patches(LENGTH)  # of which a batch has more
    with pytest.raises(UserError, match=r"objective\.koleo=0\.1: it is for class tokens"):
        patches(LENGTH, koleo=0.1).make_head(5)
    masked = partial(IBOT, new_head=MaskedHead, prototypes=partial(
        DINO, head=head, num_prototypes=8, **TEMPERATURES))  # fmt: skip
    balanced = IBOT(LENGTH, MaskedHead, partial(
        DINO, head=head, num_prototypes=20, centering="sinkhorn", **TEMPERATURES))  # fmt: skip
    with pytest.raises(UserError, match=r"same share of the 13 rows"):  # a tenth of 2 x 4 x 16
        balanced.inputs([torch.zeros(2, 4, 3, 32, 32)], 8, 0, BatchPart(0, 4, 4))
    twice = WeightedSum(LENGTH, {"a": masked, "b": masked}, {"a": 1.0, "b": 1.0}, ema=0.9)
    with pytest.raises(UserError, match=r"a and b both mask patches.* set objective\.weights\.b=0"):
        twice.make_head(5)
    beside = {"a": partial(DINO, head=head, num_prototypes=8, **TEMPERATURES),
              "b": partial(distilled, mixup=True)}  # fmt: skip
    with pytest.raises(UserError, match=r"terms\.b mixes .* objective\.terms\.b\.mixup=false"):
        WeightedSum(LENGTH, beside, {"a": 1.0, "b": 1.0}, ema=0.9)
    with pytest.raises(UserError, match=r"objective\.teacher is needed"):
        Distillation(LENGTH, projection, lambda *_, **__: None)
    with pytest.raises(UserError, match="same share of the 8 rows of a batch"):
        DINO(LENGTH, head, centering="sinkhorn", num_prototypes=9, **TEMPERATURES)
    table = [{"num_prototypes": 99, **TEMPERATURES}]
    fitting = DINO(LENGTH, head, centering="sinkhorn", by_steps_and_images=table)
    assert fitting.derived()["num_prototypes"] == 8
    torch.save(XCiT(16, 1, 2, 8).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="takes images of 3 channels, and these have 1"):
        load_frozen_teacher(str(tmp_path / "teacher.pth"), None, Preprocess(1))


def test_numbers_by_the_length_of_a_run():
    table = [{"a": 1, "b": 1}, {"steps": 50, "a": 2, "b": 2}, {"images": 1000, "a": 3, "b": 3}]
    assert chosen_by_length({"a": None, "b": 9}, table, "t", LENGTH) == {"a": 2, "b": 9}
    large = LENGTH._replace(num_images=1000, total_steps=1)
    assert chosen_by_length({"a": None, "b": None}, table, "t", large) == {"a": 3, "b": 3}
    begun = LENGTH._replace(begun={"a": 5, "b": float("nan")})
    assert chosen_by_length({"a": None, "b": None}, table, "t", begun) == {"a": 5, "b": 2}
    for wrong in ({"ema": 2.0}, {"num_prototypes": 0.5}, {"teacher_temp": 0}):
        with pytest.raises(UserError, match=f"t: {next(iter(wrong))}=.* must be"):
            chosen_by_length(dict.fromkeys(wrong), [wrong], "t", LENGTH)
    with pytest.raises(UserError, match="c is missing or has no place"):
        chosen_by_length({"a": None}, [{"a": 1, "c": 2}], "t", LENGTH)
    with pytest.raises(UserError, match="a row without"):
        chosen_by_length({"a": None}, [{"steps": 50, "a": 2}], "t", LENGTH._replace(total_steps=1))


def test_a_command_with_another_objective(tmp_path, monkeypatch, capfd):
    """A recipe's numbers reach the objectives that have them; wrong values are one line."""
    monkeypatch.chdir(tmp_path)
    plain = [*SMALL, "epochs=0.02", "eval_data=none"]
    more = ["objective_defaults.hidden_dim=16", "objective.head.out_dim=8"]
    assert run("pretrain", "name=a", "objective=infonce", *more, *plain) == 0
    assert "EMA from 0.9\n" in capfd.readouterr().out
    # whose weights are a start for other objectives, with a frozen backbone at first
    start = ["init.ckpt=runs/a", "init.freeze_epochs=0.01", "init.max_freeze=0.5"]
    numbers = [f"objective.terms.{t}=16" for t in (
        "dino.num_prototypes", "ibot.prototypes.num_prototypes")]  # fmt: skip
    assert run("pretrain", "name=c", "objective=dinov2", *numbers, *start, *plain) == 0
    assert "frozen for" in capfd.readouterr().out
    for words, said in (
        (["objective=infonce", "objective.teacher_temp=1"], "no such setting"),
        (["objective=distillation", "objective.teacher=nowhere"], "nowhere"),
        (["objective=swav", "objective.num_prototypes=99"], "lower objective.num_prototypes"),
    ):
        assert run("pretrain", "name=b", *words, *plain) == 2
        assert said in capfd.readouterr().err
        assert not (tmp_path / "runs" / "b").exists()
