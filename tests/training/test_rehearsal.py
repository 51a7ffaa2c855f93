"""A whole step on a GPU that is not there: fake tensors on `cuda`, every objective, no hidden
synchronisation of device and host.

Autograd's engine asks CUDA for a context, so the graph is walked here, node by node.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from test_conf import load
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssl_xcit
from ssl_xcit.data.picture import RGB
from ssl_xcit.data.preprocess import to_views
from ssl_xcit.eval.features.extractor import FeatureExtractor
from ssl_xcit.models.xcit import XCiT
from ssl_xcit.training.build import make_module
from ssl_xcit.training.health import Health
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.step_memory import FakeStep, fake_copy
from ssl_xcit.utils.validation import parse

CUDA = torch.device("cuda:0")
PACKAGE = Path(ssl_xcit.__file__).parent
OBJECTIVES = ["dino", "swav", "infonce", "simdino", "region", "ibot", "dinov2", "distillation"]
SIZE = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
WORDS = [
    "experiment=none", "model=xcit_micro_4_p8", "batch_size=4", "epochs=4",
    "augment.global_size=32", "augment.local_size=16", "augment.num_local=2",
    *(f"model.{k}={v}" for k, v in SIZE.items()), "model.drop_path=0.1", "num_workers=0",
]  # fmt: skip
VIEWS = ((2, 32), (2, 16))  # views of an image, and their side
aten = torch.ops.aten


def backward(loss):
    """What the engine does, on one thread and without a device's context."""
    waiting, edges, todo = Counter(), {}, [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node in edges:
            continue
        edges[node] = node.next_functions
        for following, _ in edges[node]:
            if following is not None:
                waiting[following] += 1
                todo.append(following)
    grads, ready = defaultdict(dict), [loss.grad_fn]
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = grads.pop(node, {})
            results = called(node, [given.get(i) for i in range(1 + max(given, default=0))])
            for (following, number), grad in zip(edges[node], results, strict=True):
                if following is None:
                    continue
                if grad is not None:
                    grad = as_declared(grad, following._input_metadata[number])
                    known = grads[following].get(number)
                    grads[following][number] = grad if known is None else known + grad
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def as_declared(grad, about):
    """A gradient as the engine hands it on: summed where it was broadcast, in the right type."""
    assert grad.device == about.device, f"a gradient on {grad.device}"
    return grad.sum_to_size(about.shape).to(about.dtype)


def called(node, grads):
    """Gradients of a node's inputs, one an edge."""
    if all(grad is None for grad in grads):
        return [None] * len(node.next_functions)
    if not isinstance(node, BackwardCFunction):
        result = node(*grads)
        results = result if isinstance(result, tuple) else (result,)
        return results[: len(node.next_functions)] if node.next_functions else []
    results = iter(
        grad
        for grad, needed in zip(node.apply(*grads), node.needs_input_grad, strict=True)
        if needed
    )
    return [None if edge[0] is None else next(results) for edge in node.next_functions]


class Synchronisations(TorchDispatchMode):
    """Count where the host waits for the device, by file and function of the package."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.waits(func, args, kwargs, result):
            self.places[place()] += 1
        return result

    @staticmethod
    def waits(func, args, kwargs, result):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            blocking = not (kwargs.get("non_blocking") or (*args, False)[2:3] == (True,))
            return source.device.type != result.device.type and blocking
        if not any(t.device.type == "cuda" for t in given):
            return False
        if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            return any(i is not None and i.dtype == torch.bool for i in args[1])
        if func is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        return func in (
            aten._local_scalar_dense.default,
            aten.nonzero.default,
            aten.masked_select.default,
            aten.equal.default,
            aten._unique2.default,
            aten.unique_consecutive.default,
        )


def place():
    """The innermost function of the package on the stack."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.name != "step_memory.py":
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A checkpoint to distil from."""
    backbone = XCiT(**SIZE)
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    state = {f"teacher.backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "architecture": backbone.architecture, "preprocess": {}}
    torch.save(content, path)
    return path


@pytest.fixture(autouse=True)
def cuda_on_paper(monkeypatch):
    """What torch asks of a GPU before it turns to autocast or to a generator."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)


@pytest.fixture
def make(teacher):
    def made(objective, *words):
        given = [f"objective={objective}", *WORDS, *words]
        if objective == "distillation":
            given.append(f"objective.teacher={teacher}")
        settings = parse(PretrainSettings, load("pretrain", *given))
        return make_module(settings, make_plan(settings, 40, 1), RGB)

    return made


class Rehearsal:
    """A module of fake tensors on `cuda`, and its steps."""

    def __init__(self, module, low):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)  # of masks, which numpy makes
        self.meter, self.low = FakeStep("cuda"), low
        self.waits = Synchronisations()
        with self.fake:
            self.module = fake_copy(module, CUDA)
        self.module.manual_backward = backward

    def step(self):
        """From the pixels of a batch to the new weights."""
        with self.fake, self.meter, self.waits:
            pixels = [
                torch.empty(4, V, side, side, 3, dtype=torch.uint8, device=CUDA)
                for V, side in VIEWS
            ]
            views = [to_views(part, RGB) for part in pixels]
            cast = torch.autocast("cuda", torch.bfloat16, enabled=self.low, cache_enabled=False)
            with cast:
                self.module.output = self.module.step(views)


# Where the host waits for the device in a step, and how often; docs/decisions.md says why each has
# to be. Nothing else may.
ALLOWED = {"training/step_guard.py:is_finite": 1}
OF_OBJECTIVE = {"distillation": {"objectives/queue.py:filled": 1}}


@pytest.mark.parametrize(
    ("objective", "low", "parts"),
    [
        pytest.param("dino", False, 2, marks=pytest.mark.slow),
        *((name, True, 1) for name in OBJECTIVES),
    ],
)
def test_a_whole_step_stays_on_the_gpu_and_waits_once(objective, low, parts, make):
    rehearsal = Rehearsal(make(objective, f"trainer.accumulate={parts}"), low)
    rehearsal.step()
    assert dict(rehearsal.waits.places) == ALLOWED | OF_OBJECTIVE.get(objective, {})
    module = rehearsal.module
    optimizer = module.optimizers()
    assert optimizer.defaults["fused"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in trained if p.grad is not None]
    assert len(grads) > 0.9 * len(trained)
    assert {grad.dtype for grad in grads} == {torch.float32}
    for tensor in tree_leaves((grads, module.state_dict(), dict(optimizer.state), module.output)):
        if isinstance(tensor, torch.Tensor):
            assert isinstance(tensor, FakeTensor)
            assert tensor.device == CUDA


def test_what_does_not_belong_into_a_step_is_noticed(make):
    rehearsal = Rehearsal(make("simdino"), False)
    norm = rehearsal.module.student.backbone.norm
    hook = norm.register_forward_hook(lambda module, given, out: out * float(out.sum() > 0))
    rehearsal.step()
    found = dict(rehearsal.waits.places)
    assert found == ALLOWED | {"models/xcit.py:forward": len(VIEWS)}
    hook.remove()
    norm.register_forward_hook(lambda module, given, out: out + torch.ones(16))
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0.*cpu"):
        rehearsal.step()


class DistinctValues(TorchDispatchMode):
    """As many distinct values as there are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not aten._unique2.default:
            return func(*args, **(kwargs or {}))
        values = args[0].flatten()
        counts = torch.ones_like(values, dtype=torch.int64)
        return values, torch.empty(0, dtype=torch.int64, device=values.device), counts


def test_health_and_features_of_an_evaluation_on_the_gpu(make):
    rehearsal = Rehearsal(make("dino"), False)
    rehearsal.step()
    module, health = rehearsal.module, Health(queue=8)
    module.health = health
    with rehearsal.fake, rehearsal.meter, DistinctValues():
        health.on_train_batch_end(object.__new__(lightning.Trainer), module)
        values = module.report(2)
        assert {"rankme", "feature_std", "teacher_entropy", "prototypes_used"} <= values.keys()
        assert {q.rows.device for q in health.queues().values() if q.rows is not None} == {CUDA}
        extractor = FeatureExtractor(module.teacher.backbone, RGB, CUDA)
        with extractor.inference() as backbone:
            parts = backbone.parts(extractor.images(np.zeros((32, 32, 3), np.uint8)))
        assert {part.device for part in parts.values()} == {CUDA}
