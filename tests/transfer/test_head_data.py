"""Test images for a head whose classes are known: folders with a test part alone, without some of
the classes, with other orders of them.
"""

import json

import numpy as np
import pytest
import torch
from layouts import (
    HEIGHT,
    WIDTH,
    ade20k,
    cityscapes,
    coco,
    coco_json,
    ids,
    mask,
    picture,
    square,
    voc_boxes,
    voc_masks,
    yolo,
)

from ssl_xcit.data.picture import RGB
from ssl_xcit.errors import UserError
from ssl_xcit.eval.heads import named_test_data
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.transfer.checks import check_part
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.segmentation.data import CITYSCAPES, VOC, segmentation_data
from ssl_xcit.transfer.segmentation.task import Segmentation


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def classifier(*names, several=False):
    return Classification(XCiT(16, 1, 2, 8), names, 32, multi_label=several)


def segmenter(*names):
    backbone = XCiT(16, 1, 2, 8, pyramid=True)
    return Segmentation(backbone, names, channels=8, neck_channels=8)


def detector(*names):
    backbone = XCiT(16, 1, 2, 8, pyramid=True)
    return Detection(backbone, names, masks=False, channels=8, box_channels=8)


def read(task, root="own", of_run=None, **given):
    """The test images, of which the class names are those of the task."""
    annotated, name = named_test_data(task, {"root": root, **given}, of_run or {})
    assert name == str(given.get("file", root))
    assert tuple(annotated.class_names) == tuple(task.class_names)
    check_part(name, annotated, RGB)
    return annotated


def targets(annotated):
    count = len(annotated.images)
    return [annotated.read_target(i, HEIGHT, WIDTH) for i in range(count)]


def masks_in(folder, values, count=2):
    for i in range(count):
        picture(folder / "images" / f"{i}.jpg", i)
        mask(folder / "masks" / f"{i}.png", ids(i, values=values))


# --- segmentation -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "val"])
def test_masks_without_names_have_the_head_s_classes(tmp_path, part):
    masks_in(tmp_path / "own" / part, (0, 1, 255))  # no cat
    found = targets(read(segmenter("sky", "grass", "cat")))
    assert all((found[i] == ids(i, values=(0, 1, 255))).all() for i in range(2))


def test_masks_of_a_head_of_numbers_have_their_values(tmp_path):
    masks_in(tmp_path / "own", (0, 300))
    found = targets(read(segmenter("0", "7", "300")))
    assert all((found[i] == ids(i, values=(0, 300)) // 150).all() for i in range(2))


def test_masks_with_names_in_another_order(tmp_path):
    masks_in(tmp_path / "own", (0, 1))
    (tmp_path / "own/classes.txt").write_text("cat\nsky\nbird\n")  # there is no bird
    task = segmenter("sky", "grass", "cat")
    wanted = [np.where(ids(i, values=(0, 1)) == 0, 2, 0) for i in range(2)]
    assert np.array_equal(targets(read(task)), wanted)
    (tmp_path / "own/classes.txt").unlink()
    assert np.array_equal(targets(read(task, class_names=["cat", "sky"])), wanted)
    of_run = {"class_names": {0: "cat", 1: "sky"}}
    assert np.array_equal(targets(read(task, of_run=of_run)), wanted)


def test_values_that_the_run_ignores_are_ignored(tmp_path):
    masks_in(tmp_path / "own", (0, 1, 2))
    found = targets(read(segmenter("sky", "grass"), of_run={"ignore": 0, "class_names": None}))
    assert all((found[i] == ids(i, values=(0, 1, 2)) - np.uint8(1)).all() for i in range(2))
    found = targets(read(segmenter("sky", "grass"), ignore=[2]))
    assert all((found[i] == np.where(ids(i) == 2, 255, ids(i))).all() for i in range(2))


def test_known_layouts_with_a_test_part_alone(tmp_path):
    ade20k(tmp_path / "ade")
    for kind in ("images", "annotations"):
        for file in (tmp_path / "ade" / kind / "training").iterdir():
            file.unlink()
        (tmp_path / "ade" / kind / "training").rmdir()
    names = [f"thing {i}, kind {i}" for i in range(1, 151)]
    found = targets(read(segmenter(*names), "ade"))
    assert [sorted(np.unique(t).tolist()) for t in found] == [[0, 149, 255]] * 2

    cityscapes(tmp_path / "cities")
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / "cities" / kind / "train").rename(tmp_path / f"{kind} of training")
    (found,) = targets(read(segmenter(*CITYSCAPES.values()), "cities"))
    assert set(np.unique(found)) == {0, 18, 255}

    voc_masks(tmp_path / "voc")
    (tmp_path / "voc/ImageSets/Segmentation/train.txt").unlink()
    annotated = read(segmenter(*VOC), "voc")
    assert len(annotated.images) == 2  # those of val.txt
    assert set(np.unique(targets(annotated))) == {0, 15, 255}
    data = segmentation_data("voc")
    assert len(data.train.images) == 3
    assert len(data.test.images) == 2


def test_a_head_with_other_names_reads_pascal_voc_by_its_values(tmp_path):
    voc_masks(tmp_path / "own")
    found = targets(read(segmenter(*(f"kind {k}" for k in range(21)))))
    assert set(np.unique(found)) == {0, 15, 255}


def test_masks_of_classes_that_the_head_does_not_know(tmp_path):
    masks_in(tmp_path / "own", (0, 1))
    (tmp_path / "own/classes.txt").write_text("sky\nbird\n")
    with pytest.raises(UserError, match=r"does not know \(bird\): the images have 2 \(sky, bird\)"):
        read(segmenter("sky", "grass", "cat"))
    (tmp_path / "own/classes.txt").unlink()
    masks_in(tmp_path / "own", (0, 9))
    with pytest.raises(UserError, match="values 9 are no class: those of 3 classes are 0 to 2"):
        read(segmenter("sky", "grass", "cat"))


def test_there_is_nothing_to_train_on(tmp_path):
    for kind in ("images", "annotations"):
        (tmp_path / "ade" / kind).mkdir(parents=True)
    picture(tmp_path / "ade/images/validation/a.jpg")
    mask(tmp_path / "ade/annotations/validation/a.png", ids())
    with pytest.raises(UserError, match="1 images to test on, and none to train on"):
        segmentation_data("ade")
    masks_in(tmp_path / "own", (1, 2))
    data = segmentation_data("own", test_root="ade", class_names=["a", "b"], ignore=0)
    assert len(data.test.images) == 1


# --- classification -----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "test", "val"])
def test_folders_of_some_of_the_classes(tmp_path, part):
    for i in range(3):
        picture(tmp_path / "own" / part / "dog" / f"{i}.png", i)
    assert [int(t) for t in targets(read(classifier("cat", "dog", "ox")))] == [1, 1, 1]


def test_a_class_may_be_called_val(tmp_path):
    for name in ("cat", "val"):
        picture(tmp_path / "own" / name / "inside" / "a.png")
    task = classifier("cat", "val")
    assert sorted(int(t) for t in targets(read(task))) == [0, 1]


def test_lists_have_the_head_s_classes(tmp_path):
    names = [f"{i}.png" for i in range(3)]
    for i, name in enumerate(names):
        picture(tmp_path / "own" / name, i)
    (tmp_path / "list.csv").write_text(
        "".join(f"{n},{k}\n" for n, k in zip(names, ("ox", "cat", "ox"), strict=True))
    )
    task = classifier("cat", "dog", "ox")
    assert [int(t) for t in targets(read(task, file="list.csv", root="own"))] == [2, 0, 2]
    (tmp_path / "named.csv").write_text("picture,what\n" + (tmp_path / "list.csv").read_text())
    columns = {"image_column": "picture", "label_column": "what"}
    found = targets(read(task, file="named.csv", root="own", **columns))
    assert [int(t) for t in found] == [2, 0, 2]
    (tmp_path / "paths.txt").write_text("\n".join(names) + "\n")
    np.save("labels.npy", np.array([1, 1, 0]))
    given = {"file": "paths.txt", "root": "own", "labels": "labels.npy"}
    assert [int(t) for t in targets(read(task, **given))] == [1, 1, 0]
    rows = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    np.save("labels.npy", rows)
    several = classifier("cat", "dog", "ox", several=True)
    assert (np.stack(targets(read(several, **given))) == rows).all()
    with pytest.raises(UserError, match="3 labels of 0 and 1 each, and the classifier takes one"):
        read(task, **given)
    with pytest.raises(UserError, match="one label each, and the classifier takes 3 of 0 and 1"):
        read(several, file="list.csv", root="own")
    np.save("labels.npy", rows[:, :2])
    with pytest.raises(UserError, match="2 labels of 0 and 1 each, and the classifier takes 3"):
        read(several, **given)
    np.save("labels.npy", np.array([1, 1, 7]))
    with pytest.raises(UserError, match=r"does not know \(7\)"):
        read(task, **given)
    with pytest.raises(UserError, match="name the list of its images"):
        read(task, root="own", labels="labels.npy")


def test_folders_of_classes_that_the_head_does_not_know(tmp_path):
    picture(tmp_path / "own/dog/a.png")
    picture(tmp_path / "own/wasp/a.png")
    with pytest.raises(UserError, match=r"does not know \(wasp\): the images have 2 \(dog, wasp\)"):
        read(classifier("cat", "dog"))
    picture(tmp_path / "flat/a.png")
    with pytest.raises(UserError, match=r"one folder a class is needed$"):
        read(classifier("cat", "dog"), "flat")


# --- detection ----------------------------------------------------------------------------------


def labels(annotated):
    return [t.labels.tolist() for t in targets(annotated)]


def test_objects_of_some_of_the_classes(tmp_path):
    task = detector("cat", "dog", "ox")
    coco(tmp_path / "own", categories=((1, "dog"), (2, "cat")))  # a test part, in another order
    annotated = read(task)
    assert labels(annotated) == [[1, 0], [1, 0]]
    same = read(detector("dog", "cat"))
    assert labels(same) == [[0, 1], [0, 1]]
    assert annotated.digest != same.digest
    assert annotated.left_out == ()

    names = [(1, "a.jpg")]
    picture(tmp_path / "elsewhere/a.jpg")
    coco_json(tmp_path / "one/test.json", names, [square(1, 1, 5)], categories=((5, "ox"),))
    assert labels(read(task, "one/test.json", images="elsewhere")) == [[2]]

    voc_boxes(tmp_path / "voc", 0, 2, lists=())
    assert labels(read(detector("cat", "dog", "person"), "voc")) == [[2, 1], [2, 1]]


def test_objects_with_numbers_for_classes_are_the_head_s(tmp_path):
    yolo(tmp_path / "own", 0, 2, inside=True)
    (tmp_path / "own/data.yaml").unlink()
    assert labels(read(detector("cat", "dog", "ox"))) == [[0, 1], [0, 1]]


def test_objects_of_classes_that_the_head_does_not_know(tmp_path):
    coco(tmp_path / "own", categories=((1, "cat"), (2, "bird")))
    with pytest.raises(UserError, match=r"does not know \(bird\): the images have 2 \(cat, bird\)"):
        read(detector("cat", "dog"))
    kept = {"class_names": ["cat"]}
    assert labels(read(detector("cat", "dog"), **kept)) == [[0], [0]]
    content = json.loads((tmp_path / "own/annotations/instances_val2017.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
    (tmp_path / "own/annotations/instances_val2017.json").write_text(json.dumps(content))
    assert labels(read(detector("cat", "dog"))) == [[0], [0]]  # no bird in what is tested on


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (classifier, {"layout": "voc"}, "data.layout: classification has no such setting; there"),
        (segmenter, {"layout": "voc"}, "data.layout: name the images as well, data.root=DIR"),
        (segmenter, {"root": "x", "layout": "dots"}, "data.layout=dots must be"),
        (segmenter, {"root": "x", "ignore": -1}, "data.ignore=-1 must be"),
        (detector, {"root": "x", "labels": "y"}, "data.labels: detection has no such setting"),
    ],
)
def test_settings_that_do_not_fit(make, given, said):
    torch.manual_seed(0)
    with pytest.raises(UserError) as error:
        named_test_data(make("a", "b"), given, {})
    assert said in str(error.value)
