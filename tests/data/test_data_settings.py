"""What the annotations of sources, augmentation and preprocessing allow, and which say only where
images lie.
"""

import re

import pytest

from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import PLACE, Checker, marked_parameters

AUGMENT, PREPROCESS = "data.fused.FusedMultiCrop", "data.preprocess.preprocess"
BAD = [
    (AUGMENT, {"global_scale": [0.5, 0.4]}, "[low,high] with 0 < low <= high <= 1"),
    (AUGMENT, {"local_scale": [0, 0.4]}, "[low,high] with 0 < low <= high <= 1"),
    (AUGMENT, {"local_size": 0}, "a whole number of at least 1"),
    (AUGMENT, {"num_local": -1}, "a whole number of at least 0"),
    (AUGMENT, {"jitter": [0.4, 0.4, 0.2]}, "4 numbers: three of 0 to 1, and hue of 0 to 0.5"),
    (AUGMENT, {"jitter": [0.4, 0.4, 0.2, 0.6]}, "4 numbers: three of 0 to 1, and hue"),
    (AUGMENT, {"blur_radius": [0.0, 2.0]}, "[low,high] with 0 < low <= high"),
    (AUGMENT, {"blur_prob": [1.0, 0.1, 1.5]}, "3 probabilities, 0 to 1"),
    (AUGMENT, {"blur_prob": "often"}, "3 probabilities, 0 to 1"),
    ("data.multicrop.TorchvisionMultiCrop", {"grey_prob": 2}, "of at most 1"),
    (PREPROCESS, {"channels": 0}, "a whole number of at least 1 and of at most 128"),
    (PREPROCESS, {"max_pixels": 0}, "a whole number of at least 1"),
    (PREPROCESS, {"background": [0, 0, 256]}, "3 whole numbers of 0 to 255"),
    (PREPROCESS, {"value_range": [3, 3]}, "[low,high] with low < high or null"),
    ("data.folders.folder", {"labels": "some"}, "true or false"),
    ("data.folders.folder", {"root": ["a", None]}, "text or a list of text or null"),
    ("data.folders.labelled_folders", {"test_fraction": 1}, "of at least 0 and below 1"),
    ("data.lists.labelled_lists", {"label_kind": "words"}, "classes or numbers or null"),
    ("data.sets.labelled_arrays", {"label_kind": "words"}, "classes or numbers or null"),
    ("data.sets.torchvision_set", {"name": "MNIST"}, "CIFAR10, CIFAR100, STL10 or ImageNet"),
    ("data.shards.tar_shards", {"window": 0}, "a whole number of at least 1"),
]


@pytest.mark.parametrize(("target", "settings", "allowed"), BAD)
def test_bad_values_name_what_is_allowed(target, settings, allowed):
    ((name, _),) = settings.items()
    with pytest.raises(UserError, match=rf"^x\.{name}=.* must be .*{re.escape(allowed)}"):
        Checker({}).target({"_target_": f"ssl_xcit.{target}", **settings}, "x")


@pytest.mark.parametrize("root", ["images", 2024, ["a", 7], None])
def test_a_folder_may_look_like_a_number(root):
    Checker({}).target({"_target_": "ssl_xcit.data.folders.folder", "root": root}, "x")


@pytest.mark.parametrize(
    ("target", "places"),
    [
        ("folders.folder", "root labels out"),
        ("folders.labelled_folders", "root test_root"),
        ("lists.path_list", "file root image_column label_column backslashes label_kind"),
        ("lists.labelled_lists", "file test_file root labels test_labels image_column label_column "
         "backslashes label_kind"),
        ("sets.arrays", "file labels member label_kind"),
        ("sets.labelled_arrays",
         "file labels test_file test_labels member test_member label_kind"),
        ("sets.huggingface", "root label_kind"),
        ("sets.labelled_huggingface", "root label_kind"),
        ("sets.torchvision_set", "root download"),
        ("sets.labelled_torchvision", "root download"),
        ("shards.tar_shards", "root"),
        ("shards.labelled_shards", "root test_root"),
        ("photos.photos", "cache"),
        ("photos.labelled_photos", "cache"),
        ("preprocess.preprocess", "stats"),
    ],
)  # fmt: skip
def test_parameters_that_say_only_where_images_lie(target, places):
    assert marked_parameters(f"ssl_xcit.data.{target}", PLACE) == places.split()
