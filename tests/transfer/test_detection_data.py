import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from test_conf import load

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.picture import BadImage, upright
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.transfer.checks import check_transfer
from ssl_xcit.transfer.detection.data import detection_data
from ssl_xcit.transfer.detection.masks import (
    RunMasks,
    box_of,
    polygon_mask,
    runs_from_text,
    runs_mask,
    runs_of,
)
from tests.transfer import layouts
from tests.transfer.layouts import HEIGHT, WIDTH, coco_json, picture, square, voc_xml


def targets(source, height=HEIGHT, width=WIDTH):
    return [source.read_target(i, height, width) for i in range(len(source.images))]


def logged(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


def ellipse_mask(generator, height, width):
    y, x = np.mgrid[:height, :width]
    cy, cx, b, a = generator.uniform((0, 0, 3, 3), (height, width, height, width))
    return ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1


def test_polygons_are_filled_as_pycocotools_fills_them():
    generator = np.random.default_rng(0)
    for _ in range(60):
        count = int(generator.integers(3, 40))
        angles = np.sort(generator.uniform(0, 2 * np.pi, count))
        radius = generator.uniform(20, 60) * generator.uniform(0.6, 1, count)
        points = np.stack((70 + radius * np.cos(angles), 60 + radius * np.sin(angles)), axis=1)
        encoded = coco_masks.frPyObjects([points.reshape(-1).tolist()], 110, 120)
        wanted = coco_masks.decode(encoded)[..., 0].astype(bool)
        made = polygon_mask(points, 110, 120)
        differ = made ^ wanted
        if wanted.sum() > 300:  # slivers are all border
            assert (made & wanted).sum() / (made | wanted).sum() > 0.97
        inner = wanted.copy()
        for axis in (0, 1):  # only pixels at the border differ
            for step in (-1, 1):
                inner &= np.roll(wanted, step, axis)
        assert (differ & inner).sum() <= 1  # a notch thinner than a pixel


def test_a_square_is_filled_to_its_corners():
    points = np.array([[2, 3], [7, 3], [7, 9], [2, 9]], np.float64)
    wanted = np.zeros((12, 10), bool)
    wanted[3:9, 2:7] = True
    assert (polygon_mask(points, 12, 10) == wanted).all()
    assert (polygon_mask(points + 0.3, 12, 10) == wanted).all()
    assert box_of(wanted) == (2, 3, 7, 9)
    assert box_of(np.zeros((3, 3), bool)) is None
    outside = polygon_mask(points * 3 - 12, 12, 10)
    assert outside[:9, 0:9].all()
    assert not polygon_mask(points + 50, 12, 10).any()


def test_runs_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for i in range(40):
        height, width = generator.integers(1, 60, 2).tolist()
        mask = ellipse_mask(generator, height, width)
        mask = generator.random((height, width)) < 0.3 if i % 4 == 0 else mask
        mask = np.full((height, width), bool(i % 8 == 1)) if i % 4 == 1 else mask
        encoded = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        runs = runs_from_text(encoded["counts"].decode())
        assert (runs_mask(runs, height, width) == mask).all()
        assert runs == runs_of(mask)
        plain = {"size": [height, width], "counts": runs_of(mask)}
        assert coco_masks.frPyObjects(plain, height, width) == encoded


def test_masks_kept_as_runs():
    generator = np.random.default_rng(0)
    masks = np.stack([ellipse_mask(generator, 30, 41) for _ in range(6)])
    masks[2], masks[3] = False, True
    kept = RunMasks.of(iter(masks), (30, 41))
    assert len(kept) == 6
    assert np.array_equal(list(kept), masks)
    assert np.array_equal(kept[-1], masks[-1])
    assert [kept.num_pixels(i) for i in range(6)] == masks.sum(axis=(1, 2)).tolist()
    assert np.array_equal(list(kept[1:4]), masks[1:4])
    assert np.array_equal(list(kept[np.array([5, 0])]), masks[[5, 0]])
    assert not len(kept[np.array([], int)])
    with pytest.raises(IndexError):
        kept[6]


def test_runs_that_are_damaged():
    with pytest.raises(ValueError, match="runs of 5 pixels in a mask of 3 x 2"):
        runs_mask([2, 3], 2, 3)
    with pytest.raises(ValueError, match="cut short"):
        runs_from_text("52o")
    with pytest.raises(ValueError, match="character"):
        runs_from_text("5 2")


def test_coco(tmp_path):
    data = detection_data(str(layouts.coco(tmp_path)))
    assert data.train.class_names == ("cat", "dog")
    assert [len(data.train.images), len(data.test.images)] == [3, 2]
    assert data.train.images.name(2).endswith("train2017/000000000002.jpg")
    found = targets(data.train)[1]
    assert found.boxes.tolist() == [[4, 5, 14, 13], [4, 5, 14, 13]]
    assert found.labels.tolist() == [0, 1]
    assert not found.crowd.any()
    wanted = np.zeros((HEIGHT, WIDTH), bool)
    wanted[5:13, 4:14] = True
    assert (found.masks == wanted).all()
    check_transfer(data, Preprocess())


def test_masks_of_coco_in_all_three_ways(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    mask = ellipse_mask(np.random.default_rng(3), HEIGHT, WIDTH)
    size = [HEIGHT, WIDTH]
    text = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    box = (0, 0, WIDTH, HEIGHT)
    parts = [[1, 1, 5, 1, 5, 6, 1, 6], [10, 10, 15, 10, 15, 12, 10, 12]]
    objects = [
        square(1, 1, 1, box, segmentation={"size": size, "counts": runs_of(mask)}, iscrowd=1),
        square(2, 1, 1, box, segmentation={"size": size, "counts": text}),
        square(3, 1, 2, box, segmentation=parts),
        square(4, 1, 2, (2, 2, 0.2, 0.2), segmentation=[[2, 2, 2.2, 2, 2.2, 2.2]]),
    ]
    data = detection_data(
        str(coco_json(tmp_path / "annotations" / "all.json", [(1, "a.jpg")], objects)),
        test_fraction=0,
    )
    found = data.train.read_target(0, HEIGHT, WIDTH)
    assert found.crowd.tolist() == [True, False, False, False]
    assert (found.masks[:2] == mask).all()
    assert found.masks[2].sum() == 20 + 10
    assert found.masks[3].sum() == 1  # thinner than a pixel: its box
    assert found.masks[3][2, 2]


def test_areas_are_as_annotated(tmp_path):
    for name in "ab":
        picture(tmp_path / "images" / f"{name}.jpg")
    given = [7, 12.5, None, 0, -3, float("nan"), float("inf"), 10**400, "9"]
    objects = [square(i, 1, 1, (i, 1, 3, 3), area=area) for i, area in enumerate(given, 1)]
    del objects[2]["area"]
    objects.append(square(20, 2, 1, area=99, iscrowd=1))
    file = coco_json(tmp_path / "a.json", [(1, "a.jpg"), (2, "b.jpg")], objects)
    data = detection_data(str(file), test_fraction=0)
    first, second = targets(data.train)
    assert first.areas.tolist() == [7, 12.5] + [0] * 7
    assert second.areas.tolist() == [99]
    file.write_text(file.read_text().replace('"area": 12.5', '"area": 12.6'))
    assert detection_data(str(file), test_fraction=0).train.digest != data.train.digest
    for row in objects:
        row.pop("area", None)
    coco_json(file, [(1, "a.jpg"), (2, "b.jpg")], objects)
    assert targets(detection_data(str(file), test_fraction=0).train)[0].areas is None


@pytest.mark.parametrize("empty", ["keep", "drop"])
def test_training_images_without_objects(tmp_path, caplog, empty):
    """Those of which nothing is usable, and those with crowd regions alone, count as empty."""
    images = [(i, f"{i}.jpg") for i in range(1, 6)]
    for part in ("train", "val"):
        for _, name in images:
            picture(tmp_path / part / name)
        objects = [
            square(1, 1, 1), square(2, 2, 1, iscrowd=1), square(3, 3, 1, (3, 3, 0, 5)),
            square(4, 5, 2), square(5, 5, 1, iscrowd=1),
        ]  # fmt: skip
        coco_json(tmp_path / "annotations" / f"{part}.json", images, objects)
    data = detection_data(str(tmp_path), empty=empty)
    names = [Path(data.train.images.name(i)).name for i in range(len(data.train.images))]
    assert len(data.test.images) == 5
    if empty == "keep":
        assert names == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]
        return
    assert names == ["1.jpg", "5.jpg"]
    assert [found.labels.tolist() for found in targets(data.train)] == [[0], [1, 0]]
    assert "3 images without objects" in data.train.left_out
    assert "3 images without objects" not in data.test.left_out
    lines = [line for line in logged(caplog).splitlines() if "images without objects" in line]
    assert len(lines) == 1
    assert lines[0].endswith("train: left out 3 images without objects")


def test_the_recipe_of_coco_leaves_images_without_objects_out():
    for words, empty in (
        (["experiment=coco_mask_rcnn", "data.root=.", "ckpt=x"], "drop"),
        (["transfer=detection"], "keep"),
    ):
        assert load("finetune", *words).data.source.empty == empty


def test_training_images_of_crowd_regions_alone(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    file = coco_json(tmp_path / "a.json", [(1, "a.jpg")], [square(1, 1, 1, iscrowd=1)])
    assert len(detection_data(str(file), test_fraction=0).train.images) == 1
    with pytest.raises(UserError, match="no image of the training part has an object that is no"):
        detection_data(str(file), test_fraction=0, empty="drop")


def test_categories_with_gaps_and_in_any_order(tmp_path):
    layouts.coco(tmp_path, categories=((90, "dog"), (2, "cat"), (1, "ant")))
    data = detection_data(str(tmp_path))
    assert data.train.class_names == ("ant", "cat", "dog")
    assert targets(data.test)[0].labels.tolist() == [0, 1]


def test_categories_are_matched_by_name(tmp_path, caplog):
    for part, names in (("train", ((1, "cat"), (2, "dog"))), ("val", ((1, "dog"), (2, "cow")))):
        picture(tmp_path / part / "a.jpg")
        objects = [square(1, 1, 1), square(2, 1, 2)]
        coco_json(tmp_path / "annotations" / f"{part}.json", [(1, "a.jpg")], objects, names)
    data = detection_data(str(tmp_path))
    assert data.train.class_names == data.test.class_names == ("cat", "dog", "cow")
    assert targets(data.test)[0].labels.tolist() == [1, 2]
    assert "test images have a class that no training image has (cow)" in logged(caplog)


def test_what_coco_cannot_mean_is_left_out_and_listed(tmp_path, caplog):
    images = [(1, "a.jpg"), (2, "b.jpg"), (3, "gone.jpg"), (4, "a.jpg")]
    for name in ("a", "b"):
        picture(tmp_path / "images" / f"{name}.jpg")
    objects = [
        square(1, 1, 1), square(2, 1, 1, (3, 3, 0, 5)), square(3, 1, 1, (3, 3, -2, 5)),
        square(4, 1, 1, (100, 3, 5, 5)), square(5, 1, 7), square(6, 9, 1), square(7, 3, 1),
        square(8, 1, 1, (float("nan"), 1, 2, 2)), square(9, 1, 1, (1, 1, 2, 2), bbox=[1, 2]),
        square(1, 1, 1), square(10, 4, 2, (1, 1, 3, 3)), square(11, 1, 1, (-4, -4, 8, 9)), "no",
    ]  # fmt: skip
    data = detection_data(str(coco_json(tmp_path / "all.json", images, objects)), test_fraction=0)
    assert sorted(line.removeprefix("all.json: ") for line in data.train.left_out) == sorted([
        "annotation 2: box of no area", "annotation 3: box of no area",
        "annotation 4: box outside the image", "annotation 5: category 7 is not in the file",
        "annotation 6: image 9 is not in the file",
        "annotation 8: box with numbers that are not finite",
        "annotation 9: no box of 4 numbers", "annotation 1: the same as one before",
        "annotation number 13: image None is not in the file",
        f"gone.jpg: no such image in {tmp_path / 'images'}",
        "image id 4: a.jpg has another id as well",
    ])  # fmt: skip
    assert "left out 11: all.json: " in logged(caplog)
    first, empty = targets(data.train)
    assert first.boxes.tolist() == [[4, 5, 14, 13], [1, 1, 4, 4], [0, 0, 4, 5]]
    assert first.labels.tolist() == [0, 1, 0]
    assert empty.boxes.shape == (0, 4)  # an image without objects is one
    assert empty.masks.shape == (0, HEIGHT, WIDTH)
    check_transfer(data, Preprocess())


def test_annotations_of_another_size(tmp_path):
    layouts.coco(tmp_path)
    picture(tmp_path / "train2017" / "000000000001.jpg", height=WIDTH, width=HEIGHT)
    data = detection_data(str(tmp_path))
    with pytest.raises(BadImage, match="for 32 x 24 pixels, and the image has 24 x 32"):
        data.train.read_target(1, WIDTH, HEIGHT)
    with pytest.raises(UserError, match=r"1\.jpg: its annotations are for 32 x 24 pixels"):
        check_transfer(data, Preprocess())


@pytest.mark.parametrize("turn", range(1, 9))
def test_annotations_may_be_of_the_image_as_stored(tmp_path, turn):
    """Masks and boxes turn as the pixels do; where both sizes are equal they are upright."""
    file = picture(tmp_path / "images" / "a.jpg", turn=turn)
    sides = read_image(file).shape[:2]
    data = detection_data(
        str(coco_json(tmp_path / "a.json", [(1, "a.jpg")], [square(1, 1, 1)])), test_fraction=0
    )
    found = data.train.read_target(0, *sides)
    wanted = np.zeros((HEIGHT, WIDTH), np.uint8)
    wanted[5:13, 4:14] = 1
    wanted = upright(wanted[..., None], turn)[..., 0] if turn > 4 else wanted
    assert (found.masks[0] == (wanted > 0)).all()
    assert tuple(found.boxes[0]) == box_of(wanted > 0)


def test_runs_of_another_size(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    for wrong, words in (
        ({"counts": [3, 13]}, "a mask of runs of 16 pixels in a mask of 32 x 24"),
        ({"counts": ["a"]}, "a mask of invalid literal"),
        ({"counts": "0"}, "a mask of runs of 0 pixels"),
        ({"counts": "\u00e9"}, "a mask of character"),
        ({"counts": [3, 13], "size": [4, 4]}, "a mask of 4 x 4 pixels, not 32 x 24"),
    ):
        objects = [square(1, 1, 1, segmentation=wrong)]
        file = coco_json(tmp_path / "a.json", [(1, "a.jpg")], objects)
        data = detection_data(str(file), test_fraction=0)
        with pytest.raises(UserError, match=words):
            check_transfer(data, Preprocess())


def test_names_of_images_that_are_no_text(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    images = [(1, "a.jpg"), (2, "b\ud800.jpg"), (3, "c\0.jpg"), (4, "")]
    file = coco_json(tmp_path / "a.json", images, [square(1, 1, 1)])
    data = detection_data(str(file), test_fraction=0)
    assert len(data.train.images) == 1
    assert len(data.train.left_out) == 3


def test_boxes_without_masks(tmp_path, caplog):
    picture(tmp_path / "images" / "a.jpg")
    objects = [square(1, 1, 1), square(2, 1, 1, (1, 1, 3, 3), segmentation=[])]
    file = coco_json(tmp_path / "a.json", [(1, "a.jpg")], objects)
    data = detection_data(str(file), test_fraction=0)
    assert data.train.read_target(0, HEIGHT, WIDTH).masks is None
    assert "without masks, which 1 of 2 training objects and 1 of 2 testing objects lack" in logged(
        caplog
    )


def test_files_that_are_not_annotations(tmp_path):
    file = layouts.coco(tmp_path) / "annotations" / "instances_train2017.json"
    whole = file.read_text()
    for content, wrong in (
        (whole[: len(whole) // 2], "not whole as json .*was it cut short"),
        ("[]", "no list `images`"),
        ('{"images": [], "annotations": []}', "no list `categories`"),
        (whole.replace('"id": 2, "name": "dog"', '"id": 1, "name": "dog"'),
         "category id 1 stands for cat and dog"),
        (whole.replace('"id": 2, "file_name"', '"id": 1, "file_name"'),
         "image id 1 stands for 000000000000.jpg and 000000000001.jpg"),
        (whole.replace(".jpg", ".png"), "none of its 3 images is in .*train2017"),
        (json.dumps(json.loads(whole) | {"annotations": []}), "no image of the training part has"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(UserError, match=wrong):
            detection_data(str(tmp_path))
    with pytest.raises(MissingPath, match="No such file"):
        detection_data(str(tmp_path / "none.json"))


def test_json_files_by_name(tmp_path):
    root = layouts.coco(tmp_path / "a")
    parts = [str(root / "annotations" / f"instances_{part}2017.json") for part in ("val", "train")]
    data = detection_data(parts[0], test_root=parts[1])
    assert [len(data.train.images), len(data.test.images)] == [2, 3]
    moved = tmp_path / "elsewhere"
    (root / "val2017").rename(moved)
    with pytest.raises(UserError, match=r"data\.images=DIR"):
        detection_data(parts[0])
    data = detection_data(parts[0], images=str(moved))
    assert [len(data.train.images), len(data.test.images)] == [1, 1]
    assert data.train.images.name(0).startswith(str(moved))
    for part in ("train", "train2014"):
        (root / "annotations" / f"instances_{part}.json").write_text("{}")
    with pytest.raises(UserError, match=r"which file is for training.*data\.root=FILE\.json"):
        detection_data(str(root))


def test_coco_files_beside_the_images(tmp_path):
    for part, name in (("train", "a.jpg"), ("valid", "b.jpg")):
        picture(tmp_path / part / name)
        coco_json(tmp_path / part / "_annotations.coco.json", [(1, name)], [square(1, 1, 2)])
    data = detection_data(str(tmp_path))
    assert data.test.images.name(0) == str(tmp_path / "valid" / "b.jpg")


@pytest.mark.parametrize("lists", [("train", "val"), ("trainval", "test"), ()])
def test_pascal_voc(tmp_path, lists):
    data = detection_data(str(layouts.voc_boxes(tmp_path, lists=lists)))
    assert data.train.class_names == ("dog", "person")
    sizes = [len(data.train.images), len(data.test.images)]
    assert sizes == ([3, 2] if lists else [4, 1])
    found = targets(data.train)[0]
    assert found.boxes.tolist() == [[0, 0, 10, 12], [4, 5, WIDTH, HEIGHT]]
    assert found.labels.tolist() == [1, 0]
    assert found.crowd.tolist() == [False, True]  # difficult: neither counted nor held against
    assert found.masks is None


def test_pascal_voc_with_files_that_are_wrong(tmp_path):
    layouts.voc_boxes(tmp_path, train=5, test=1)
    key = "2007_00000{}"
    (tmp_path / "Annotations" / f"{key.format(0)}.xml").write_text("<annotation><obj")
    (tmp_path / "Annotations" / f"{key.format(1)}.xml").unlink()
    (tmp_path / "JPEGImages" / f"{key.format(2)}.jpg").unlink()
    objects = [("cat", (5, 5, 4, 9), 0), ("", (1, 1, 2, 2), 0), ("cat", ("x", 1, 2, 2), 0)]
    voc_xml(tmp_path / "Annotations" / f"{key.format(3)}.xml", objects)
    data = detection_data(str(tmp_path))
    assert len(data.train.images) == 2
    lines = "\n".join(data.train.left_out)
    assert "2007_000000.xml: not whole as xml" in lines
    assert "2007_000001: no xml" in lines
    assert "2007_000002: no image" in lines
    for number, reason in enumerate(("box of no area", "no name", "no box of 4 numbers"), 1):
        assert f"2007_000003.xml: object {number}: {reason}" in lines
    assert not len(targets(data.train)[0].boxes)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("polygons", [False, True])
def test_yolo(tmp_path, inside, polygons):
    data = detection_data(str(layouts.yolo(tmp_path, polygons=polygons, inside=inside)))
    assert data.train.class_names == ("cat", "dog")
    assert [len(data.train.images), len(data.test.images)] == [3, 2]
    found = targets(data.train)[0]
    assert found.boxes.tolist() == [[8, 6, 24, 18], [0, 0, 16, 12]]
    assert found.labels.tolist() == [0, 1]
    if polygons:
        wanted = np.zeros((HEIGHT, WIDTH), bool)
        wanted[6:18, 8:24] = True
        assert (found.masks[0] == wanted).all()
        assert found.masks[1].sum() == pytest.approx(16 * 12 / 2, rel=0.1)
    else:
        assert found.masks is None
    check_transfer(data, Preprocess())


def test_a_part_without_labels_is_not_the_test_part(tmp_path):
    layouts.yolo(tmp_path)
    picture(tmp_path / "images" / "test" / "x.jpg")
    assert "/val/" in detection_data(str(tmp_path)).test.images.name(0)


def test_yolo_with_lines_that_are_wrong(tmp_path):
    layouts.yolo(tmp_path)
    labels = tmp_path / "labels" / "train"
    lines = ("0 0.5 0.5 0.2 0.2", "2 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "0 0.5 0.5 0 0.1",
             "0 100 120 30 40", "0 a b c d", "x 0.5 0.5 0.1 0.1")  # fmt: skip
    (labels / "0.txt").write_text("\n".join(lines))
    (labels / "1.txt").unlink()
    (labels / "7.txt").write_text("")
    data = detection_data(str(tmp_path))
    left_out = "\n".join(data.train.left_out)
    for line in (
        "0.txt: line 2: class 2 is not one of 0 to 1", "line 3: 3 numbers after the class",
        "line 4: box of no area", "line 5: pixels, where shares", "line 6: could not convert",
        "line 7: class x", "7.txt: no image",
    ):  # fmt: skip
        assert line in left_out
    assert [len(found.boxes) for found in targets(data.train)] == [1, 0, 2]


def test_names_of_yolo(tmp_path):
    layouts.yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [ant, bee]\n")
    assert detection_data(str(tmp_path)).train.class_names == ("ant", "bee")
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("cow\nowl\n")
    assert detection_data(str(tmp_path)).train.class_names == ("cow", "owl")
    (tmp_path / "classes.txt").unlink()
    assert detection_data(str(tmp_path)).train.class_names == ("0", "1")
    data = detection_data(str(tmp_path), class_names=["elk", "fox"])
    assert data.train.class_names == ("elk", "fox")
    assert targets(data.train)[0].labels.tolist() == [0, 1]
    (tmp_path / "data.yaml").write_text("names: [a: b: c]\n")
    with pytest.raises(UserError, match=r"data\.yaml: not a yaml file"):
        detection_data(str(tmp_path))


def test_some_of_the_classes_in_another_order(tmp_path):
    layouts.coco(tmp_path, categories=((1, "cat"), (2, "dog"), (3, "cow")))
    data = detection_data(str(tmp_path), class_names=["dog"])
    assert data.train.class_names == ("dog",)
    assert [found.labels.tolist() for found in targets(data.train)] == [[0]] * 3
    assert data.train.left_out == ("3 objects of classes not in data.class_names",)


def test_folders_that_are_no_data(tmp_path):
    with pytest.raises(MissingPath, match="no such folder"):
        detection_data(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"looked for annotations.*COCO.*VOC.*YOLO"):
        detection_data(str(tmp_path))
    for kind in ("images", "labels", "JPEGImages", "Annotations", "annotations"):
        (tmp_path / kind).mkdir()
    with pytest.raises(UserError, match="no images with objects in it"):
        detection_data(str(tmp_path))
    with pytest.raises(UserError, match="looked for annotations/"):
        detection_data(str(tmp_path), layout="coco")
    with pytest.raises(UserError, match=r"is for a json file"):
        detection_data(str(tmp_path), images=str(tmp_path))
    with pytest.raises(UserError, match=r"data\.test_root is given without"):
        detection_data(test_root=str(tmp_path))


def test_the_digest_tells_annotations_apart(tmp_path):
    first = detection_data(str(layouts.coco(tmp_path)))
    assert first.train.digest != first.test.digest
    assert detection_data(str(tmp_path)).train.digest == first.train.digest
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"bbox": [4,', '"bbox": [3,', 1))
    assert detection_data(str(tmp_path)).train.digest != first.train.digest


def test_a_few_objects_without_a_mask_are_left_out(tmp_path, caplog):
    picture(tmp_path / "images" / "a.jpg")
    objects = [square(i, 1, 1, (i, 1, 3, 3)) for i in range(1, 4)]
    objects.append(square(9, 1, 2, (1, 1, 5, 5), segmentation=[]))
    file = coco_json(tmp_path / "a.json", [(1, "a.jpg")], objects)
    data = detection_data(str(file), test_fraction=0)
    target = data.train.read_target(0, HEIGHT, WIDTH)
    assert target.masks.shape == (3, HEIGHT, WIDTH)
    assert "left out 1 objects without a mask" in caplog.text
    assert "1 objects without a mask" in data.train.left_out
