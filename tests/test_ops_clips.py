"""Steps of time, windows, density peaks and shares, each against a slow twin of plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import reference_ops
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duet_vlm.methods.video.prunevid import contiguous
from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.merge import merged_rows
from duet_vlm.ops.static_regions import gains
from duet_vlm.ops.video import FrameWindows, VideoTokens, join_windows, split_windows

MANY = settings(max_examples=100, deadline=None, derandomize=True)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@MANY
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 2), st.booleans()
)
def test_rows_find_their_step_and_place(clips: list[tuple[int, int]], shift: int, known: bool) -> None:
    width = shift + max(steps * size for steps, size in clips)
    parts = torch.full((len(clips), width), -1)
    for row, (steps, size) in enumerate(clips):
        parts[row, shift : shift + steps * size] = torch.arange(steps).repeat_interleave(size)
    found = VideoTokens.of(parts, parts >= 0, (max(t for t, _ in clips), max(n for _, n in clips)) if known else None)
    for row, (steps, size) in enumerate(clips):
        assert found.real[row].sum() == steps * size and found.length[row] == steps
        for step, place in itertools.product(range(steps), range(size)):
            number = shift + step * size + place
            assert found.index[row, step, place] == number and found.real[row, step, place]
            assert (found.step[row, number], found.place[row, number]) == (step, place)
    numbers = torch.arange(width).expand(parts.shape)
    assert torch.equal(found.rows(found.grid(numbers))[found.placed], numbers[found.placed])


def shares(total: int, weight: list[float], most: list[int], least: list[int]) -> list[float]:
    """A factor for all, found by trying the points at which a group meets one of its bounds."""
    points = sorted({0.0, *(b / w for w, lo, hi in zip(weight, least, most, strict=True) for b in (lo, hi) if w > 0)})
    for low, high in zip(points, [*points[1:], points[-1] + 1], strict=True):
        free = [i for i, w in enumerate(weight) if w > 0 and least[i] <= low * w + 1e-9 and high * w <= most[i] + 1e-9]
        fixed = sum(min(max(low * weight[i], least[i]), most[i]) for i in range(len(weight)) if i not in free)
        slope = sum(weight[i] for i in free)
        factor = (total - fixed) / slope if slope else low
        if low - 1e-9 <= factor <= high + 1e-9 and abs(fixed + slope * factor - total) < 1e-6:
            return [min(max(factor * w, lo), hi) for w, lo, hi in zip(weight, least, most, strict=True)]
    raise AssertionError("no factor fits")


@MANY
@given(st.data(), st.lists(st.tuples(st.floats(0.1, 4), st.integers(0, 9)), min_size=1, max_size=7), st.booleans())
def test_shares_add_up_and_are_within_one_of_their_exact_value(
    data: st.DataObject, groups: list[tuple[float, int]], some: bool
) -> None:
    weight, most = [w for w, _ in groups], [n for _, n in groups]
    least = [int(some and n > 0) for n in most]
    total = data.draw(st.integers(sum(least), sum(most)))
    found = split_windows(torch.tensor([total]), torch.tensor([weight]), torch.tensor([most]), torch.tensor([least]))[
        0
    ].tolist()
    assert sum(found) == total
    assert all(lo <= n <= hi for lo, n, hi in zip(least, found, most, strict=True))
    exact = shares(total, [w if n else 0.0 for w, n in groups], most, least)
    assert all(abs(n - x) < 1 + 1e-3 for n, x in zip(found, exact, strict=True))


def test_equal_shares_go_to_the_earlier_group_first() -> None:
    assert split_windows(torch.tensor([7]), torch.ones(1, 4), torch.full((1, 4), 5)).tolist() == [[2, 2, 2, 1]]
    assert split_windows(torch.tensor([7]), torch.ones(1, 3), torch.tensor([[1, 9, 9]])).tolist() == [[1, 3, 3]]
    # nobody has a weight
    assert split_windows(torch.tensor([3]), torch.zeros(1, 2), torch.tensor([[2, 2]])).tolist() == [[2, 1]]


def dpc(rows: list[list[float]], count: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Peaks in order and the peak of every row, by loops."""
    width = len(rows[0])
    apart = [[math.dist(a, b) / math.sqrt(width) for b in rows] for a in rows]
    near = min(neighbours, len(rows))
    density = [math.exp(-sum(d * d for d in sorted(line)[:near]) / near) for line in apart]
    farthest = max(map(max, apart))
    score = []
    for i in range(len(rows)):
        denser = [apart[i][j] for j in range(len(rows)) if (density[j], -j) > (density[i], -i)]
        score.append((min(denser) if denser else farthest) * density[i])
    order = sorted(range(len(rows)), key=lambda i: (-score[i], i))[:count]
    return order, [i if i in order else min(order, key=lambda c: apart[i][c]) for i in range(len(rows))]


@MANY
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 10**6))
def test_density_peaks(sizes: list[int], neighbours: int, seed: int) -> None:
    rows = random(seed, len(sizes), max(sizes), 5)
    real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    count = torch.tensor([(size + 1) // 2 for size in sizes])
    chosen, near, place = peaks(rows, real, count, neighbours)
    for i, size in enumerate(sizes):
        order, joins = dpc(rows[i, :size].double().tolist(), int(count[i]), neighbours)
        assert chosen[i].nonzero()[:, 0].tolist() == sorted(order)
        assert near[i, :size].tolist() == joins
        assert [int(place[i, c]) for c in order] == list(range(len(order)))


def test_equal_rows_are_peaks_by_index() -> None:
    chosen, _, _ = peaks(torch.ones(1, 5, 3), torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), 3)
    assert chosen.tolist() == [[True, True, False, False, False]]


def windows_of(windows: FrameWindows, length: int) -> list[int]:
    return [int(n) for n in windows.length[0] if n][: length or None]


@MANY
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_windows_of_the_largest_gain(steps: int, places: int, most: int, seed: int) -> None:
    """All ways to cut a clip are tried; padding behind it changes nothing."""
    alike = random(seed, 1, steps + 1, places) > -0.6
    found = windows_of(gains(alike, torch.tensor([steps]), most), steps)
    assert sum(found) == steps and max(found) <= most

    def gain(cut: list[int]) -> int:
        starts = [sum(cut[:i]) for i in range(len(cut))]
        return sum(int(alike[0, a : a + n - 1].all(0).sum()) * (n - 1) for a, n in zip(starts, cut, strict=True))

    ways = [[]] if not steps else [
        [b - a for a, b in itertools.pairwise((0, *inner, steps))]
        for count in range(steps)
        for inner in itertools.combinations(range(1, steps), count)
    ]  # fmt: skip
    assert gain(found) == max(gain(cut) for cut in ways if max(cut) <= most)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0, 1, 1, 1], [2, 3]),
        ([0, 0, 1, 2, 2], [3, 2]),  # to the left on a tie
        ([0, 0, 1, 0, 0], [5]),  # what has one label in the end is one window
        ([0, 0, 1, 0, 0, 2, 2], [5, 2]),
        # one that goes on to the right comes back with what it joined
        ([0, 0, 1, 1, 1, 1, 0, 0, 2, 1, 1, 1], [2, 4, 6]),
        ([0, 1, 1, 1], [4]),
        ([1, 1, 1, 0, 2, 2], [4, 2]),
        ([1, 1, 0, 2, 2, 2], [2, 4]),
        ([0, 0, 0, 1, 1, 0], [3, 3]),  # shorter than the longest of its label
        ([3], [1]),
    ],
)
def test_labels_become_windows(labels: list[int], expected: list[int]) -> None:
    padded = torch.tensor([[*labels, 0, 0, 0]])
    found = contiguous(padded, torch.tensor([len(labels)]))
    assert windows_of(found, 0) == expected


@MANY
@given(st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_joined_rows_are_weighted_sums(tokens: int, seed: int, twice: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(1, tokens, generator=generator) < 0.6
    times = 2 if twice else 1
    rows = [i for i in range(tokens) if kept[0, i]]
    owner = torch.randint(-1, tokens, (1, times * tokens), generator=generator)
    owner = torch.where((owner >= 0) & kept.gather(1, owner.clamp(min=0)), owner, -1)
    weight, features = torch.rand(1, times * tokens, generator=generator), random(seed, 1, tokens, 3)
    found = merged_rows(features, join_windows(kept, owner, weight, len(rows)))[0]
    for number, row in enumerate(rows):
        here = [i for i in range(times * tokens) if owner[0, i] == row]
        members = [i % tokens for i in here]
        expected = (
            reference_ops.weighed(features[0].tolist(), members, weight[0, here].tolist())
            if here
            else features[0, row].tolist()
        )
        assert found[number].tolist() == pytest.approx(expected, abs=1e-5)
