"""Distillation of similarities: a student has a frozen teacher's similarities of an image to others
(SEED, arXiv:2101.04731, section 3.2), and of an image's patches to each other.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, kl_div, normalize


def queue_similarity_loss(
    student: Float[Tensor, "B D"],
    teacher: Float[Tensor, "B D"],
    queue: Float[Tensor, "Q D"],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Mean over images of KL(softmax(t . queue / temperature) || softmax(s . queue / temperature)),
    s, t and the queue's rows of unit length.

    SEED has the cross-entropy, with the same gradient, and temperatures that differ.

    Args:
        student: embeddings, of the teacher's width.
        teacher: embeddings; not differentiated.
        queue: the teacher's embeddings of other images, or of these as well; not differentiated.
        temperature: above 0.

    Returns:
        A scalar in nats, float32 at least, from 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        bank = unit_rows(queue.detach()).mT  # (D, Q)
        theirs = unit_rows(teacher.detach()) @ bank
        return divergence(theirs, unit_rows(student) @ bank, temperature)


def patch_similarity_loss(
    student: Float[Tensor, "B h w D"],
    teacher: Float[Tensor, "B H W E"],
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Mean over images and patches i of KL(softmax_j(t_i . t_j / temperature) || softmax_j(s_i .
    s_j / temperature)), j over all patches of the image, i among them; s and t of unit length.

    Where the grids differ, the features of the finer one are resampled before they get unit length:
    to the smaller of both heights and widths, bilinearly and with antialiasing.

    Args:
        student: features of the patches.
        teacher: likewise, of the same images; the widths may differ. Not differentiated.
        temperature: above 0.

    Returns:
        A scalar in nats, float32 at least, from 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        size = [min(a, b) for a, b in zip(student.shape[1:3], teacher.shape[1:3], strict=True)]
        ours, theirs = patch_rows(student, size), patch_rows(teacher.detach(), size)
        return divergence(theirs @ theirs.mT, ours @ ours.mT, temperature)


def divergence(
    teacher: Float[Tensor, "*rows n"], student: Float[Tensor, "*rows n"], temperature: float
) -> Float[Tensor, ""]:
    """Mean over rows of the KL divergence of the student's softmax from the teacher's."""
    p, q = ((x / temperature).log_softmax(dim=-1) for x in (teacher, student))
    return kl_div(q, p, reduction="sum", log_target=True) / teacher.shape[:-1].numel()


def patch_rows(x: Float[Tensor, "B h w D"], size: list[int]) -> Float[Tensor, "B n D"]:
    """Patches of unit length on a grid of this height and width, in rows."""
    if list(x.shape[1:3]) != size:
        exact = (x if x.dtype == torch.float64 else x.float()).permute(0, 3, 1, 2)
        x = interpolate(exact, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    return unit_rows(x.flatten(1, 2))


def unit_rows(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Rows of length 1, float32 at least."""
    return normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
