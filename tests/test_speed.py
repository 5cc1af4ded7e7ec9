"""Paired timing: order of the rounds, medians, intervals."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import pytest

from duet_vlm.profiling.timing import PairedTiming, ratio, time_paired


def test_rounds_are_interleaved_and_reversed_in_turn() -> None:
    calls: list[str] = []
    timings = time_paired({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert "".join(calls) == "baabbaab"  # one round to warm up, then ab, ba, ab
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 3, "b": 3}


def test_a_longer_function_takes_longer() -> None:
    timings = time_paired({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=5)
    found = ratio(timings["long"], timings["short"])
    assert 1 < found.low <= found.median <= found.high


def test_median_quartiles_ratio() -> None:
    timing = PairedTiming((4.0, 1.0, 2.0, 3.0, 5.0))
    assert timing.median == 3 and timing.quartiles == (2, 4)
    assert PairedTiming((1.0,)).quartiles == (1, 1)
    twice = ratio(PairedTiming(tuple(2.0 * s for s in timing.seconds)), timing)
    assert (twice.median, twice.low, twice.high) == (2, 2, 2)


@pytest.mark.parametrize("n", [1, 5, 6, 9, 15, 25])
def test_interval_covers_the_median_with_95_percent(n: int) -> None:
    """Against the binomial distribution, and no wider than it must be."""
    found = ratio(PairedTiming(tuple(float(i + 1) for i in range(n))), PairedTiming((1.0,) * n))
    below = int(found.low) - 1  # values left out at each end

    def missed(k: int) -> float:
        """Chance that at most k values, or all but k, lie below the true median."""
        return 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    assert found.high == n - below
    assert missed(below) <= 0.05 or (below == 0 and n < 6)
    assert missed(below + 1) > 0.05


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="repeats=0"):
        time_paired({}, repeats=0)
    with pytest.raises(ValueError, match="same time_paired"):
        ratio(PairedTiming((1.0, 2.0)), PairedTiming((1.0,)))


def test_the_context_around_a_function_is_not_timed() -> None:
    inside = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        time.sleep(0.02)
        inside.append(True)
        yield
        inside.pop()
        time.sleep(0.02)

    seen = []
    times = time_paired(
        {"a": lambda: seen.append(bool(inside)), "b": lambda: None}, repeats=3, warmup=1, around={"a": around}
    )
    assert seen == [True] * 4 and not inside
    assert times["a"].median < 0.01
