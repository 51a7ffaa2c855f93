"""Hyper-parameter importance: variance-based, from partial dependence (Greenwell et al.,
arXiv:1805.04755) of a random forest fitted to the trials.

scikit-learn's `partial_dependence` takes one column at a time; words need a column each.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

MIN_TRIALS = 4  # below, a forest says nothing
TREES = 128


def as_numbers(values: Sequence[str]) -> Float[np.ndarray, " trials"] | None:
    """Numbers, as logarithms where they span orders of magnitude; None: they are words."""
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    if not np.isfinite(numbers).all():
        return None
    spread = numbers.min() > 0 and numbers.max() / numbers.min() > 20
    return np.log10(numbers) if spread else numbers


def as_columns(values: Sequence[str]) -> Float[np.ndarray, "trials columns"]:
    """Numbers as they are, words in a column each."""
    numbers = as_numbers(values)
    if numbers is not None:
        return numbers[:, None]
    return (np.array(values)[:, None] == np.unique(values)).astype(np.float64)


def importance(settings: Mapping[str, Sequence[str]], results: Sequence[float]) -> dict[str, float]:
    """The share of each setting that varies, all together 1, largest first; nothing where there are
    too few trials, or all are alike.

    Importance of a setting: the standard deviation, over its values, of the forest's mean
    prediction for all trials with the setting at that value.
    """
    columns = {k: as_columns(v) for k, v in settings.items() if len(set(v)) > 1}
    if len(results) < MIN_TRIALS or not columns or np.ptp(results) == 0:
        return {}
    features = np.concatenate(list(columns.values()), axis=1)
    from sklearn.ensemble import RandomForestRegressor  # here: sweeps need it, runs do not

    forest = RandomForestRegressor(TREES, random_state=0).fit(features, results)
    spreads, first = {}, 0
    for key, column in columns.items():
        means = []
        for value in np.unique(column, axis=0):
            changed = features.copy()
            changed[:, first : first + len(value)] = value
            means.append(forest.predict(changed).mean())
        spreads[key] = float(np.std(means))
        first += column.shape[1]
    total = sum(spreads.values())
    order = sorted(spreads, key=lambda key: -spreads[key])
    return {key: spreads[key] / total for key in order} if total else {}
