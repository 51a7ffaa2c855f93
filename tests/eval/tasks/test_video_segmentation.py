"""Label propagation against its definition, patch by patch, and J and F by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.metrics import jaccard_score

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.photos import photographs
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import normalise
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.eval.tasks.video_segmentation import (
    VideoSegmentation,
    boundary,
    boundary_f,
    frame_features,
    jaccard,
    painted,
    propagate,
)

HEIGHT, WIDTH, NUM_FRAMES = 75, 110, 6


def save_video(root, name, seed, num_objects):
    """Crops of photographs that move over another one; 255 is a border that belongs to nobody."""
    rng = np.random.default_rng(seed)
    photos = {n: read_image(f) for n, f in photographs()}
    background, *things = (photos[n] for n in ("grass", "coffee", "rocket")[: num_objects + 1])
    frames, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    at = rng.integers(5, 30, size=(num_objects, 2))
    for t in range(NUM_FRAMES):
        image = background[:HEIGHT, :WIDTH].copy()
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for o, thing in enumerate(things):
            row, column = at[o] + t * np.array([2, 4 + 3 * o]) + [0, 35 * o]
            place = slice(row, row + 26), slice(column, column + 34)
            image[place] = thing[100:126, 150:184][: HEIGHT - row, : WIDTH - column]
            mask[place] = o + 1
        mask[-3:] = 255
        Image.fromarray(image).save(frames / f"{t:05d}.jpg", quality=95)
        palette = Image.fromarray(mask, "P")
        palette.putpalette(rng.integers(256, size=768).astype(np.uint8).tobytes())
        palette.save(masks / f"{t:05d}.png")
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True, exist_ok=True)
    with (lists / "val.txt").open("a") as file:
        file.write(name + "\n")


@pytest.fixture
def root(tmp_path):
    save_video(tmp_path, "one", 0, 1)
    save_video(tmp_path, "two", 1, 2)
    return tmp_path


def propagate_patch_by_patch(query, context, labels, radius, topk, temperature):
    """(h, w, C), [(h, w, C)], [(h, w, L)] -> (h, w, L), in float64."""
    h, w, _ = query.shape
    found = np.zeros((h, w, labels[0].shape[-1]))
    for i in range(h):
        for j in range(w):
            near = []
            for features, given in zip(context, labels, strict=True):
                for p in range(max(0, i - radius), min(h, i + radius + 1)):
                    for q in range(max(0, j - radius), min(w, j + radius + 1)):
                        near.append((float(query[i, j] @ features[p, q]), given[p, q]))
            near = sorted(near, key=lambda pair: -pair[0])[:topk]
            weights = np.array([np.exp(cosine / temperature) for cosine, _ in near])
            found[i, j] = (
                sum(weight * given for weight, (_, given) in zip(weights, near, strict=True))
                / weights.sum()
            )
    return found


@pytest.mark.parametrize(("radius", "topk"), [(12, 5), (2, 5), (1, 30), (0, 1), (3, 500)])
def test_propagation_is_its_definition(radius, topk):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 11, 9, 16))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    labels = rng.random(size=(3, 11, 9, 4))
    expected = propagate_patch_by_patch(features[3], features[:3], labels, radius, topk, 0.1)

    def maps(array):
        return torch.from_numpy(np.moveaxis(array, -1, -3).copy())

    found = propagate(maps(features[3]), maps(features[:3]), maps(labels), radius, topk, 0.1)
    assert np.allclose(np.moveaxis(found.numpy(), 0, -1), expected)


def masks_by_hand(extractor, root, name, size, num_context, radius, topk):
    """A sequence's masks, as the protocol says it, and the true ones; without the last frame."""
    truth, found, kept = [], [], []
    for t in range(NUM_FRAMES - 1):
        picture = Image.open(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg")
        mask = np.array(Image.open(root / "Annotations" / "480p" / name / f"{t:05d}.png"))
        grid = size // 8, WIDTH * size // HEIGHT // 8
        small = picture.resize((8 * grid[1], 8 * grid[0]), Image.Resampling.BICUBIC)
        x = normalise(torch.from_numpy(np.array(small)).permute(2, 0, 1)[None], RGB)
        with torch.no_grad():
            patches = extractor.backbone.eval().forward_features(x).patches[0].permute(1, 2, 0)
        features = patches.double().numpy()
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        if t == 0:
            mask[mask == 255] = 0
            ids = np.array(Image.fromarray(mask).resize(grid[::-1], Image.Resampling.NEAREST))
            labels = np.eye(mask.max() + 1)[ids]
            predicted = mask
        else:
            used = [kept[0], *kept[max(1, t - num_context) :]]
            context, given = zip(*used, strict=True)
            labels = propagate_patch_by_patch(features, context, given, radius, topk, 0.1)
            maps = torch.from_numpy(labels).permute(2, 0, 1)[None]
            maps = torch.nn.functional.interpolate(maps, (HEIGHT, WIDTH), mode="bilinear")[0]
            for one in maps:
                if one.max() > 0:
                    one -= one.min().item()
                    one /= one.max().item()
            predicted = maps.argmax(0).numpy()
        kept.append((features, labels))
        truth.append(mask)
        found.append(predicted)
    return found, truth


def slow_boundary_f(predicted, true):
    """Edges found pixel by pixel, matched by their distances."""

    def edges(region):
        found = []
        for r, c in np.ndindex(region.shape):
            around = region[r : r + 2, c : c + 2]
            if around.any() and not around.all():
                found.append((r, c))
        return np.array(found).reshape(-1, 2)

    one, other = edges(predicted), edges(true)
    if not len(one) or not len(other):
        return float(len(one) == len(other))
    near = cdist(one, other) <= np.ceil(0.008 * np.hypot(*true.shape))
    precision, recall = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_scores_are_the_protocols(root, extractor):
    options = {"size": 64, "num_context": 2, "neighbourhood": 3, "topk": 4}
    values = dict(VideoSegmentation(str(root), **options)(extractor))
    assert list(values) == ["davis_j", "davis_f", "davis_jf"]
    j, f = [], []
    for name, num_objects in (("one", 1), ("two", 2)):
        found, truth = masks_by_hand(extractor, root, name, 64, 2, 3, 4)
        for o in range(1, num_objects + 1):
            pairs = [(p == o, t == o) for p, t in zip(found[1:], truth[1:], strict=True)]
            j.append(np.mean([jaccard_score(t.ravel(), p.ravel()) for p, t in pairs]))
            f.append(np.mean([slow_boundary_f(p, t) for p, t in pairs]))
    assert values["davis_j"] == pytest.approx(100 * np.mean(j), abs=0.2)
    assert values["davis_f"] == pytest.approx(100 * np.mean(f), abs=0.5)
    assert values["davis_j"].items[:, 1].sum() == len(j)  # by sequence
    assert values["davis_jf"] == pytest.approx((values["davis_j"] + values["davis_f"]) / 2)
    assert 30 < values["davis_j"] < 100


def test_a_still_video_is_followed_to_the_patch(root, extractor):
    """Nothing moves, so all that is lost is the mask's outline within patches."""
    for kind, end in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for name in ("one", "two"):
            folder = root / kind / "480p" / name
            for t in range(1, NUM_FRAMES):
                (folder / f"{t:05d}.{end}").write_bytes((folder / f"00000.{end}").read_bytes())
    state = torch.get_rng_state()
    values = dict(VideoSegmentation(str(root), size=150, topk=1)(extractor))
    assert values["davis_j"] > 75
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.is_inference_mode_enabled()


def test_jaccard_by_hand():
    one, other = np.zeros((2, 6, 6), bool)
    assert jaccard(one, other) == 1.0
    one[1:4, 1:4] = True
    assert jaccard(one, other) == 0.0
    other[2:4, 2:5] = True
    assert jaccard(one, other) == 4 / 11


def test_a_boundary_lies_half_a_pixel_towards_the_origin():
    region = np.zeros((5, 6), bool)
    region[2:4, 2:6] = True
    expected = ["......", ".#####", ".#...#", ".#####", "......"]
    expected[2] = ".#...."  # the right border is no boundary where the region leaves the image
    assert ["".join(".#"[int(x)] for x in row) for row in boundary(region)] == expected


def test_boundary_f_by_hand():
    empty, one, near, far = np.zeros((4, 100, 120), bool)  # 0.008 of the diagonal: 2 pixels
    one[20:60, 20:70] = True
    near[22:62, 20:70] = True
    far[26:66, 28:78] = True
    assert boundary_f(one, one) == 1.0
    assert boundary_f(near, one) == 1.0
    assert boundary_f(empty, empty) == 1.0
    assert boundary_f(empty, one) == boundary_f(one, empty) == 0.0
    assert 0.0 < boundary_f(far, one) < 0.3
    assert boundary_f(far, one) == pytest.approx(slow_boundary_f(far, one))
    half = one.copy()
    half[:, 45:] = False  # of its outline of 130 the new edge of 36 is far from any true one
    assert boundary_f(half, one) == pytest.approx(slow_boundary_f(half, one))


@pytest.mark.parametrize("seed", range(4))
def test_boundary_f_is_that_of_distances(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.random((2, 12, 15)) > 0.5
    one, other = coarse.repeat(9, axis=1).repeat(9, axis=2)
    other = np.roll(one, rng.integers(-4, 5), axis=0) ^ (other & (rng.random(one.shape) > 0.999))
    assert boundary_f(one, other) == pytest.approx(slow_boundary_f(one, other))


def test_a_label_that_fades_is_stretched():
    maps = torch.tensor([[[0.9, 0.7]], [[0.1, 0.3]], [[0.0, 0.0]]])
    assert painted(maps, (1, 2)).tolist() == [[0, 1]]  # 1, 0 and 0, 1 after stretching


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(MissingPath, match="no such folder"):
        VideoSegmentation(str(tmp_path / "nowhere"))
    masks = root / "Annotations" / "480p" / "two"
    (masks / "00000.png").rename(masks / "kept")
    with pytest.raises(MissingPath, match=r"two/00000\.png: no mask for .*00000\.jpg"):
        VideoSegmentation(str(root))
    (masks / "kept").rename(masks / "00000.png")
    names = root / "ImageSets" / "2017" / "val.txt"
    names.write_text("three\n")
    with pytest.raises(MissingPath, match="three: no frames"):
        VideoSegmentation(str(root))
    names.write_text("\n")
    with pytest.raises(MissingPath, match="no names"):
        VideoSegmentation(str(root))
    names.unlink()
    with pytest.raises(MissingPath, match=r"val\.txt: no such file"):
        VideoSegmentation(str(root))


def test_bad_content_is_named(root, extractor):
    frames, masks = (root / kind / "480p" / "one" for kind in ("JPEGImages", "Annotations"))
    first = (masks / "00000.png").read_bytes()
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(masks / "00000.png")
    with pytest.raises(UserError, match=r"00000\.png: the first frame's mask has no object"):
        dict(VideoSegmentation(str(root), size=64)(extractor))
    Image.fromarray(np.zeros((HEIGHT - 1, WIDTH), np.uint8)).save(masks / "00000.png")
    with pytest.raises(UserError, match="has 110 x 74 pixels and its image 110 x 75"):
        dict(VideoSegmentation(str(root), size=64)(extractor))
    (masks / "00000.png").write_bytes(first)
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(masks / "00002.png")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(frames / "00002.jpg")
    with pytest.raises(UserError, match=r"00002\.jpg: another size"):
        dict(VideoSegmentation(str(root), size=64)(extractor))
    for t in range(2, NUM_FRAMES):
        (frames / f"{t:05d}.jpg").unlink()
    with pytest.raises(UserError, match="2 frames"):
        VideoSegmentation(str(root))


def test_frames_that_would_become_too_large_or_too_small(root, extractor):
    with pytest.raises(UserError, match="size=7 must be at least the patch size 8"):
        dict(VideoSegmentation(str(root), size=7)(extractor))
    thin = np.zeros((1, 60_000, 3), np.uint8)
    with pytest.raises(UserError, match=r"x\.jpg: 480 x 28800000 pixels with its short side"):
        frame_features(extractor, extractor.backbone, thin, 480, Path("x.jpg"))
