import numpy as np
import pytest
from PIL import Image

from ssl_xcit.data.decode import read_image
from ssl_xcit.data.picture import BadImage, upright
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.transfer.checks import check_transfer
from ssl_xcit.transfer.segmentation.data import CITYSCAPES, VOC, segmentation_data
from tests.transfer import layouts
from tests.transfer.layouts import HEIGHT, WIDTH, ids, mask, mask_folders, picture


def targets(source):
    return [source.read_target(i, HEIGHT, WIDTH) for i in range(len(source.images))]


def stems(source):
    return [
        source.images.name(i).rpartition("/")[2].partition(".")[0]
        for i in range(len(source.images))
    ]


def logged(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


def test_ade20k(tmp_path):
    data = segmentation_data(str(layouts.ade20k(tmp_path)))
    assert len(data.train.images) == 3
    assert len(data.test.images) == 2
    assert len(data.train.class_names) == 150
    assert data.train.class_names[0] == "thing 1, kind 1"
    wanted = {0: 255, 1: 0, 150: 149}
    for i, found in enumerate(targets(data.train)):
        values = ids(i, values=(0, 1, 150))
        assert (found == np.vectorize(wanted.get)(values)).all()
    check_transfer(data, Preprocess())


def test_ade20k_without_its_list_of_names_has_numbers(tmp_path):
    (layouts.ade20k(tmp_path) / "objectInfo150.txt").unlink()
    assert segmentation_data(str(tmp_path)).train.class_names[149] == "150"


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    values = (0, 7, 33, 255) if kind == "labelIds" else (0, 18, 255)
    data = segmentation_data(str(layouts.cityscapes(tmp_path, kind, values)))
    assert stems(data.train)[0] == "ulm_000000_000019_leftImg8bit"
    assert len(data.train.images) == 2
    assert len(data.test.images) == 1
    assert data.train.class_names == tuple(CITYSCAPES.values())
    wanted = {0: 255, 7: 0, 33: 18, 255: 255} if kind == "labelIds" else {0: 0, 18: 18, 255: 255}
    for i, found in enumerate(targets(data.train)):
        assert (found == np.vectorize(wanted.get)(ids(i, values=values))).all()


def test_pascal_voc(tmp_path):
    data = segmentation_data(
        str(layouts.voc_masks(tmp_path / "VOCdevkit" / "VOC2012").parent.parent)
    )
    assert stems(data.train) == ["2007_000000", "2007_000001", "2007_000002"]
    assert stems(data.test) == ["2007_000003", "2007_000004"]
    assert data.train.class_names == VOC
    assert (targets(data.train)[1] == ids(1, values=(0, 15, 255))).all()
    assert not data.train.left_out


@pytest.mark.parametrize("inside", [False, True])
def test_folders_of_images_and_masks(tmp_path, inside):
    mask_folders(tmp_path / "data", {"train": 4, "val": 2}, names=["sky", "tree", "road"])
    if inside:
        for part in ("train", "val"):
            for kind in ("images", "masks"):
                target = tmp_path / "data" / part / kind
                target.parent.mkdir(exist_ok=True)
                (tmp_path / "data" / kind / part).rename(target)
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind).rmdir()
    data = segmentation_data(str(tmp_path / "data"))
    assert data.train.class_names == ("sky", "tree", "road")
    assert len(data.train.images) == 4
    assert len(data.test.images) == 2
    for i, found in enumerate(targets(data.train)):
        assert found.dtype == np.uint8
        assert (found == ids(i)).all()
    check_transfer(data, Preprocess())


def test_a_share_is_held_out_where_there_is_no_split(tmp_path):
    mask_folders(tmp_path, {"": 10})
    data = segmentation_data(str(tmp_path), test_fraction=0.3, seed=1)
    train, test = stems(data.train), stems(data.test)
    assert len(test) == 3
    assert sorted(train + test) == [str(i) for i in range(10)]
    for stem, found in zip(test, targets(data.test), strict=True):
        assert (found == ids(int(stem))).all()
    assert stems(segmentation_data(str(tmp_path), test_fraction=0.3, seed=2).test) != test


def test_another_folder_to_test_on(tmp_path):
    mask_folders(tmp_path / "a", {"": 3})
    mask_folders(tmp_path / "b", {"": 2})
    data = segmentation_data(str(tmp_path / "a"), test_root=str(tmp_path / "b"))
    assert len(data.train.images) == 3
    assert len(data.test.images) == 2
    assert data.test.images.name(0).startswith(str(tmp_path / "b"))
    assert data.test.read_target(1, HEIGHT, WIDTH).shape == (HEIGHT, WIDTH)


def test_without_names_the_values_of_all_masks_are_the_classes(tmp_path):
    mask_folders(tmp_path, {"train": 3, "test": 2}, values=(0, 7, 300))
    data = segmentation_data(str(tmp_path))
    assert data.train.class_names == ("0", "7", "300")
    wanted = {0: 0, 7: 1, 300: 2}
    assert (targets(data.test)[1] == np.vectorize(wanted.get)(ids(1, values=(0, 7, 300)))).all()


def test_masks_of_0_and_255(tmp_path):
    mask_folders(tmp_path, {"": 4}, values=(0, 255))
    with pytest.raises(UserError, match=r"classes: 0 without those ignored \(255\).*ignore=\[\]"):
        segmentation_data(str(tmp_path))
    data = segmentation_data(str(tmp_path), ignore=[])
    assert data.train.class_names == ("0", "255")
    assert set(np.unique(targets(data.train))) == {0, 1}
    named = segmentation_data(str(tmp_path), class_names={0: "background", 255: "crack"})
    assert named.train.class_names == ("background", "crack")
    assert set(np.unique(targets(named.train))) == {0, 1}


def test_names_pass_over_ignored_values(tmp_path):
    mask_folders(tmp_path, {"": 4}, values=(0, 1, 2, 9))
    data = segmentation_data(str(tmp_path), class_names=["tree", "road"], ignore=[0, 9])
    assert set(np.unique(targets(data.train))) == {0, 1, 255}
    first = int(stems(data.train)[0])
    assert ((targets(data.train)[0] == 0) == (ids(first, values=(0, 1, 2, 9)) == 1)).all()


@pytest.mark.parametrize("kind", ["palette", "grey in RGB", "1 bit", "tiff", "RGBA"])
def test_kinds_of_mask_files(tmp_path, kind):
    mask_folders(tmp_path, {"": 3}, values=(0, 1))
    for i in range(3):
        file, values = tmp_path / "masks" / f"{i}.png", ids(i, values=(0, 1))
        if kind == "palette":
            mask(file, values, palette=True)
        elif kind == "tiff":
            file.unlink()
            mask(file.with_suffix(".tif"), values.astype(np.uint16))
        elif kind == "1 bit":
            Image.fromarray(values > 0).save(file)
        else:
            Image.fromarray(values).convert("RGB" if "in" in kind else "RGBA").save(file)
    data = segmentation_data(str(tmp_path))
    first = int(stems(data.train)[0])
    assert (targets(data.train)[0] == ids(first, values=(0, 1))).all()


def test_masks_may_be_of_the_image_as_stored_or_upright(tmp_path):
    mask_folders(tmp_path, {"": 9}, names=["a", "b", "c"])
    for turn in range(1, 9):
        picture(tmp_path / "images" / f"{turn}.jpg", turn, turn=turn)
        if turn in (2, 3, 4):  # of the same size both ways: taken as upright
            continue
        sides = read_image(tmp_path / "images" / f"{turn}.jpg").shape[:2]
        data = segmentation_data(str(tmp_path), test_fraction=0)
        found = data.train.read_target(turn, *sides)
        assert (found == upright(ids(turn)[..., None], turn)[..., 0]).all()
        if turn > 4:
            mask(tmp_path / "masks" / f"{turn}.png", ids(turn, *sides))
            assert (data.train.read_target(turn, *sides) == ids(turn, *sides)).all()
    data = segmentation_data(str(tmp_path), test_fraction=0)
    assert (data.train.read_target(3, HEIGHT, WIDTH) == ids(3)).all()


def test_a_mask_of_another_size(tmp_path):
    mask_folders(tmp_path, {"": 4}, names=["a", "b", "c"])
    mask(tmp_path / "masks" / "2.png", ids(2, WIDTH, HEIGHT))
    data = segmentation_data(str(tmp_path), test_fraction=0)
    wrong = "masks/2.png: its annotations are for 24 x 32 pixels, and the image has 32 x 24"
    with pytest.raises(BadImage, match=wrong):
        targets(data.train)
    with pytest.raises(UserError, match=f"images/2.jpg: .*{wrong}"):
        check_transfer(data, Preprocess())


def test_a_label_beyond_the_classes(tmp_path):
    mask_folders(tmp_path, {"": 4}, values=(0, 1, 7), names=["a", "b"])
    data = segmentation_data(str(tmp_path))
    with pytest.raises(BadImage, match="values 7 are no class: those of 2 classes are 0 to 1"):
        targets(data.train)
    with pytest.raises(UserError, match=r"masks/\d.png: values 7 are no class"):
        check_transfer(data, Preprocess())


def test_masks_of_colours(tmp_path):
    mask_folders(tmp_path, {"": 3}, names=["a", "b", "c"])
    picture(tmp_path / "masks" / "1.png")
    with pytest.raises(UserError, match=r"masks/1.png: of colours \(RGB\): a class id for each"):
        segmentation_data(str(tmp_path))


def test_masks_as_jpeg(tmp_path):
    mask_folders(tmp_path, {"": 2})
    for i in range(2):
        (tmp_path / "masks" / f"{i}.png").unlink()
        picture(tmp_path / "masks" / f"{i}.jpg")
    with pytest.raises(UserError, match="PNG or TIFF"):
        segmentation_data(str(tmp_path))


def test_a_mask_that_cannot_be_read(tmp_path, caplog):
    mask_folders(tmp_path, {"": 4}, names=["a", "b", "c"])
    (tmp_path / "masks" / "1.png").write_bytes(b"nothing")
    data = segmentation_data(str(tmp_path), test_fraction=0)
    with pytest.raises(BadImage, match=r"mask .*masks/1.png: "):
        data.train.read_target(1, HEIGHT, WIDTH)
    check_transfer(data, Preprocess())
    assert "1 of 4 that were tried cannot be read" in logged(caplog)
    for i in range(4):
        (tmp_path / "masks" / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of 4 that were tried can be read"):
        check_transfer(data, Preprocess())


def test_images_and_masks_without_a_partner(tmp_path, caplog):
    mask_folders(tmp_path, {"train": 3, "test": 2}, names=["a", "b", "c"])
    picture(tmp_path / "images" / "train" / "alone.jpg")
    mask(tmp_path / "masks" / "train" / "lonely.png", ids())
    data = segmentation_data(str(tmp_path))
    assert len(data.train.images) == 3
    assert data.train.left_out == (
        "images/train/alone.jpg: no mask", "masks/train/lonely.png: no image"
    )  # fmt: skip
    assert "left out 2: images/train/alone.jpg: no mask; masks/train/lonely.png" in logged(caplog)


def test_a_class_that_only_test_images_have(tmp_path, caplog):
    mask_folders(tmp_path, {"train": 3, "test": 2}, values=(0, 1), names=["a", "b", "c"])
    mask(tmp_path / "masks" / "test" / "1.png", ids(values=(0, 2)))
    data = segmentation_data(str(tmp_path))
    assert "test images have a class that no training image has (c)" in logged(caplog)
    assert data.test.read_target(1, HEIGHT, WIDTH).max() == 2
    (tmp_path / "classes.txt").unlink()
    caplog.clear()
    assert segmentation_data(str(tmp_path)).train.class_names == ("0", "1", "2")
    assert "no training image has (2)" in logged(caplog)


def test_folders_that_are_no_data(tmp_path):
    with pytest.raises(MissingPath, match="no such folder"):
        segmentation_data(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"looked for images/training/ .*VOC.*images/ and masks/"):
        segmentation_data(str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="no image has a mask of its name"):
        segmentation_data(str(tmp_path))
    picture(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "b.png", ids())
    with pytest.raises(UserError, match=r"no image has a mask of its name \(images/a.jpg: no mask"):
        segmentation_data(str(tmp_path))
    with pytest.raises(UserError, match=r"data\.test_root is given without"):
        segmentation_data(test_root=str(tmp_path))
    mask_folders(tmp_path, {"": 2}, names=["a", "a"])
    with pytest.raises(UserError, match="'a' is named twice"):
        segmentation_data(str(tmp_path))


def test_the_digest_tells_masks_and_classes_apart(tmp_path):
    mask_folders(tmp_path, {"train": 2, "test": 1}, names=["a", "b", "c"])
    first = segmentation_data(str(tmp_path))
    assert first.train.digest != first.test.digest
    assert segmentation_data(str(tmp_path)).train.digest == first.train.digest
    renamed = segmentation_data(str(tmp_path), class_names=["a", "b", "d"])
    assert renamed.train.digest != first.train.digest
    mask(tmp_path / "masks" / "train" / "0.png", ids(5))
    assert segmentation_data(str(tmp_path)).train.digest != first.train.digest
