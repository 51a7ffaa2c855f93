"""What two forms of one function are compared by."""

import torch


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def with_gradients(form, inputs, weights=None, low=False):
    """The output, perhaps by autocast in bfloat16, and the gradients of its square or its sum."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = form()
    loss = out.float().square() if weights is None else out * weights
    return out, *torch.autograd.grad(loss.sum(), inputs)


def kept_bytes(form):
    """Of the tensors that autograd saves for the backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        form()
    return sum(sizes.values())
