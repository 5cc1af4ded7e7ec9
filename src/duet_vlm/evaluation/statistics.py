"""Paired statistics over questions: every run answers the same ones. The work is scipy's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 2000
QUANTILE = 1.959963984540054  # of the normal distribution: 95 % lie within
LEVEL_QUANTILE = 1.6448536269514722  # 90 % lie within: two one-sided tests of 5 % each
MARGIN = 0.02  # two accuracies are level if they differ by less


def mean_interval(hits: np.ndarray) -> tuple[float, float]:
    """95 % score interval (Wilson) of an accuracy; ``hits`` [questions] bool."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def kept_interval(hits: np.ndarray, full: np.ndarray) -> tuple[float, float] | None:
    """95 % score interval (Nam and Blackwelder 2002) of the share of the full model's accuracy that is kept; both
    [questions] bool.

    It holds where few answers differ, or none: an effect without trace in 200 questions may exist all the same. None
    where the full model has no right answer.
    """
    both, won, lost = _counts(hits, full)
    if both + lost == 0:
        return None
    some, share = both + won + lost, (both + won) / (both + lost)

    def beyond(ratio: float) -> float:
        """Squared distance from ``ratio``, less what chance gives: its variance under the likeliest shares of which it
        is the ratio."""
        linear = (won + lost) - (both + lost) * (ratio**2 - 1)
        square = (ratio + 1) * some
        # lost, of those that any answers
        likely = (linear + math.sqrt(max(0.0, linear**2 + 4 * square * lost * (ratio - 1)))) / (2 * square)
        return ((both + won) - ratio * (both + lost)) ** 2 - QUANTILE**2 * some * (ratio - 1 + (1 + ratio) * likely)

    far = 2 * share + 1
    while beyond(far) <= 0:
        far *= 2
    return _edge(beyond, share, 0.0), _edge(beyond, share, far)


def difference_interval(hits: np.ndarray, other: np.ndarray, quantile: float = QUANTILE) -> tuple[float, float]:
    """95 % score interval (Tango 1998) of a difference of accuracies on the same questions; both [questions] bool. It
    holds where few answers differ, or none. Another ``quantile`` of the normal distribution makes another one."""
    _, won, lost = _counts(hits, other)
    count = len(hits)

    def beyond(difference: float) -> float:
        """As above, of a difference."""
        linear = (2 * count - won + lost) * difference - won - lost
        root = math.sqrt(max(0.0, linear**2 + 8 * count * lost * difference * (1 - difference)))
        likely = (root - linear) / (4 * count)  # lost, of all
        return (won - lost - count * difference) ** 2 - quantile**2 * count * (
            2 * likely + difference * (1 - difference)
        )

    change = (won - lost) / count
    return _edge(beyond, change, -1.0), _edge(beyond, change, 1.0)


def resampled(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap over questions of a ``statistic`` of paired ``samples`` ([questions], such as means
    over several models), to which no score interval applies. Too narrow where few of them differ; a single question has
    no spread that could be known."""
    from scipy.stats import bootstrap

    if len(samples[0]) < 2:
        value = float(statistic(*(s.astype(float) for s in samples), axis=-1))
        return value, value
    interval = bootstrap(
        tuple(s.astype(np.float32) for s in samples),
        statistic,
        n_resamples=RESAMPLES,
        batch=200,
        paired=len(samples) > 1,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _counts(hits: np.ndarray, other: np.ndarray) -> tuple[int, int, int]:
    """Questions that both answer, only the first, only the other; fractions of answers are refused."""
    if hits.dtype != bool or other.dtype != bool:
        raise TypeError(
            f"give answers as bool, right or wrong, got {hits.dtype} and {other.dtype}; means of several are for resampled()"
        )
    return int((hits & other).sum()), int((hits & ~other).sum()), int((other & ~hits).sum())


def _edge(beyond: Callable[[float], float], start: float, end: float) -> float:
    """The point where ``beyond`` becomes positive on the way from ``start``; ``end`` where it does not."""
    from scipy.optimize import brentq

    near = start + (end - start) * 1e-9  # at the start itself there may be no variance
    if start == end or beyond(end) <= 0:
        return float(end)
    return float(brentq(beyond, near, end, xtol=1e-12))


def sign_test(hits: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Questions that only the first / only the second answers, and the exact McNemar p-value (two-sided binomial)."""
    from scipy.stats import binomtest

    wins, losses = int((hits & ~other).sum()), int((other & ~hits).sum())
    return wins, losses, 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses).pvalue)


def adjusted(p_values: list[float]) -> list[float]:
    """The same p-values held to a false discovery rate (Benjamini-Hochberg), for a table with many rows."""
    from scipy.stats import false_discovery_control

    return [float(p) for p in false_discovery_control(p_values)] if p_values else []


def holm(p_values: list[float]) -> list[float]:
    """The same p-values held to a family-wise error rate (Holm 1979): the chance of any false finding in the table."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    out = np.empty(len(p_values))
    out[order] = np.minimum(np.maximum.accumulate(stepped), 1.0) if len(p_values) else stepped
    return [float(p) for p in out]


def level(hits: np.ndarray, other: np.ndarray, margin: float = MARGIN) -> bool:
    """True if two accuracies on the same questions differ by less than ``margin``, by two one-sided tests of 5 %: the
    90 % score interval of the difference lies within."""
    low, high = difference_interval(hits, other, LEVEL_QUANTILE)
    return -margin < low and high < margin


def falling(values: np.ndarray) -> np.ndarray:
    """The non-increasing sequence that is nearest to ``values`` (isotonic regression, least squares)."""
    from scipy.optimize import isotonic_regression

    return isotonic_regression(values, increasing=False).x
