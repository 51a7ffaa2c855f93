"""Images with objects to test a detector on, with its classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Annotated

import numpy as np
from jaxtyping import Int64

from ssl_xcit.data.sources import Place, Source
from ssl_xcit.transfer.annotated import check_known_classes
from ssl_xcit.transfer.detection.data import ClassNames, DetectionImages, Layout, detection_data
from ssl_xcit.transfer.task import AnnotatedSource, Instances, Task
from ssl_xcit.utils.validation import PLACE


@dataclass(frozen=True)
class RenumberedImages:
    """Images with objects, whose class ids are replaced."""

    annotated: DetectionImages
    class_names: Sequence[str]  # of the new ids
    ids: Int64[np.ndarray, " K"]  # by the old ones; -1: no object has it

    @property
    def images(self) -> Source:
        """The same."""
        return self.annotated.images

    @property
    def left_out(self) -> Sequence[str]:
        """The same."""
        return self.annotated.left_out

    @cached_property
    def digest(self) -> str:
        """A hash of the annotations, the new ids and their names."""
        names = "\0".join(self.class_names).encode("utf-8", "surrogateescape")
        return sha256(self.annotated.digest.encode() + self.ids.tobytes() + names).hexdigest()

    def read_target(self, index: int, height: int, width: int) -> Instances:
        """See `AnnotatedSource`."""
        objects = self.annotated.read_target(index, height, width)
        return objects._replace(labels=self.ids[objects.labels])


def detection_test(
    task: Task,
    root: Place = None,
    layout: Annotated[Layout, PLACE] = "auto",
    images: Place = None,
    class_names: ClassNames = None,
) -> AnnotatedSource:
    """Return images to test a detector on, with its classes, some of which may have no object: the
    test part of a folder where it has one, else all.

    Args:
        task: the detector.
        root: see `detection_data`, as of `layout`, `images` and `class_names`; classes that have
            numbers for names are the detector's by their ids.

    Raises:
        UserError: see `detection_data`; classes of objects that the detector does not know.
    """
    data = detection_data(
        root, layout=layout, images=images, class_names=class_names, test_fraction=0.0
    )
    test, own = data.test, list(task.class_names)
    assert isinstance(test, DetectionImages)
    there = list(test.class_names)
    if not set(there) <= set(own) and all(name.isdecimal() for name in there):
        there = [own[int(n)] if int(n) < len(own) else n for n in there]
    check_known_classes(str(root), [there[k] for k in np.unique(test.labels)], own)
    if there == own:
        return test
    ids = [own.index(name) if name in own else -1 for name in there]
    return RenumberedImages(test, tuple(own), np.array(ids, np.int64))
