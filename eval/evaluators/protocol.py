"""What an evaluator and a task are: objects that yield (metric, value) pairs.

They are plain classes: of a dataclass `instantiate` would make settings again.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, runtime_checkable

from annotated_types import Ge, Gt, Lt, MinLen

from ssl_xcit.utils.validation import Words

from ..features.extract import KINDS, FeatureSet, Kind
from ..features.extractor import FeatureExtractor
from .linear_heads import LinearHead

T = TypeVar("T")
OneOrMore = Union[T, Annotated[Sequence[T], MinLen(1)]]  # noqa: UP007  # `k=20`, `k=[10,20]`
Seed = Annotated[int, Ge(0)]
Fraction = Annotated[float, Gt(0), Lt(1)]  # neither none nor all
Kinds = Annotated[OneOrMore[Kind], Words(f"one or more of {', '.join(KINDS)}")]


def as_list(values: Any) -> list[Any]:
    """Values of a setting that is `OneOrMore`."""
    single = isinstance(values, str) or not isinstance(values, Sequence)
    return [values] if single else list(values)


@runtime_checkable
class Measurement(Protocol):
    """What an evaluator or a task leaves behind beside its numbers.

    Attributes:
        chosen: the setting that it chose last, by name; empty where it chooses none.
        head: the classifier that it trained last, where it trains one.
    """

    chosen: Mapping[str, Any] = MappingProxyType({})
    head: LinearHead | None = None


@runtime_checkable
class Evaluator(Measurement, Protocol):
    """Measures features of labelled images that were extracted for all evaluators at once.

    Attributes:
        labels: the kind of labels that it is for, see `ssl_xcit.data.labels.label_kind`.
        kinds: of features that it reads, see `KINDS`.
        on_ranks: several ranks, which all have the features (`FeatureSet.ranks`), share its work
            and call it together; without it the first computes alone.
    """

    labels: Literal["classes", "several", "numbers"] = "classes"
    kinds: Sequence[str] = ("cls",)
    on_ranks: bool = False

    def __call__(self, features: FeatureSet) -> Iterator[tuple[str, float]]:
        """Yield (metric, value); accuracies are in percent, an `Estimate` has an interval."""
        ...


@runtime_checkable
class Task(Measurement, Protocol):
    """Measures a backbone on data of the task's own."""

    def check(self, extractor: FeatureExtractor) -> None:
        """Raise UserError where the task cannot be done with this backbone; the default does
        nothing. Called for every task before anything is measured.
        """

    def __call__(self, extractor: FeatureExtractor) -> Iterator[tuple[str, float]]:
        """Yield (metric, value), as an evaluator does."""
        ...


def kinds_of(evaluators: Mapping[str, Evaluator]) -> list[str]:
    """Kinds of features that several evaluators read."""
    return list(dict.fromkeys(kind for e in evaluators.values() for kind in e.kinds))
