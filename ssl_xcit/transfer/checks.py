"""Read a few images with what is known of them before anything starts."""

import logging

from ssl_xcit.data.crop_dataset import probes
from ssl_xcit.data.decode import decode
from ssl_xcit.data.picture import BadImage
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import UserError
from ssl_xcit.transfer.annotated import EXAMPLES, Misfit
from ssl_xcit.transfer.task import AnnotatedSource, TransferData

log = logging.getLogger(__name__)


def check_transfer(data: TransferData, preprocess: Preprocess) -> None:
    """Check that images and targets can be read and fit, on a few of each part.

    What cannot be read is skipped in training as well, and only logged here. What can be read and
    does not fit, such as a mask of another size or a label beyond the classes, is rarely the only
    one, and an error.

    Raises:
        UserError: a part is empty, none of its images can be read, a target does not fit its image
            or the classes, or the parts have different classes.
    """
    if list(data.train.class_names) != list(data.test.class_names):
        raise UserError(f"{data.name}: training and test images have different classes")
    for part, annotated in (("training", data.train), ("test", data.test)):
        check_part(f"{data.name}: {part} images", annotated, preprocess)


def check_part(where: str, annotated: AnnotatedSource, preprocess: Preprocess) -> None:
    """Check one part, see `check_transfer`."""
    if not len(annotated.images):
        raise UserError(f"{where}: there are none")
    errors = []
    indices = list(probes(annotated.images))
    for index in indices:
        name = annotated.images.name(index)
        try:
            height, width, _ = decode(annotated.images.read(index), preprocess).shape
            annotated.read_target(index, height, width)
        except Misfit as error:
            raise UserError(f"{name}: {error}") from error
        except BadImage as error:
            errors.append(f"{name} ({error})")
    if len(errors) == len(indices):
        raise UserError(
            f"{where}: none of {len(indices)} that were tried can be read, starting with "
            f"{errors[0]}: are these the right files?"
        )
    if errors:
        log.warning(
            "%s: %d of %d that were tried cannot be read and are skipped: %s",
            where, len(errors), len(indices), "; ".join(errors[:EXAMPLES]),
        )  # fmt: skip
