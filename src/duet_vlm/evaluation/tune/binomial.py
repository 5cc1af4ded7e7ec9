"""Exact statements about a share of kept answers: binomial tails, no approximation. The work is scipy's.

Each question that the full model answers right is one trial: the reduced model's answer is right as well (kept) or not
(lost). Answers that only the reduced model gets right are not set off against losses, so every bound here also holds
for the ratio of the two accuracies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEVEL = 0.05  # a bound holds with 95 %
CHOOSING = 0.25  # share of the questions that choose among the candidates; the others test what was chosen
FEWEST = 24  # questions to choose by, at least


def percent(share: float, digits: int = 4) -> str:
    """A share as a percentage: ``98 %``; with ``digits`` significant digits."""
    return f"{100 * share:.{digits}g} %"


def lower_bound(kept: int, trials: int, level: float = LEVEL) -> float:
    """The one-sided exact lower bound (Clopper and Pearson) of the share that is kept; 0 without questions or without
    kept answers."""
    from scipy.stats import beta

    return float(beta.ppf(level, kept, trials - kept + 1)) if kept else 0.0


def allowed(trials: int, keep: float, level: float = LEVEL) -> int:
    """The largest number of losses among ``trials`` at which the lower bound is ``keep`` or better; -1 if even without
    a loss it is below."""
    from scipy.stats import binom

    losses = -1
    while losses + 1 < trials and binom.cdf(losses + 1, trials, 1 - keep) <= level:
        losses += 1
    return losses


def needed(keep: float, losses: int = 0, level: float = LEVEL) -> int:
    """The fewest questions that allow so many ``losses``."""
    low, high = losses, losses + 1
    while allowed(high, keep, level) < losses:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if allowed(middle, keep, level) >= losses else (middle, high)
    return high


def chance(lost: int, trials: int, keep: float) -> float:
    """Probability of at least ``lost`` losses in ``trials`` if exactly ``keep`` is kept: small where a candidate cannot
    qualify."""
    from scipy.stats import binom

    return float(binom.sf(lost - 1, trials, 1 - keep))


@dataclass(frozen=True)
class QuestionSplit:
    """Questions that choose, questions that test, and the losses that the test allows."""

    choosing: int
    testing: int
    losses: int | None


def split(count: int, keep: float | None) -> QuestionSplit:
    """Split ``count`` usable questions: the test gets as many as the largest number of losses that it may allow needs.

    Raises
    ------
    ValueError
        If they are too few to know ``keep`` with 95 %; says how many more are needed, and for which share they would
        suffice. Without ``keep``, if there are not two: one chooses, another one tests.
    """
    if count < 2 and keep is None:
        raise ValueError(
            f"{_questions(count)} that the full model answers: give at least two, as one chooses and another one tests"
        )
    if keep is None:
        choosing = max(1, min(count - 1, max(FEWEST, round(CHOOSING * count))))
        return QuestionSplit(choosing, count - choosing, None)
    losses, room = 0, min(math.floor((1 - CHOOSING) * count), count - FEWEST)
    while needed(keep, losses + 1) <= room:
        losses += 1
    testing = needed(keep, losses)
    if testing + FEWEST > count:
        reach = math.exp(math.log(LEVEL) / (count - FEWEST)) if count > FEWEST else 0.0
        instead = f", or --keep {math.floor(1000 * reach) / 1000:g}" if reach > 0.5 else ""
        raise ValueError(
            f"{_questions(count)} that the full model answers: too few to know with 95 % that {percent(keep)} of the answers are kept: {testing} "
            f"without a loss show it, and {FEWEST} are needed to choose by; give {testing + FEWEST - count} more{instead}"
        )
    return QuestionSplit(min(count - testing, max(FEWEST, round(CHOOSING * count))), testing, losses)


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"
