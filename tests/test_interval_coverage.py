"""How often the 95 % intervals of the library hold the true value: answers are drawn from a known model, again and
again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from duet_vlm.evaluation.statistics import difference_interval, kept_interval, mean_interval
from duet_vlm.evaluation.tune.binomial import lower_bound

DRAWS = 5000
# Questions, and shares of them: both models answer, only the reduced one, only the full one, neither
MODELS = {
    "alike": (200, (0.80, 0.02, 0.03, 0.15)),
    "apart": (100, (0.50, 0.10, 0.20, 0.20)),
    "one wins": (60, (0.60, 0.02, 0.18, 0.20)),
    "hard": (60, (0.20, 0.10, 0.10, 0.60)),
}
ERROR = (0.95 * 0.05 / DRAWS) ** 0.5  # binomial standard error of a coverage, 0.3 %
# Counts are whole numbers, for which the coverage itself waves around 95 % (Wilson's at 60 questions and a share of 0.3
# is 93.4 %).
LOW, HIGH = 0.935 - 3 * ERROR, 0.99

Interval = Callable[[np.ndarray, np.ndarray], tuple[float, float]]
TRUTHS: dict[str, tuple[Interval, Callable[[Any], float]]] = {
    "accuracy": (lambda hits, full: mean_interval(hits), lambda p: p[0] + p[1]),
    "kept": (kept_interval, lambda p: (p[0] + p[1]) / (p[0] + p[2])),  # type: ignore[dict-item]  # something is always right here
    "difference": (difference_interval, lambda p: p[1] - p[2]),
}


def answers(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of the reduced and of the full model, from how many questions are of each of the four kinds; both
    [questions] bool."""
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def coverage(interval: Interval, truth: float, questions: int, shares: tuple[float, ...]) -> float:
    """The share of draws whose interval holds ``truth``. Equal counts have one interval, which is computed once."""
    drawn = np.random.default_rng(0).multinomial(questions, shares, size=DRAWS)
    if interval is TRUTHS["accuracy"][0]:  # knows right and wrong only
        drawn = np.stack((drawn[:, 0] + drawn[:, 1], drawn[:, 0] * 0, drawn[:, 0] * 0, drawn[:, 2] + drawn[:, 3]), 1)
    counts, times = np.unique(drawn, axis=0, return_counts=True)
    edges = np.array([interval(*answers(each)) for each in counts])
    return float(times[(edges[:, 0] <= truth) & (truth <= edges[:, 1])].sum() / DRAWS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TRUTHS)
def test_intervals_hold_the_truth_in_95_of_100_draws(name: str, model: str) -> None:
    (interval, truth), (questions, shares) = TRUTHS[name], MODELS[model]
    assert LOW <= coverage(interval, truth(shares), questions, shares) <= HIGH


def test_the_bound_of_tune_is_exact() -> None:
    """One-sided and conservative: never less than 95 %, at any share."""
    generator = np.random.default_rng(0)
    for kept in (0.8, 0.95, 0.99):
        values, times = np.unique(generator.binomial(150, kept, size=DRAWS), return_counts=True)
        held = times[[lower_bound(int(value), 150) <= kept for value in values]].sum() / DRAWS
        assert held >= 0.95 - 3 * ERROR


def test_an_interval_that_is_too_narrow_is_found_out() -> None:
    """Four fifths of the width hold the truth far less often: the limits above tell the two apart."""

    def narrow(hits: np.ndarray, full: np.ndarray) -> tuple[float, float]:
        low, high = difference_interval(hits, full)
        return low + (high - low) / 10, high - (high - low) / 10

    assert coverage(narrow, -0.1, *MODELS["apart"]) < LOW
