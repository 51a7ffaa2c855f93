"""Words of messages."""

from collections.abc import Sequence


def first_few(words: Sequence[str]) -> str:
    """The first five, and the number of the others."""
    more = f" and {len(words) - 5:,} more" if len(words) > 5 else ""
    return "; ".join(words[:5]) + more
