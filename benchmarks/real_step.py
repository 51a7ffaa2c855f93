"""The real training step by the words of a command line, on random pixels, without the trainer."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

from ssl_xcit.data.picture import RGB
from ssl_xcit.training.build import accelerate_, make_module
from ssl_xcit.training.module import Pretraining
from ssl_xcit.training.plan import make_plan
from ssl_xcit.training.settings import PretrainSettings
from ssl_xcit.training.step_memory import StepMemory, step_memory, view_shapes
from ssl_xcit.utils.hardware import precision_for
from ssl_xcit.utils.validation import parse

IMAGES, STEPS = 2_000, 2_000  # of the run that the step is from


def composed(words: Sequence[str]) -> tuple[PretrainSettings, Pretraining]:
    """Settings, and the networks of a run of `STEPS` steps."""
    with initialize_config_module("ssl_xcit.conf", version_base="1.3"):
        cfg = compose("pretrain", list(words))
    cfg.epochs = STEPS * cfg.batch_size / IMAGES
    settings = parse(PretrainSettings, cfg)
    return settings, make_module(settings, make_plan(settings, IMAGES, 1), RGB)


def shapes(settings: PretrainSettings) -> list[Sequence[int]]:
    """Shapes of the views of a step."""
    return view_shapes(instantiate(settings.augment), settings.batch_size, RGB.channels)


def step_of(
    words: Sequence[str], device: str = "cpu", views: list[Tensor] | None = None
) -> Callable[[], Any]:
    """A step as in the middle of a run, on these views or on random pixels."""
    settings, module = composed(words)
    module.to(device)
    accelerate_(module, settings.compile)
    optimizer = module.configure_optimizers()
    alone: Any = SimpleNamespace(world_size=1, global_rank=0, global_step=STEPS // 2)
    module._trainer = alone
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()
    module.on_train_start()
    generator = torch.Generator().manual_seed(0)
    views = views or [
        torch.randn(V, B, h, w, C, generator=generator).permute(0, 1, 4, 2, 3).to(device)
        for V, B, C, h, w in shapes(settings)
    ]
    low = precision(settings, device) == "bf16-mixed"

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False):
            return module.step(views)

    return step


def precision(settings: PretrainSettings, device: str) -> str:
    """Lightning's name of it on this device."""
    return precision_for(settings.trainer.precision, on_cpu=device == "cpu")


def expected(words: Sequence[str], device: str = "cpu") -> StepMemory:
    """What `ssl-xcit pretrain plan=true` expects of such a step."""
    settings, module = composed(words)
    accelerate_(module, settings.compile)
    low = precision(settings, device)
    return step_memory(module, shapes(settings), torch.device(device), low)
