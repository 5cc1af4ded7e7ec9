"""Paired statistics over questions: every run answers the same ones. The work is scipy's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 2000


def mean_interval(hits: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of an accuracy; ``hits`` [questions] bool."""
    return _interval((hits,), lambda a, axis: a.mean(axis), seed)


def kept_interval(hits: np.ndarray, full: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % paired bootstrap interval of the share of the full model's accuracy that is kept; both [questions] bool.

    None where the full model gets nothing right.
    """
    if not full.any():
        return None
    return _interval((hits, full), lambda a, b, axis: a.mean(axis) / np.maximum(b.mean(axis), 1e-12), seed)


def difference_interval(hits: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % paired bootstrap interval of a difference of accuracies."""
    return _interval((hits, other), lambda a, b, axis: a.mean(axis) - b.mean(axis), seed)


def sign_test(hits: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Questions that only the first / only the second answers, and the exact McNemar p-value (two-sided binomial)."""
    from scipy.stats import binomtest

    wins, losses = int((hits & ~other).sum()), int((other & ~hits).sum())
    return wins, losses, 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses).pvalue)


def adjusted(p_values: list[float]) -> list[float]:
    """The same p-values held to a false discovery rate (Benjamini-Hochberg), for a table with many rows."""
    from scipy.stats import false_discovery_control

    return [float(p) for p in false_discovery_control(p_values)] if p_values else []


def falling(values: np.ndarray) -> np.ndarray:
    """The sequence without a rise that is nearest to ``values`` (isotonic regression, least squares)."""
    from scipy.optimize import isotonic_regression

    return isotonic_regression(values, increasing=False).x


def _interval(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int) -> tuple[float, float]:
    """Percentile bootstrap over questions; a single question has no spread that could be known."""
    from scipy.stats import bootstrap

    if len(samples[0]) < 2:
        value = float(statistic(*(s.astype(float) for s in samples), axis=-1))
        return value, value
    found = bootstrap(
        tuple(s.astype(np.float32) for s in samples),
        statistic,
        n_resamples=RESAMPLES,
        batch=200,
        paired=len(samples) > 1,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
