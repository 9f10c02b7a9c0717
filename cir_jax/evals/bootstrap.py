"""Confidence intervals and paired tests over problems, by resampling them.

A problem is the unit: samples of one problem are not independent. Every resample is a function of
a fixed seed, so that equal results have equal intervals.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile
intervals); for two systems on the same items, Koehn, EMNLP 2004 (W04-3250).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000
# Numbers that are drawn at a time.
_AT_ONCE = 2_000_000
_SEED = 0
# Problems up to which all sign patterns are counted.
_EXACT = 12


class Interval(NamedTuple):
    """A mean over problems, and the 2.5 % and 97.5 % quantiles of resampled means."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """What one setting has more than another on the same problems.

    p_value: two-sided, by flipping signs of problems' differences. p_mcnemar: McNemar's exact one,
    which is the same test where each problem is right or wrong as a whole; else None.
    """

    difference: Interval
    p_value: float
    p_mcnemar: float | None


def resampled(values: np.ndarray, stream: int = 0) -> np.ndarray:
    """Means of 10,000 resamples, with replacement, of the values [P] of problems.

    stream: numbers independent ones.
    """
    rng = np.random.default_rng([_SEED, stream])
    step = max(1, _AT_ONCE // len(values))
    parts = []
    for start in range(0, _RESAMPLES, step):
        shape = (min(step, _RESAMPLES - start), len(values))
        parts.append(values[rng.integers(0, len(values), shape)].mean(axis=1))
    return np.concatenate(parts)


def interval(per_problem: Sequence[float]) -> Interval:
    """Of each problem's mean over its samples: AVG@n with its 95 % interval.

    Raises ValueError for no problems.
    """
    values = np.asarray(per_problem, np.float64)
    if not len(values):
        raise ValueError("no problems: there is no mean")
    return _interval(values.mean(), resampled(values))


def mean_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """Of the mean over benchmarks, each resampled apart: the papers' average of their columns."""
    arrays = [np.asarray(group, np.float64) for group in groups]
    means = np.mean([resampled(values, n) for n, values in enumerate(arrays)], axis=0)
    return _interval(np.mean([values.mean() for values in arrays]), means)


def _interval(mean: float, means: np.ndarray) -> Interval:
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))


def paired(one: Sequence[float], other: Sequence[float]) -> Paired:
    """`one` less `other`, means of the same problems in the same order."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} problems: must be the same ones")
    is_whole = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    return Paired(
        _interval((a - b).mean(), resampled(a - b)),
        sign_flips(a - b),
        mcnemar(int((a > b).sum()), int((b > a).sum())) if is_whole else None,
    )


def sign_flips(differences: np.ndarray) -> float:
    """Share of sign patterns whose mean is at least as far from 0 as the one that was found.

    Of up to 12 problems all patterns are counted; of more 10,000 are drawn, and the one that was
    found is one of them.
    Source: Fisher, The Design of Experiments, 1935, section 21 (paired randomisation test).
    """
    moved = differences[differences != 0]
    if len(moved) <= _EXACT:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
    else:
        drawn = np.random.default_rng(_SEED).integers(0, 2, (_RESAMPLES - 1, len(moved)))
        signs = np.concatenate([np.ones((1, len(moved)), int), 1 - 2 * drawn])
    sums = np.abs(signs @ moved)
    return float(np.mean(sums >= abs(moved.sum()) - 1e-9))


def mcnemar(only_one: int, only_other: int) -> float:
    """Exact two-sided p-value of the problems that only one of two settings has right.

    Each of them is a fair coin if the settings are equal.
    Source: McNemar, Psychometrika 12 (1947); exact binomial form.
    """
    total = only_one + only_other
    tail = sum(math.comb(total, i) for i in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**total)
