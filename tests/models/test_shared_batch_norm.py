"""BatchNorm of parts of a batch on several processes, against torch's of the whole batch."""

import pytest
import torch
from ranks import on_ranks
from torch import nn

from ssl_xcit.models.layers import DropPath, computing
from ssl_xcit.models.shared_batch_norm import SharedBatchNorm, share_batch_norm
from ssl_xcit.utils.ranks import BatchPart

PARTS = [slice(0, 3), slice(3, 8)]  # of 8 images: ranks need not have as many
CASES = {
    "float64": (torch.float64, 1e-11),
    "float32": (torch.float32, 2e-5),
    "bfloat16": (torch.bfloat16, 2e-2),
}


class Layers(nn.Module):
    """As in XCiT's stem and in the projection head."""

    def __init__(self):
        super().__init__()
        self.images = nn.Sequential(nn.BatchNorm2d(4), nn.GELU())
        self.rows = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        """Images that are not around 0, then rows."""
        return self.rows(self.images(x).mean(dim=(2, 3)).to(self.rows.running_mean.dtype)).to(
            x.dtype
        )


def results(dtype, part, shared, *scope):
    """Rows, and gradients of images and parameters; state after two steps."""
    torch.manual_seed(0)
    layers = Layers()
    nn.init.normal_(layers.images[0].weight)
    layers = layers.to(torch.promote_types(dtype, torch.float32))
    x = (torch.randn(8, 4, 5, 3) * 0.5 + torch.tensor([0.0, 1.0, -5.0, 3.0]).view(4, 1, 1)).to(
        dtype
    )
    x = x.to(memory_format=torch.channels_last)[part].clone().requires_grad_()
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).to(dtype)[part]
    if shared:
        share_batch_norm(layers, *scope)
        assert isinstance(layers.images[0], SharedBatchNorm)
    for _ in range(2):
        layers.zero_grad()
        x.grad = None
        out = layers(x)
        (out * weight).sum().backward()
    state = {name: value.clone() for name, value in layers.state_dict().items()}
    grads = {name: p.grad for name, p in layers.named_parameters()}
    return {"out": out.detach(), "dx": x.grad, "state": state, "grads": grads}


def work(rank):
    return {name: results(dtype, PARTS[rank], True) for name, (dtype, _) in CASES.items()}


def work_of_machines(rank):
    """Two machines of two ranks, each with all images."""
    return results(torch.float64, PARTS[rank % 2], True, "node", 2)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), work)


@pytest.mark.parametrize("name", CASES)
def test_parts_are_normalised_as_the_whole_batch(of_ranks, name):
    """Outputs, gradients and running statistics, which all ranks hold alike."""
    dtype, tolerance = CASES[name]
    whole = results(dtype, slice(None), False)
    ours, theirs = (made[name] for made in of_ranks)

    def near(a, b):
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1.0)

    for key in ("out", "dx"):
        near(torch.cat((ours[key], theirs[key])), whole[key])
    for key, grad in whole["grads"].items():
        near(ours["grads"][key] + theirs["grads"][key], grad)
    assert ours["state"].keys() == whole["state"].keys()
    for key, value in whole["state"].items():
        near(ours["state"][key], value)
        assert torch.equal(ours["state"][key], theirs["state"][key])


def test_ranks_of_one_machine_have_statistics_of_their_own(tmp_path):
    """Two machines of two ranks, each with all 8 images: as one process with them."""
    made = on_ranks(4, tmp_path, work_of_machines)
    whole = results(torch.float64, slice(None), False)
    for first in (0, 2):
        out = torch.cat((made[first]["out"], made[first + 1]["out"]))
        assert torch.allclose(out, whole["out"], rtol=0, atol=1e-11)
    for rank in made:
        for key, value in whole["state"].items():
            assert torch.allclose(rank["state"][key], value, rtol=0, atol=1e-11)


def test_ranks_may_keep_to_their_own_images():
    layers = Layers()
    share_batch_norm(layers, "local")
    assert not any(isinstance(m, SharedBatchNorm) for m in layers.modules())


def test_stochastic_depth_is_of_an_image_however_a_batch_is_split():
    """8 images with 2 views each, as one batch and as parts."""
    layer = DropPath(0.5)
    x = torch.zeros(2, 8, 3, 4)

    def drawn(part, of_batch):
        torch.manual_seed(3)
        with computing(layer, of_batch, x.device):
            return layer.draw(x[:, part].flatten(0, 1)).unflatten(0, (2, -1))

    torch.manual_seed(3)
    whole = layer.draw(x.flatten(0, 1)).unflatten(0, (2, -1))
    assert torch.equal(drawn(slice(None), BatchPart(0, 8, 8)), whole)
    for part in PARTS:
        of_part = BatchPart(part.start, part.stop - part.start, 8)
        assert torch.equal(drawn(part, of_part), whole[:, part])
    assert set(whole.unique().tolist()) == {0.0, 2.0}
