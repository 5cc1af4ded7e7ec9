"""Timing side by side: every comparison runs its sides in turns in one process, and is told as ratios of neighbours, with their spread."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds of every run of one side, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """Ratios of paired runs: their ``median``, ``quartiles``, and the 95 % bootstrap ``interval`` of the median."""

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    pairs: int


def paired(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time ``functions`` in turns, ``repeats`` rounds after ``warmup`` untimed ones; every other round runs them in reverse order.

    Slow drifts of the machine then hit all sides alike, and run i of one side pairs with run i of another. The garbage collector is
    held off while a round runs; work queued on a CUDA device is waited for.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        order = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in order:
            taken = _timed(functions[name])
            if turn >= warmup:
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """How many times as long as ``b`` did ``a`` take: the median over pairs of neighbouring runs."""
    return ratio_of([x / y for x, y in zip(a.seconds, b.seconds, strict=True)])


def ratio_of(values: list[float]) -> Ratio:
    """Median, quartiles and bootstrap interval of paired ratios (any paired figure will do)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    interval = (medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1])
    return Ratio(statistics.median(values), quartiles(values), interval, len(values))


def quartiles(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _timed(function: Callable[[], object]) -> float:
    enabled = gc.isenabled()
    gc.disable()
    try:
        _wait()
        start = time.perf_counter()
        function()
        _wait()
        return time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
