"""Two processes with half the batch each, against one with all of it."""

from copy import deepcopy

import pytest
import torch
from ranks import on_ranks
from torch import nn

from ssl_xcit.objectives.coding_rate import isotropy, simdino_loss
from ssl_xcit.objectives.contrast import info_nce
from ssl_xcit.objectives.dino import Center
from ssl_xcit.objectives.koleo import koleo_loss
from ssl_xcit.objectives.queue import EmbeddingQueue
from ssl_xcit.objectives.sinkhorn import sinkhorn_knopp
from ssl_xcit.utils.ranks import gathered, summed_, world_size

V, G, B, D = 4, 2, 8, 6


def drawn():
    """A network, views (V, B, 5) and teacher (G, B, D) of the whole batch, and earlier images."""
    torch.manual_seed(0)
    return [nn.Linear(5, D), *(torch.randn(size) for size in ((V, B, 5), (G, B, D), (7, D)))]


def results(images):
    """By name: losses with the network's gradient, rows of the images' assignment, a queue."""
    network, views, teacher, earlier = (x.double() for x in drawn())
    views, teacher = views[:, images], teacher[:, images]
    queue = EmbeddingQueue(11, D).double()
    for view in (*teacher, teacher[0] * 2):
        queue.push_(view)
    losses = {
        "koleo": lambda s: koleo_loss(s[0]),
        "info_nce": lambda s: info_nce(s, teacher, 0.2),
        "info_nce_queue": lambda s: info_nce(s, teacher, 0.2, earlier),
        "isotropy": lambda s: isotropy(s[0]),
        "simdino": lambda s: simdino_loss(s, teacher)[0],
        "simdino_few_rows": lambda s: simdino_loss(s.repeat(1, 1, 3), teacher.repeat(1, 1, 3))[0],
    }
    values = {}
    for name, loss_of in losses.items():
        network.zero_grad()
        loss = loss_of(network(views))
        loss.backward()
        values[name] = loss.item()
        for i, parameter in enumerate(network.parameters()):
            values[f"{name}_{i}"] = summed_(parameter.grad.clone()) / world_size()  # as DDP does
    rows = sinkhorn_knopp(teacher.flatten(0, 1), 0.3).unflatten(0, (G, -1))
    sums = summed_(teacher.sum(dim=1))
    return values, {
        "queue": queue.state_dict(),
        "rows": rows,
        "sums": sums,
        "all": gathered(rows[0]),
        "centers": centers(teacher, images),
    }


def centers(teacher, images):
    """As a copy, the state and a step's targets see it, while ranks still exchange their sums: of
    all logits, of the first image's, which the second rank does not have, and of none.
    """
    center, seen = Center(D).double(), []
    center.update_(teacher)
    seen.append(deepcopy(center).center.clone())
    center.update_(teacher[:, [i for i in range(B)[images] if i == 0]])
    seen.append(center.state_dict()["center"].clone())
    center.update_(teacher[:, :0])
    rows = center.targets(teacher.new_zeros(1, 1, D), 1.0)
    return torch.stack([*seen, -rows[0, 0].log()])


def work(rank):
    assert world_size() == 2
    half = B // 2
    return results(slice(rank * half, (rank + 1) * half))


def test_half_the_batch_on_each_of_two_ranks(tmp_path):
    """Mean losses, averaged gradients, assignments and queues, to 1e-10."""
    (ours, our_state), (theirs, their_state) = on_ranks(2, tmp_path, work)
    expected, state = results(slice(None))
    for name, value in expected.items():
        if isinstance(value, float):
            assert (ours[name] + theirs[name]) / 2 == pytest.approx(value, rel=1e-10), name
        else:
            assert torch.equal(ours[name], theirs[name])
            assert (ours[name] - value).abs().max() < 1e-10 * value.abs().max(), name
    rows = torch.cat((our_state["rows"], their_state["rows"]), dim=1)
    assert torch.allclose(rows, state["rows"], rtol=1e-10, atol=1e-14)
    for each in (our_state, their_state):
        assert torch.equal(each["queue"]["rows"], state["queue"]["rows"])
        assert each["queue"]["count"] == state["queue"]["count"] == 3 * B
        assert torch.allclose(each["sums"], state["sums"], rtol=1e-12)
        assert torch.equal(each["all"], rows[0])
        assert torch.allclose(each["centers"], state["centers"], rtol=1e-12)


def test_the_running_mean_of_the_logits():
    _, _, teacher, _ = (x.double() if isinstance(x, torch.Tensor) else x for x in drawn())
    expected, seen = torch.zeros(D, dtype=torch.float64), []
    for mean in (teacher.mean(dim=(0, 1)), teacher[:, 0].mean(dim=0)):
        expected = 0.9 * expected + 0.1 * mean
        seen.append(expected)
    targets = -(-expected).log_softmax(dim=0)  # no row moves it
    assert torch.allclose(centers(teacher, slice(None)), torch.stack([*seen, targets]), rtol=1e-12)
