"""What a person writes on the command line, as evaluators take it: Hydra does not check types."""

import math
from collections.abc import Sequence
from typing import Any

from ssl_xcit.errors import UserError


def number(
    name: str, value: Any, kind: type = float, low: float | None = None, high: float = math.inf
) -> Any:
    """A number as it is.

    Args:
        name: of the setting, for a message.
        value: as it was given.
        kind: int or float.
        low: the least; None: above 0.
        high: above the most; a float is below it.

    Raises:
        UserError: another kind, or out of the range.
    """
    right_kind = type(value) is int or (kind is float and type(value) is float)
    good = right_kind and math.isfinite(value)
    if not good or value >= high or not (value > 0 if low is None else value >= low):
        what = "a whole number" if kind is int else "a number"
        bound = "above 0" if low is None else f"from {low:g}"
        bound += f", below {high:g}" if high < math.inf else ""
        raise UserError(f"{name}={value}: {what} {bound}")
    return value


def switch(name: str, value: Any) -> bool:
    """True or false; raises UserError."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value}: true or false")
    return value


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
    good = [g and (kind is str or math.isfinite(v)) for g, v in zip(good, found, strict=True)]
    if kind is not str and all(good):
        good = [v > 0 if low is None else v >= low for v in found]
    if not found or not all(good):
        bound = "" if kind is str else " above 0" if low is None else f" from {low:g}"
        raise UserError(f"{name}={values}: {what}{bound}, at least one")
    return found
