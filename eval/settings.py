"""What a person writes on the command line, as evaluators take it: Hydra does not check types."""

from collections.abc import Sequence
from typing import Any

from ssl_xcit.errors import UserError


def several(name: str, values: Any, kind: type = float, low: float | None = None) -> list[Any]:
    """A list of numbers (or words); one alone is a list of it.

    Args:
        name: of the setting, for a message.
        values: as they were given.
        kind: int, float or str.
        low: the least; None: above 0.

    Raises:
        UserError: there are none, or one is of another kind or too low.
    """
    found = (
        list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    )
    kinds = (int, float) if kind is float else (kind,)
    what = {int: "whole numbers", float: "numbers", str: "words"}[kind]
    good = [isinstance(v, kinds) and not isinstance(v, bool) for v in found]
    if kind is not str and all(good):
        good = [v > 0 if low is None else v >= low for v in found]
    if not found or not all(good):
        bound = "" if kind is str else " above 0" if low is None else f" from {low:g}"
        raise UserError(f"{name}={values}: {what}{bound}, at least one")
    return found
