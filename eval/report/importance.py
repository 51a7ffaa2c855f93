"""Hyper-parameter importance: variance-based, from partial dependence (Greenwell et al.,
arXiv:1805.04755) of a random forest fitted to the trials.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from sklearn.ensemble import RandomForestRegressor

MIN_TRIALS = 4  # below, a forest says nothing
TREES = 128


def as_columns(values: Sequence[str]) -> Float[np.ndarray, "trials columns"]:
    """Numbers, as logarithms where they span orders of magnitude; words in a column each."""
    try:
        numbers = np.array([float(v) for v in values])
    except ValueError:
        words = sorted(set(values))
        return np.array([[float(v == word) for word in words] for v in values])
    if (numbers > 0).all() and numbers.max() / numbers.min() > 20:
        numbers = np.log(numbers)
    return numbers[:, None]


def importance(settings: Mapping[str, Sequence[str]], results: Sequence[float]) -> dict[str, float]:
    """The share of each setting that varies, all together 1, largest first; nothing where there are
    too few trials, or all are alike.

    Importance of a setting: the standard deviation, over its values, of the forest's mean
    prediction for all trials with the setting at that value.
    """
    columns = {k: as_columns(v) for k, v in settings.items() if len(set(v)) > 1}
    target = np.asarray(results, np.float64)
    if len(target) < MIN_TRIALS or not columns or np.ptp(target) == 0:
        return {}
    features = np.concatenate(list(columns.values()), axis=1)
    forest = RandomForestRegressor(TREES, random_state=0, min_samples_leaf=1).fit(features, target)
    spreads, first = {}, 0
    for key, column in columns.items():
        width = column.shape[1]
        means = []
        for value in np.unique(column, axis=0):
            changed = features.copy()
            changed[:, first : first + width] = value
            means.append(forest.predict(changed).mean())
        spreads[key] = float(np.std(means))
        first += width
    total = sum(spreads.values())
    if total == 0:
        return {}
    return dict(sorted(((k, s / total) for k, s in spreads.items()), key=lambda pair: -pair[1]))
