"""Thresholded attention against its definition, Jaccard indices against scikit-learn."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.tasks.attention_jaccard import AttentionJaccard, jaccards, largest
from ssl_xcit.models.xcit import XCiT

SIZE = 64


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
    for folder in ("images", "masks"):
        (tmp_path / folder / "val").mkdir(parents=True)
    photos = dict(photographs())
    for name, mask in zip(("astronaut", "chelsea", "flower"), masks, strict=True):
        pixels = read_image(photos[name])[: mask.shape[0], : mask.shape[1]]
        Image.fromarray(pixels).save(tmp_path / "images" / "val" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / "val" / f"{name}.png")
    return tmp_path


@pytest.fixture
def extractor():
    torch.manual_seed(3)
    backbone = XCiT(32, 2, 4, patch_size=8)
    with torch.no_grad():  # attention that is far from flat
        backbone.cls_attn_blocks[1].attn.qkv.weight.mul_(60)
    return FeatureExtractor(backbone, RGB, torch.device("cpu"), batch_size=2, num_workers=0)


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
    attention = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    assert largest(attention, 0.6).tolist() == [[True, True, False, False]]
    maps = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])
    mask = np.array([[1, 1, 2, 2], [1, 1, 255, 0]], np.uint8)
    # each patch is one row of two pixels
    assert jaccards(maps, mask).tolist() == [[2 / 4, 2 / 6], [0.0, 2 / 4]]
    assert jaccards(maps, np.array([[0, 255]], np.uint8)).shape == (0, 2)


def test_values_are_the_protocols(root, extractor, masks):
    values = dict(AttentionJaccard(str(root), size=SIZE)(extractor))
    assert list(values) == ["attention_jaccard", "attention_jaccard_mean"]
    best, mean = [], []
    for name, mask in zip(["astronaut", "chelsea"], masks, strict=False):
        picture = Image.open(root / "images" / "val" / f"{name}.png")
        small = np.array(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        x = normalise(torch.from_numpy(small).permute(2, 0, 1)[None], RGB)
        with torch.no_grad():
            attention = extractor.backbone.eval().attention(x)[0].numpy()
        kept = [kept_one_by_one(a, 0.6) for a in (*attention, attention.mean(0))]
        rows = ((np.arange(100) + 0.5) * 8 / 100).astype(int)
        columns = ((np.arange(130) + 0.5) * 8 / 130).astype(int)
        objects = []
        for index in sorted(set(mask.ravel().tolist()) - {0, 255}):
            valid = mask != 255
            true = (mask == index)[valid]
            objects.append([jaccard_score(true, k[rows][:, columns][valid]) for k in kept])
        best.append(np.mean([max(each[:-1]) for each in objects]))
        mean.append(np.mean([each[-1] for each in objects]))
    assert np.allclose(values["attention_jaccard"].items, best)
    assert np.allclose(values["attention_jaccard_mean"].items, mean)
    assert values["attention_jaccard"] == pytest.approx(100 * np.mean(best))
    assert values["attention_jaccard_mean"] == pytest.approx(100 * np.mean(mean))
    assert len(set(np.round(best + mean, 6))) == 4  # or the maps would be all alike


def test_it_leaves_torch_and_backbone_alone(root, extractor):
    extractor.backbone.train()
    state = torch.get_rng_state()
    task = AttentionJaccard(str(root), size=SIZE)
    assert dict(task(extractor)) == dict(task(extractor))
    assert extractor.backbone.training
    assert torch.equal(state, torch.get_rng_state())


def test_bad_input_is_named(root, extractor, tmp_path):
    with pytest.raises(MissingPath, match="no such folder"):
        AttentionJaccard(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="size=65 must be a multiple of the patch size 8; try 64"):
        dict(AttentionJaccard(str(root), size=65)(extractor))
    mask = root / "masks" / "val" / "astronaut.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"astronaut\.png has 9 x 9 pixels"):
        dict(AttentionJaccard(str(root), size=SIZE)(extractor))
    for name in ("astronaut", "chelsea"):
        Image.fromarray(np.zeros((100, 130), np.uint8)).save(mask.with_stem(name))
    with pytest.raises(UserError, match="no mask has an object"):
        dict(AttentionJaccard(str(root), size=SIZE)(extractor))
    mask.unlink()
    with pytest.raises(MissingPath, match=r"astronaut\.png has no partner"):
        AttentionJaccard(str(root))
