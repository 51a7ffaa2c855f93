"""The settings of the `data` group, which several commands have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from ssl_xcit.utils.validation import FREE, REST, Node, Share


@dataclass(frozen=True)
class DataSettings:
    """`conf/data/`: where images come from, and how many of them may be bad.

    Args:
        source: the images.
        max_bad_fraction: share of them that may be bad.
        options: the other keys, which `source` refers to.
        sets: root and download of a named set, which `eval_data` of the same set takes.
    """

    source: Node
    max_bad_fraction: Annotated[Share, FREE]
    options: Annotated[Mapping[str, Any], REST]
    sets: Annotated[Mapping[str, Any], FREE] = field(default_factory=dict)
