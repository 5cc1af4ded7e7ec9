"""Time, measured in pairs: everything that is compared runs in the same minutes on the same machine, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PairedTiming:
    """Seconds of one function, one entry per round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """25th and 75th percentile."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Ratio:
    """The median of per-round ratios with its 95 % interval (order statistics; no assumption on the distribution)."""

    median: float
    low: float
    high: float


def time_paired(
    functions: dict[str, Callable[[], Any]],
    repeats: int = 20,
    warmup: int = 3,
    around: dict[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, PairedTiming]:
    """Time functions in turns: A B C, C B A, A B C, ...

    Slow drifts of the machine (clock, neighbours) then hit all of them alike, and reversing every other round cancels
    the effect of the order in the round.

    Parameters
    ----------
    functions : dict of str to callable
        Functions by name; set-up belongs outside.
    repeats : int
        Measured rounds.
    warmup : int
        Rounds that run first and are not measured.
    around : dict of str to callable, optional
        Makes the context in which a function runs; entering and leaving it are not timed.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} must be at least 1 and warmup={warmup} at least 0")
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            with around[name]() if around and name in around else nullcontext():
                _finish()
                start = time.perf_counter()
                functions[name]()
                _finish()
                elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return {name: PairedTiming(tuple(values)) for name, values in seconds.items()}


def ratio(first: PairedTiming, second: PairedTiming) -> Ratio:
    """Time of ``first`` over time of ``second``, round by round; both from the same ``time_paired`` call."""
    if len(first.seconds) != len(second.seconds):
        raise ValueError(
            f"{len(first.seconds)} rounds against {len(second.seconds)}: both timings must come from the same "
            "time_paired() call"
        )
    ratios = sorted(a / b for a, b in zip(first.seconds, second.seconds, strict=True))
    below = _outside(len(ratios))
    return Ratio(statistics.median(ratios), ratios[below], ratios[-1 - below])


def _outside(n: int) -> int:
    """Number of the ``n`` sorted values to cut at either end so that the rest covers the median with 95 % (under 6
    values: none)."""
    below, tail = 0, 1 / 2**n
    while tail + math.comb(n, below + 1) / 2**n <= 0.025:
        below += 1
        tail += math.comb(n, below) / 2**n
    return below


def _finish() -> None:
    """Wait for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
