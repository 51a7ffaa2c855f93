"""Thresholded attention against its definition, Jaccard indices against scikit-learn."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import ssl_xcit.conf
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.metrics import jaccard_score
from ssl_xcit.eval.attention_masks import AttentionJaccard, jaccards, largest
from ssl_xcit.eval.frozen import Frozen, Task

from ssl_xcit.data.decode import RGB, read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.xcit import XCiT

SIZE = 64


def save_images(root, names, masks):
    for folder in ("images", "masks"):
        (root / folder / "val").mkdir(parents=True)
    photos = dict(photographs())
    for name, mask in zip(names, masks, strict=True):
        pixels = read_image(photos[name])[: mask.shape[0], : mask.shape[1]]
        Image.fromarray(pixels).save(root / "images" / "val" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / "val" / f"{name}.png")


@pytest.fixture
def masks():
    """Two objects and a border, one object, nothing but background."""
    found = np.zeros((3, 100, 130), np.uint8)
    found[0, 20:60, 30:90] = 5
    found[0, 70:95, 5:60] = 17
    found[0, 18:20, 30:90] = 255
    found[1, 40:80, 40:110] = 254
    found[2, :10] = 255
    return found


@pytest.fixture
def root(tmp_path, masks):
    save_images(tmp_path, ["astronaut", "chelsea", "flower"], masks)
    return tmp_path


@pytest.fixture
def frozen():
    torch.manual_seed(3)
    backbone = XCiT(32, 2, 4, patch_size=8)
    with torch.no_grad():  # attention that is far from flat
        backbone.cls_attn_blocks[1].attn.qkv.weight.mul_(60)
    return Frozen(backbone, RGB, torch.device("cpu"), batch_size=2, num_workers=0)


def kept_one_by_one(attention, mass):
    """Patches from the largest down, until they hold the share."""
    flat, kept, held = attention.ravel().astype(np.float64), [], 0.0
    for place in np.argsort(-flat, kind="stable"):
        if held >= mass * flat.sum():
            break
        kept.append(place)
        held += flat[place]
    return np.isin(np.arange(flat.size), kept).reshape(attention.shape)


@pytest.mark.parametrize("mass", [0.01, 0.6, 0.99])
def test_the_largest_patches_hold_the_mass(mass):
    attention = torch.rand(3, 2, 7, 5, generator=torch.Generator().manual_seed(0)) ** 3
    found = largest(attention, mass)
    for one, expected in zip(found.flatten(0, 1), attention.flatten(0, 1), strict=True):
        assert np.array_equal(one.numpy(), kept_one_by_one(expected.numpy(), mass))


def test_by_hand():
    assert largest(torch.tensor([[0.5, 0.2, 0.2, 0.1]]), 0.6).tolist() == [
        [True, True, False, False]
    ]
    maps = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])
    mask = np.array([[1, 1, 2, 2], [1, 1, 255, 0]], np.uint8)
    # each patch is one row of two pixels
    assert jaccards(maps, mask).tolist() == [[2 / 4, 2 / 6], [0.0, 2 / 4]]
    assert jaccards(maps, np.array([[0, 255]], np.uint8)).shape == (0, 2)


def test_values_are_the_protocols(root, frozen, masks):
    values = dict(AttentionJaccard(str(root), size=SIZE)(frozen))
    assert list(values) == ["attention_jaccard", "attention_jaccard_mean"]
    best, mean = [], []
    for name, mask in zip(["astronaut", "chelsea"], masks, strict=False):
        picture = Image.open(root / "images" / "val" / f"{name}.png")
        small = np.array(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        x = normalise(torch.from_numpy(small).permute(2, 0, 1)[None], RGB)
        with torch.no_grad():
            attention = frozen.backbone.eval().attention(x)[0].numpy()
        kept = [kept_one_by_one(a, 0.6) for a in (*attention, attention.mean(0))]
        rows = ((np.arange(100) + 0.5) * 8 / 100).astype(int)
        columns = ((np.arange(130) + 0.5) * 8 / 130).astype(int)
        objects = []
        for index in sorted(set(mask.ravel().tolist()) - {0, 255}):
            valid = mask != 255
            objects.append(
                [jaccard_score((mask == index)[valid], k[rows][:, columns][valid]) for k in kept]
            )
        best.append(np.mean([max(each[:-1]) for each in objects]))
        mean.append(np.mean([each[-1] for each in objects]))
    assert np.allclose(values["attention_jaccard"].items, best)
    assert np.allclose(values["attention_jaccard_mean"].items, mean)
    assert values["attention_jaccard"] == pytest.approx(100 * np.mean(best))
    assert values["attention_jaccard_mean"] == pytest.approx(100 * np.mean(mean))
    assert len(set(np.round(best + mean, 6))) == 4  # or the maps would be all alike


def test_it_leaves_torch_and_backbone_alone(root, frozen):
    frozen.backbone.train()
    state = torch.get_rng_state()
    task = AttentionJaccard(str(root), size=SIZE)
    assert dict(task(frozen)) == dict(task(frozen))
    assert frozen.backbone.training
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input_is_named(root, frozen, tmp_path):
    with pytest.raises(MissingPath, match="no such folder"):
        AttentionJaccard(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="size=65: a multiple of the patch size 8; try 64"):
        dict(AttentionJaccard(str(root), size=65)(frozen))
    mask = root / "masks" / "val" / "astronaut.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"astronaut\.png has 9 x 9 pixels"):
        dict(AttentionJaccard(str(root), size=SIZE)(frozen))
    for name in ("astronaut", "chelsea"):
        Image.fromarray(np.zeros((100, 130), np.uint8)).save(mask.with_stem(name))
    with pytest.raises(UserError, match="no mask has an object"):
        dict(AttentionJaccard(str(root), size=SIZE)(frozen))
    mask.unlink()
    with pytest.raises(MissingPath, match=r"astronaut\.png has no partner"):
        AttentionJaccard(str(root))


@pytest.mark.parametrize("options", [{"size": 0}, {"size": -8}, {"mass": 0.0}, {"mass": 1.0}])
def test_bad_settings(root, options):
    with pytest.raises(UserError, match=r"(size|mass)="):
        AttentionJaccard(str(root), **options)


def test_the_yaml_has_the_defaults_and_makes_a_task(root):
    path = Path(ssl_xcit.conf.__file__).parent / "tasks" / "attention_masks.yaml"
    assert path.read_text().startswith("# @package evaluation.tasks.attention_masks\n# ")
    settings = OmegaConf.load(path)
    made = instantiate(settings, root=str(root))
    assert isinstance(made, Task)
    assert vars(made) == vars(AttentionJaccard(str(root)))
    assert {"_target_", *inspect.signature(AttentionJaccard).parameters} == set(settings)
