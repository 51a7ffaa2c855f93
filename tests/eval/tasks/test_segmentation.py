"""Segmentation of mosaics of photographs, against scikit-learn and torch's own interpolation."""

import base64
import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.neighbors import KNeighborsClassifier

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import MissingPath, RunFailed, UserError
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.eval.tasks.masks import Pair, find_pairs, read_mask, resize_image, resize_mask
from ssl_xcit.eval.tasks.segmentation import (
    Patches,
    Segmentation,
    bank_head,
    fit_linear,
    logistic_path,
    miou,
    patch_labels,
    upsampled_argmax,
)
from ssl_xcit.models.xcit import XCiT

CLASSES = {3: "hubble_deep_field", 7: "coffee", 40: "grass", 200: "ihc"}  # index: photograph
HEIGHT, WIDTH, SIZE = 80, 96, 64
QUICK = {"size": SIZE, "strengths": [0.1, 0.01, 0.001], "iterations": 50}

FOUR_BITS = base64.b64decode(  # 5 x 4 grey pixels, a depth that Pillow does not write
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAEBAAAAACmqEedAAAAF0lEQVR42mNgVHZgCKuYwLD67AMGIBsAIR8Efz0n"
    "AzUAAAAASUVORK5CYII="
)


def mosaic(rng, photos):
    """Four crops around a random point, and which photograph each is from; a corner is ignored."""
    image, mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    row, column = rng.integers(24, HEIGHT - 24), rng.integers(24, WIDTH - 24)
    order = rng.permutation(list(photos))
    halves = ((slice(middle), slice(middle, None)) for middle in (row, column))
    for index, (rows, columns) in zip(order, itertools.product(*halves), strict=True):
        height, width = mask[rows, columns].shape
        photo = photos[index]
        top = rng.integers(photo.shape[0] - height)
        left = rng.integers(photo.shape[1] - width)
        image[rows, columns] = photo[top : top + height, left : left + width]
        mask[rows, columns] = index
    mask[:10, :10] = 255
    return image, mask


def save(root, images, masks, split, count, rng):
    photos = {name: read_image(file) for name, file in photographs()}
    chosen = {index: photos[name] for index, name in CLASSES.items()}
    for folder in (root / images / split, root / masks / split):
        folder.mkdir(parents=True)
    for i in range(count):
        image, mask = mosaic(rng, chosen)
        Image.fromarray(image).save(root / images / split / f"{i:02d}.png")
        palette = Image.fromarray(mask, "P")
        palette.putpalette(rng.integers(256, size=768).astype(np.uint8).tobytes())
        palette.save(root / masks / split / f"{i:02d}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosaics")
    rng = np.random.default_rng(0)
    save(folder, "images", "masks", "train", 16, rng)
    save(folder, "images", "masks", "val", 7, rng)
    return folder


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(3)
    backbone = XCiT(32, 1, 2, patch_size=8)
    return FeatureExtractor(backbone, RGB, torch.device("cpu"), batch_size=5, num_workers=2)


def features_and_masks(extractor, pairs):
    """Patch features by image, (h w, C), and masks, without any of the evaluator's code."""
    found = []
    for pair in pairs:
        small = Image.open(pair.image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        x = normalise(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None], RGB)
        with torch.no_grad():
            maps = extractor.backbone.eval().forward_features(x).patches[0]
        found.append((maps.flatten(1).T.numpy(), np.array(Image.open(pair.mask))))
    return found


def majority(mask):
    """The most frequent index of each patch, counted one by one."""
    small = np.array(Image.fromarray(mask).resize((SIZE, SIZE), Image.Resampling.NEAREST))
    corners = itertools.product(range(0, SIZE, 8), repeat=2)
    return np.array([np.bincount(small[r : r + 8, c : c + 8].ravel()).argmax() for r, c in corners])


def upsampled(values):
    """(h w, K) scores as the class of every pixel."""
    maps = torch.from_numpy(values.T.copy()).float().unflatten(1, (8, 8))[None]
    return torch.nn.functional.interpolate(maps, (HEIGHT, WIDTH), mode="bilinear")[0].argmax(0)


def scored(predicted, masks):
    """mIoU and accuracy in percent by scikit-learn."""
    p, t = (np.concatenate([one.ravel() for one in each]) for each in (predicted, masks))
    p, t = p[t != 255], t[t != 255]
    return 100 * jaccard_score(t, p, average="macro"), 100 * accuracy_score(t, p)


def test_both_heads_agree_with_scikit_learn(root, extractor):
    values = dict(Segmentation(str(root), k=9, **QUICK)(extractor))
    pairs = (find_pairs(root, split) for split in ("train", "val"))
    train, val = (features_and_masks(extractor, each) for each in pairs)
    x = np.concatenate([features for features, _ in train])
    y = np.concatenate([majority(mask) for _, mask in train])
    x, y = x[y != 255], y[y != 255]
    mean, std = x.mean(0), x.std(0, ddof=1)
    strength = values["segmentation_linear_l2"]
    assert strength in QUICK["strengths"]

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def standard(rows):
        return (rows - mean) / std

    neighbours = KNeighborsClassifier(
        9, algorithm="brute", weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07)
    ).fit(unit(x), y)
    linear = LogisticRegression(C=1 / (len(x) * strength), max_iter=2000).fit(standard(x), y)
    for name, classes, scores, tolerance in (
        ("knn", neighbours.classes_, lambda rows: neighbours.predict_proba(unit(rows)), 0.05),
        ("linear", linear.classes_, lambda rows: linear.decision_function(standard(rows)), 0.5),
    ):
        predicted = [classes[upsampled(scores(features))] for features, _ in val]
        found = [values[f"segmentation_{name}_{metric}"] for metric in ("miou", "accuracy")]
        expected = scored(predicted, [mask for _, mask in val])
        assert found == pytest.approx(expected, abs=tolerance)
        assert found[0] > 40  # chance: 14


def test_it_is_repeatable_and_leaves_torch_and_backbone_alone(root, extractor):
    task = Segmentation(str(root), **QUICK | {"iterations": 3})
    extractor.backbone.train()
    state = torch.get_rng_state()
    one, two = dict(task(extractor)), dict(task(extractor))
    assert torch.equal(state, torch.get_rng_state())
    assert extractor.backbone.training
    assert not torch.is_inference_mode_enabled()
    assert one == two
    low, high = one["segmentation_linear_miou"].interval
    assert low < one["segmentation_linear_miou"] < high
    assert len(one["segmentation_knn_miou"].items) == 7


def test_validation_has_no_say_in_the_choice(root, extractor, tmp_path):
    (tmp_path / "images").symlink_to(root / "images")
    save(tmp_path / "new", "images", "masks", "val", 7, np.random.default_rng(5))
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "train").symlink_to(root / "masks" / "train")
    (tmp_path / "masks" / "val").symlink_to(tmp_path / "new" / "masks" / "val")
    tasks = (Segmentation(str(folder), **QUICK) for folder in (root, tmp_path))
    honest, blind = (dict(task(extractor)) for task in tasks)
    assert honest["segmentation_linear_l2"] == blind["segmentation_linear_l2"]
    assert blind["segmentation_linear_miou"] < 30 < honest["segmentation_linear_miou"]


def test_few_patches_are_taken_evenly(root, extractor):
    patches = Segmentation(str(root), max_train_patches=50, **QUICK).training_patches(extractor)
    assert torch.bincount(patches.owner).tolist() == 16 * [3]
    assert set(patches.indices.tolist()) <= set(CLASSES)
    fewer = Segmentation(str(root), max_train_patches=7, **QUICK).training_patches(extractor)
    assert len(fewer.features) == 7
    assert len(torch.unique(fewer.owner)) == 7


def clusters(seed):
    """600 patches of 20 images and 4 classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(4, 12))
    classes = rng.integers(4, size=600)
    x = (5 + centres[classes] + 0.9 * rng.normal(size=(600, 12))).astype(np.float32)
    owner, indices = torch.arange(600) // 30, np.arange(4, dtype=np.uint8)
    return Patches(torch.from_numpy(x), torch.from_numpy(classes), owner, indices)


@pytest.mark.parametrize("block", [2**25, 300])
def test_the_linear_head_is_a_logistic_regression(block, monkeypatch):
    monkeypatch.setattr("ssl_xcit.eval.tasks.segmentation.NUMBERS", block)
    x, classes = clusters(0).features - 5.0, clusters(0).classes
    strengths = [0.1, 0.01, 0.001]
    path = logistic_path(x, classes, 4, strengths, 200)
    for strength, (weight, bias) in zip(strengths, path, strict=True):
        theirs = LogisticRegression(C=1 / (len(x) * strength), max_iter=2000, tol=1e-8)
        theirs.fit(x.double(), classes)
        assert np.allclose(weight, theirs.coef_, atol=5e-3)
        assert np.allclose(bias - bias.mean(), theirs.intercept_, atol=5e-3)


def test_the_strength_is_chosen_on_held_out_images():
    """Noise alone is best left unlearnt, a clear signal learnt well."""
    train, strengths = clusters(0), [10.0, 0.1, 0.001]
    shuffled = torch.randperm(len(train.classes), generator=torch.Generator().manual_seed(0))
    noise = Patches(train.features, train.classes[shuffled], train.owner, train.indices)
    assert fit_linear(noise, strengths, 50, 0.2, 0)[1] == 10.0
    head, strength = fit_linear(train, strengths, 50, 0.2, 0)
    assert strength < 10.0
    test = clusters(1)
    assert (head(test.features).argmax(1) == test.classes).float().mean() > 0.8


def test_a_small_bank_votes_with_what_it_has():
    train = clusters(0)
    head = bank_head(train, k=50, temperature=0.07, max_bank=10, seed=0)
    votes = head(train.features[:20])
    assert torch.allclose(votes.sum(1), torch.ones(20))
    one = bank_head(train, k=1, temperature=0.07, max_bank=1000, seed=0)
    assert torch.equal(one(train.features).argmax(1), train.classes)  # each is its own neighbour


@pytest.mark.parametrize("size", [(80, 96), (5, 64), (8, 8)])
@pytest.mark.parametrize("block", [2**25, 64])
def test_upsampling_in_strips_is_torchs(size, block, monkeypatch):
    monkeypatch.setattr("ssl_xcit.eval.tasks.segmentation.NUMBERS", block)
    values = torch.randn(6, 8, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(values[None], size, mode="bilinear")[0].argmax(0)
    assert torch.equal(upsampled_argmax(values, size), expected)


def test_labels_of_patches_are_the_most_frequent(root):
    for pair in find_pairs(root, "train")[:4]:
        mask = np.array(Image.open(pair.mask))
        assert patch_labels(mask, (8, 8), 8).tolist() == majority(mask).tolist()


def test_miou_weighs_images_and_leaves_out_classes_that_nobody_has():
    counts = np.array([[[4, 0, 0], [6, 0, 0], [4, 2, 0]], [[1, 1, 0], [1, 4, 0], [4, 1, 0]]])
    assert miou(counts, np.array([1.0, 0.0])) == pytest.approx(100 * (4 / 6 + 0 / 2) / 2)
    both = (5 / (7 + 8 - 5) + 1 / (4 + 3 - 1)) / 2
    assert miou(counts, np.ones(2)) == pytest.approx(100 * both)


def test_zero_is_ignored_when_asked(root, extractor, tmp_path):
    (tmp_path / "images").symlink_to(root / "images")
    shutil.copytree(root / "masks", tmp_path / "masks")
    for path in (tmp_path / "masks").rglob("*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 0, mask).astype(np.uint8)).save(path)
    options = QUICK | {"iterations": 3}
    kept, ignored = (
        dict(Segmentation(str(folder), ignore_zero=zero, **options)(extractor))
        for folder, zero in ((root, False), (tmp_path, True))
    )
    assert kept == ignored
    assert dict(Segmentation(str(tmp_path), **options)(extractor)) != kept


def test_known_layouts(tmp_path):
    rng = np.random.default_rng(0)
    ade, voc = tmp_path / "ade", tmp_path / "voc"
    save(ade, "images", "annotations", "training", 2, rng)
    save(ade, "images", "annotations", "validation", 1, rng)
    assert [len(find_pairs(ade, split)) for split in ("train", "val")] == [2, 1]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        (voc / "JPEGImages" / f"{name}.jpg").touch()
        (voc / "SegmentationClass" / f"{name}.png").touch()
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("c\na\n")
    names = [(p.image.name, p.mask.name) for p in find_pairs(voc, "val")]
    assert names == [("a.jpg", "a.png"), ("c.jpg", "c.png")]
    with pytest.raises(MissingPath, match=r"train\.txt: no such file"):
        find_pairs(voc, "train")
    (voc / "SegmentationClass" / "a.png").unlink()
    with pytest.raises(MissingPath, match=r"a\.png: no such file"):
        find_pairs(voc, "val")


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "1", "P;4", "L;4"])
def test_masks_are_read_as_indices(tmp_path, mode):
    indices = np.arange(20, dtype=np.uint8).reshape(4, 5) % (2 if mode == "1" else 15)
    path = tmp_path / "mask.png"
    if mode == "L;4":
        path.write_bytes(FOUR_BITS)
    elif mode.startswith("P"):
        image = Image.fromarray(indices, "P")
        image.putpalette(bytes(range(255, -1, -1)) * 3)
        image.save(path, bits=4 if mode == "P;4" else 8)
    else:
        kinds = {"L": np.uint8, "I;16": np.uint16, "1": bool}
        Image.fromarray(indices.astype(kinds[mode])).save(path)
    assert np.array_equal(read_mask(path, RGB), indices)


def test_bad_masks_are_named(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    with pytest.raises(UserError, match=r"mask\.png: a mask holds indices.*RGB"):
        read_mask(path, RGB)
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(path)
    with pytest.raises(UserError, match="index 300"):
        read_mask(path, RGB)
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"mask\.png: not readable as a PNG mask"):
        read_mask(path, RGB)


def test_any_number_of_channels_is_resized():
    image = np.random.default_rng(0).integers(256, size=(20, 30, 3)).astype(np.uint8)
    expected = np.array(Image.fromarray(image).resize((15, 10), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_image(image, 10, 15), expected)
    assert np.array_equal(resize_image(image[..., :2], 10, 15), expected[..., :2])
    assert resize_mask(np.array([[1, 9]], np.uint8), 2, 4).tolist() == 2 * [[1, 1, 9, 9]]


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(MissingPath, match="no such folder"):
        Segmentation(str(tmp_path / "nowhere"))
    with pytest.raises(MissingPath, match="images/train and masks/train"):
        Segmentation(str(tmp_path))
    save(tmp_path, "images", "masks", "train", 2, np.random.default_rng(0))
    with pytest.raises(MissingPath, match="no folder val or validation"):
        Segmentation(str(tmp_path))
    for folder in ("images", "masks"):
        (tmp_path / folder / "val").mkdir()
    with pytest.raises(MissingPath, match="no images in it"):
        Segmentation(str(tmp_path))
    pair = find_pairs(root, "val")[0]
    (tmp_path / "images" / "val" / "lone.png").write_bytes(pair.image.read_bytes())
    (tmp_path / "masks" / "val" / "other.png").write_bytes(pair.mask.read_bytes())
    with pytest.raises(MissingPath, match=r"lone\.png has no partner lone\.\* in .*masks/val"):
        Segmentation(str(tmp_path))
    (tmp_path / "images" / "val" / "other.jpg").touch()
    (tmp_path / "images" / "val" / "lone.png").rename(tmp_path / "images" / "val" / "other.png")
    with pytest.raises(UserError, match="one stem"):
        Segmentation(str(tmp_path))


def test_bad_content_is_named(extractor, tmp_path):
    save(tmp_path, "images", "masks", "train", 2, np.random.default_rng(0))
    save(tmp_path, "images", "masks", "val", 1, np.random.default_rng(0))
    task = Segmentation(str(tmp_path), **QUICK)
    with pytest.raises(UserError, match="size=70 must be a multiple of the patch size 8; try 72"):
        dict(Segmentation(str(tmp_path), size=70)(extractor))
    [pair] = find_pairs(tmp_path, "val")
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, np.uint8)).save(pair.mask)
    with pytest.raises(UserError, match="no pixel of the validation masks"):
        dict(task(extractor))
    Image.fromarray(np.zeros((HEIGHT, WIDTH - 1), np.uint8)).save(pair.mask)
    with pytest.raises(UserError, match="has 95 x 80 pixels and its image 96 x 80"):
        dict(task(extractor))
    for one in find_pairs(tmp_path, "train"):
        Image.fromarray(np.full((HEIGHT, WIDTH), 6, np.uint8)).save(one.mask)
    with pytest.raises(UserError, match=r"1 classes \(indices \[6\]\)"):
        dict(task(extractor))
    Pair(*find_pairs(tmp_path, "train")[0]).image.write_bytes(b"")
    with pytest.raises(UserError, match=r"00\.png: empty file"):
        dict(task(extractor))


def test_features_that_are_not_finite_are_an_error(root, extractor):
    broken = XCiT(32, 1, 2, patch_size=8)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(RunFailed, match=r"png: features that are not finite"):
        dict(Segmentation(str(root), **QUICK)(FeatureExtractor(broken, RGB, torch.device("cpu"))))
