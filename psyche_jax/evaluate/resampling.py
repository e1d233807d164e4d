"""Confidence intervals by bootstrap."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
_SEED = 0


def bootstrap_means(values: Sequence[float], groups: Sequence[str], name: str = "") -> np.ndarray:
    """float64 [RESAMPLES]: means of `values` over groups drawn with replacement, as many as there are.

    Values of one group (the questions on one case) are drawn together, since they are not independent. The draws
    depend on `name` and the number of groups alone, so the same scores have the same interval everywhere.
    """
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = np.array([places[group] for group in groups])
    sums = np.bincount(index, np.asarray(values, float))
    counts = np.bincount(index).astype(float)
    random = np.random.default_rng([_SEED, *name.encode()])
    drawn = random.multinomial(len(places), np.full(len(places), 1 / len(places)), RESAMPLES)
    return (drawn @ sums) / (drawn @ counts)


def bootstrap_shares(values: Sequence[float], groups: Sequence[str], name: str = "") -> np.ndarray:
    """`bootstrap_means` of scores from 0 to 1.

    Where all are 0, or all 1, every resample is alike, and the interval would say that the score is certain: there
    the draws are from Jeffreys' posterior of a share, Beta(n·score + 1/2, n·(1 - score) + 1/2) of n groups.
    """
    if (score := values[0]) not in (0, 1) or any(value != score for value in values):
        return bootstrap_means(values, groups, name)
    count = len(set(groups))
    random = np.random.default_rng([_SEED, *name.encode()])
    return random.beta(count * score + 0.5, count * (1 - score) + 0.5, RESAMPLES)


def interval(means: np.ndarray, estimate: float | None = None) -> tuple[float, float]:
    """The 95 % percentile interval of resampled means, which holds the estimate that it is given for.

    The posterior's percentiles leave out a score of exactly 0 or 1; resamples of few groups may leave out others.
    """
    low, high = map(float, np.percentile(means, [2.5, 97.5]))
    return (low, high) if estimate is None else (min(low, estimate), max(high, estimate))
