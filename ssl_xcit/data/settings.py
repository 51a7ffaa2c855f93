"""The settings of the `data` group, which several commands have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from ssl_xcit.utils.validation import FREE, LINKED, REST, Node, Share


@dataclass(frozen=True)
class SourceSettings:
    """`conf/data/`: where images come from."""

    source: Node
    options: Annotated[Mapping[str, Any], REST, LINKED]  # the other keys, which `source` refers to
    # root and download of a named set, which `eval_data` of the same set takes
    sets: Annotated[Mapping[str, Any], FREE] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSettings(SourceSettings):
    """Likewise, and which share of them may be bad."""

    max_bad_fraction: Annotated[Share, FREE]
