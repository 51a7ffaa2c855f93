"""Compute the peak memory of a training step without allocating it.

The real step runs on fake tensors, which have shapes, types and a device but no values, and every
storage counts from the operation that makes it until nothing refers to it any more. Not counted:
what a kernel needs inside, gaps in the allocator's memory, and what libraries take for themselves
(on a GPU the CUDA context). torch's `MemTracker` counts alike, but refuses a module that runs twice
in a step, as the backbone does at two resolutions.

What depends on values is answered so that the most memory is needed: a loss is finite, stochastic
depth drops nothing, a queue is full. Tensors that are made outside of torch, such as masks, keep
their values.
"""

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ssl_xcit.training.frozen_teacher import FrozenNetwork
from ssl_xcit.training.module import Pretraining

aten = torch.ops.aten
LARGE = 2**31  # the value of a whole number that is not known
CUDA_BLOCK = 512  # bytes that CUDA's allocator rounds up to
Shape = Sequence[int]


class StepMemory(NamedTuple):
    """Bytes at the peak of a training step, on each device."""

    networks: int  # student, teacher, a frozen teacher, and their buffers
    optimizer: int  # its moments
    batch: int
    step: int  # gradients and activations

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class FakeStep(TorchDispatchMode):
    """Count the storages on one type of device, and answer what depends on values.

    Attributes:
        now: bytes in use.
        peak: the most since it was last set.
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.now = self.peak = 0
        self.seen: set[int] = set()
        self.values: Any = WeakIdKeyDictionary()  # of fake tensors whose values are known

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        if not isinstance(tensor, FakeTensor) or tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return
        if self.device_type == "cuda":
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        """Forget a storage."""
        self.seen.discard(key)
        self.now -= size

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """Its values on the CPU, where they are known."""
        return self.values.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on fake tensors."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self.scalar(args[0])
        if func is aten.nonzero.default and self.value_of(args[0]) is None:
            rows = args[0].numel()
            result = torch.empty(rows, args[0].ndim, dtype=torch.int64, device=args[0].device)
        elif self.all_known(func, args, kwargs):
            result = self.with_values(func, args, kwargs)
        else:
            if func is aten.index.Tensor:
                args = (args[0], [i for index in args[1] for i in self.indices(index)])
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def scalar(self, tensor: Tensor) -> bool | int | float:
        """The value of a tensor of one number, or a value that the step goes on with."""
        value = self.value_of(tensor)
        if value is not None:
            with unset_fake_temporarily():
                known: bool | int | float = value.item()
                return known
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else LARGE

    def indices(self, index: Tensor | None) -> Iterator[Tensor | None]:
        """Those of an indexed dimension; a mask becomes the indices of its true values, of all that
        there are where these are not known.
        """
        if index is None or index.dtype != torch.bool:
            yield index
            return
        value, count = self.value_of(index), index.numel()
        if value is not None:
            with unset_fake_temporarily():
                count = int(value.sum())
        for _ in range(index.ndim):
            made = torch.empty(count, dtype=torch.int64, device=index.device)
            self.add(made)
            yield made

    def all_known(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the operation only reads tensors whose values are known."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = bool(given) and all(self.value_of(tensor) is not None for tensor in given)
        returns = [str(one.type) for one in func._schema.returns]
        return known and returns == ["Tensor"] and not func._schema.is_mutable

    def with_values(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Run it with the values; the result is fake, and its values are known."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device") or given[0].device
        args, kwargs = tree_map_only(Tensor, self.value_of, (args, dict(kwargs)))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        with unset_fake_temporarily():
            value = func(*args, **kwargs)
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        self.values[result] = value
        return result


def fake_copy(module: Pretraining, device: torch.device) -> Pretraining:
    """A copy of fake tensors on a device, that takes steps without a trainer, as in the middle of a
    run; under a `FakeTensorMode`.
    """
    memo: dict[int, Any] = {}
    for network in networks_of(module):
        for parameter in network.parameters():
            like = torch.empty_like(parameter, device=device)
            memo[id(parameter)] = nn.Parameter(like, parameter.requires_grad)
        for buffer in network.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device=device)
    fake_mode: Any = torch._guards.detect_fake_mode()
    with FakeCopyMode(fake_mode):
        made = copy.deepcopy(module, memo)
    optimizer = made.configure_optimizers()
    middle = getattr(module.schedules.lr, "total_steps", 0) // 2
    stand_in: Any = made
    stand_in._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=middle)
    stand_in._device = device
    stand_in.optimizers = lambda: optimizer
    stand_in.manual_backward = lambda loss: loss.backward()
    made.on_train_start()
    return made


def networks_of(module: Pretraining) -> list[nn.Module]:
    """The module, and networks that are in no module, as frozen teachers are."""
    frozen = [
        value.network
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, FrozenNetwork)
    ]
    return [module, *frozen]


def step_memory(
    module: Pretraining,
    views: Sequence[Shape],
    device: torch.device,
    precision: str,
    world_size: int = 1,
) -> StepMemory:
    """The peak of a step with these shapes of views (V, B, channels, h, w) on each device. Takes
    seconds to a minute: some ten thousand operations are followed.
    """
    meter = FakeStep(device.type)
    low = torch.autocast(
        device.type, torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False
    )
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        made = fake_copy(module, device)
    with fake_mode, meter:
        for network in networks_of(made):
            for tensor in (*network.parameters(), *network.buffers()):
                meter.add(tensor)
        networks = meter.now
        optimizer: Any = made.optimizers()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        moments = meter.now - networks
        batch = [  # channels last, as the data come
            torch.empty(V, B, h, w, C, device=device).permute(0, 1, 4, 2, 3)
            for V, B, C, h, w in views
        ]
        images = meter.now - networks - moments
        meter.peak = meter.now
        with low:
            made.step(batch)
        rest = meter.peak - networks - moments - images
        if world_size > 1:  # DDP's buckets are a second copy of the gradients
            rest += sum(p.numel() * p.element_size() for p in trained)
        return StepMemory(networks, moments, images, rest)


def view_shapes(augment: Any, batch_size: int, channels: int) -> list[Shape]:
    """Shapes of the views of a step, a resolution each; of the stage with the most pixels."""
    recipes = [augment, *(recipe for _, recipe in getattr(augment, "parts", ()))]
    largest = max(recipes, key=pixels_of)
    sizes = ((2, largest.global_size), (largest.num_local, largest.local_size))
    return [(V, batch_size, channels, size, size) for V, size in sizes if V]


def pixels_of(recipe: Any) -> int:
    """Of all crops of an image."""
    return int(2 * recipe.global_size**2 + recipe.num_local * recipe.local_size**2)


def checkpoint_bytes(module: Pretraining, memory: StepMemory) -> int:
    """Size of a checkpoint, to a few percent: networks, the objective's state and moments."""
    state = module.state_dict().values()
    return memory.optimizer + sum(math.prod(t.shape) * t.element_size() for t in state)
