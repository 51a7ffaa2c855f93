"""The kinds of tasks, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ssl_xcit.transfer.classification import output as of_classes
from ssl_xcit.transfer.classification.data import classification_test
from ssl_xcit.transfer.classification.task import Classification
from ssl_xcit.transfer.detection import output as of_objects
from ssl_xcit.transfer.detection.head_data import detection_test
from ssl_xcit.transfer.detection.task import Detection
from ssl_xcit.transfer.outputs import Presentation
from ssl_xcit.transfer.segmentation import output as of_pixels
from ssl_xcit.transfer.segmentation.data import segmentation_test
from ssl_xcit.transfer.segmentation.task import Segmentation
from ssl_xcit.transfer.task import AnnotatedSource


@dataclass(frozen=True)
class Kind:
    """What is asked of a kind of task beside `Task`."""

    task: type[Classification] | type[Segmentation] | type[Detection]
    pyramid: bool  # whether its head takes the maps of the backbone's pyramid, or the class token
    presentation: Presentation
    read_test: Callable[..., AnnotatedSource]  # test images for a task, with its classes


KINDS: Mapping[str, Kind] = {
    "classification": Kind(Classification, False, of_classes.PRESENTATION, classification_test),
    "segmentation": Kind(Segmentation, True, of_pixels.PRESENTATION, segmentation_test),
    "detection": Kind(Detection, True, of_objects.PRESENTATION, detection_test),
}
