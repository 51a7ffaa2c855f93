"""The settings of `ssl-xcit pretrain` and `finetune`: what is allowed; those not FREE make another
run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from ssl_xcit.data.settings import DataSettings
from ssl_xcit.errors import UserError
from ssl_xcit.utils.validation import (
    FREE,
    LINKED,
    PLACE,
    REST,
    BatchNormScope,
    Count,
    DropRate,
    Network,
    Node,
    NonNegative,
    Positive,
    Share,
    Text,
    Workers,
    marked,
    marked_parameters,
)


@dataclass(frozen=True)
class OptimSettings:
    """`conf/optim/`."""

    optimizer: Node
    lr: Positive | Literal["auto"]
    lr_scaling: Literal["linear", "sqrt"]
    min_lr: NonNegative
    warmup_start: NonNegative
    warmup_epochs: NonNegative
    max_warmup: Share
    weight_decay: NonNegative
    weight_decay_end: NonNegative


@dataclass(frozen=True)
class InitSettings:
    """Weights to start from."""

    ckpt: Text | None
    needed: bool
    which: Network
    head: Literal["fresh", "kept"]
    freeze_epochs: NonNegative
    max_freeze: Share
    sha256: str | None


@dataclass(frozen=True)
class TrainerSettings:
    """`conf/trainer/`: Lightning's own settings, and how a device computes its share of a batch."""

    accelerator: Annotated[str, FREE]
    devices: Annotated[int | str | Sequence[int], FREE]
    num_nodes: Annotated[Count, FREE]
    strategy: Annotated[Any, FREE]
    accumulate: Count
    batch_norm: BatchNormScope
    gradient_exchange: Literal["float32", "bfloat16"]
    precision: Text
    submit: Annotated[Node | None, FREE]
    options: Annotated[Mapping[str, Any], REST]


@dataclass(frozen=True)
class SearchSettings:
    """`conf/sweep/`."""

    metric: str
    maximize: bool
    retry_failed: bool
    storage: Text | None
    sampler: Node | None
    num_trials: Annotated[int, Ge(0)]
    seed: Annotated[int, Ge(0)]
    pruner: Node | None


@dataclass(frozen=True)
class ResumeSettings:
    """How a run goes on."""

    data: Literal["same", "changed"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every run has, whatever it trains."""

    main: Annotated[str, FREE]
    sweeper: Annotated[str, FREE]
    preprocess: Node
    trainer: TrainerSettings
    callbacks: Annotated[Mapping[str, Node | None], FREE]
    data: DataSettings
    epochs: Positive
    batch_size: Count
    seed: Annotated[int, Ge(0)]
    out: Annotated[Text, FREE]
    name: Annotated[Text | None, FREE]
    num_workers: Annotated[Workers, FREE]
    worker_timeout: Annotated[Positive, FREE]
    max_skipped: Annotated[Count, FREE]
    collective_timeout: Annotated[Positive, FREE]
    run_id: Annotated[Text | None, FREE]
    checkpoint_blocks: Annotated[bool, FREE]
    resume: Annotated[ResumeSettings, FREE]
    # these may be left out by ~
    logger: Annotated[Mapping[str, Any] | None, FREE] = None
    report: Annotated[Node | None, FREE] = None
    sweep: Annotated[SearchSettings | None, FREE] = None
    launcher: Annotated[Node | None, FREE] = None
    # what a recipe has for its own use, such as a table that settings refer to
    helpers: Annotated[Mapping[str, Any], REST, LINKED] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """`conf/pretrain.yaml`."""

    model: Node
    augment: Node
    objective: Node
    optim: OptimSettings
    evaluation: Node
    init: InitSettings
    compile: Annotated[bool | Literal["auto"], FREE]
    max_steps: Count | None
    budget: Text | None
    plan: Annotated[bool, FREE]
    eval_data: Node | None = None  # may be left out by ~
    # a recipe's numbers for whichever objective is chosen, whose yaml reads those that it has
    objective_defaults: Annotated[Mapping[str, float | bool], FREE] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Settings that exclude each other."""
        if self.budget is not None and self.max_steps is not None:
            raise UserError(
                f"budget={self.budget} and max_steps={self.max_steps} both say how long the run "
                "is: set one of them"
            )
        if self.compile is True and self.checkpoint_blocks:
            raise UserError(
                "compile=true and checkpoint_blocks=true: a compiled program decides by itself "
                "what it computes again; set one of them"
            )


@dataclass(frozen=True)
class FinetuneOptimSettings:
    """`optim` of `conf/transfer/`."""

    optimizer: Node
    lr: Positive
    reference_batch: Count | None
    schedule: Node
    warmup_epochs: NonNegative
    max_warmup: Share
    warmup_start: NonNegative
    no_decay: Literal["1d", "norm"]
    layer_decay: Annotated[float, Gt(0), Le(1)]
    clip_norm: Positive | None


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(RunSettings):
    """`conf/finetune.yaml`."""

    transfer: str
    main_metric: Annotated[str, FREE]
    task: Node
    augment: Node
    optim: FinetuneOptimSettings
    ckpt: Text | None
    which: Network
    sha256: str | None
    drop_path: DropRate
    freeze: Literal["none", "head"] | Annotated[int, Ge(0)]
    ema: Annotated[float, Gt(0), Lt(1)] | None
    repeats: Count
    label_fraction: Annotated[float, Gt(0), Le(1)]
    model: Node | None = None
    metric_of_labels: Annotated[Mapping[str, str], FREE] = field(default_factory=dict)


COMMANDS = (PretrainSettings, FinetuneSettings)
FREE_KEYS = (*dict.fromkeys(key for c in COMMANDS for key in marked(c, FREE)), "hydra")
NAMES = frozenset(field.name for c in COMMANDS for field in fields(c))


def place_keys(settings: Any) -> list[str]:
    """Keys that say where images lie, not which they are, as the signatures of the sources and of
    `preprocess` mark them.
    """
    keys = []
    for group in ("data", "eval_data", "preprocess", "objective"):
        for path, node in nodes_in(settings.get(group) or {}, group):
            names = places_of(str(node["_target_"]))
            within = ("data", path) if group == "data" else (path,)
            keys += [f"{place}.{name}" for place in within for name in names]
    return list(dict.fromkeys(keys))


def nodes_in(group: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All nodes with a `_target_` in a group of settings, by their keys."""
    if not isinstance(group, Mapping):
        return
    if "_target_" in group:
        yield key, group
    for name, value in group.items():
        yield from nodes_in(value, f"{key}.{name}")


def places_of(target: str) -> list[str]:
    """Parameters of a source that say where images lie; of a source from elsewhere, which has no
    marks, those that are called as ours are.
    """
    if target.startswith("ssl_xcit."):
        return marked_parameters(target, PLACE)
    ours = ("lists.labelled_lists", "sets.labelled_arrays", "sets.labelled_torchvision")
    return sorted({n for path in ours for n in marked_parameters(f"ssl_xcit.data.{path}", PLACE)})
