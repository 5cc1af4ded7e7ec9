"""Groups of tokens, determinants and directions: equal to slow twins that walk token by token, ties and empty groups
included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duet_vlm.ops import greedy, groups

many = settings(max_examples=80, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def table(seed: int, batch: int = 3, tokens: int = 14, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of few values, so that ties abound, groups of which some are empty, and ragged rows."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(1, 6, (batch, tokens), generator=draw) / 8
    group = torch.randint(0, count, (batch, tokens), generator=draw)
    valid = torch.rand(batch, tokens, generator=draw) < 0.8
    valid[:, 0] = True
    return scores, group, valid


def by_rank(scores: Tensor, members: list[int]) -> list[int]:
    return sorted(members, key=lambda i: (-float(scores[i]), i))


@many
@given(seeds)
def test_ranks_and_sums_of_groups(seed: int) -> None:
    scores, group, valid = table(seed)
    found, sums = groups.ranks_in_groups(scores, group, valid), groups.sums_of_groups(scores, group, valid, 4)
    for row in range(len(scores)):
        for number in range(4):
            members = [i for i in range(14) if valid[row, i] and group[row, i] == number]
            for rank, token in enumerate(by_rank(scores[row], members)):
                assert int(found[row, token]) == rank
            assert float(sums[row, number]) == pytest.approx(sum(float(scores[row, i]) for i in members))


def slow_shares(weight: list[float], size: list[int], total: int) -> list[int]:
    """Fill groups that would get more than they have, then largest remainders: in exact steps."""
    open_ = [i for i, n in enumerate(size) if n]
    most = max((weight[i] for i in open_), default=0)
    weight = [max(weight[i] / most, 1e-6) if most > 0 else float(size[i]) for i in range(len(size))]
    total, share = min(total, sum(size)), [0.0] * len(size)
    left = float(total)
    while open_:
        level = left / sum(weight[i] for i in open_)
        full = [i for i in open_ if weight[i] * level >= size[i] - 1e-5 * size[i]]
        if not full:
            for i in open_:
                share[i] = weight[i] * level
            break
        for i in full:
            share[i], left = float(size[i]), left - size[i]
        open_ = [i for i in open_ if i not in full]
    whole = [math.floor(s + 1e-4) for s in share]
    order = sorted((i for i in range(len(size)) if whole[i] < size[i]), key=lambda i: (-(share[i] - whole[i]), i))
    for i in order[: total - sum(whole)]:
        whole[i] += 1
    return whole


@many
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=6), st.integers(0, 40))
def test_shares_are_exact(rows: list[tuple[int, int]], total: int) -> None:
    weight, size = ([row[i] for row in rows] for i in (0, 1))
    found = groups.proportional_shares(torch.tensor([weight]).float(), torch.tensor([size]), torch.tensor([total]))[
        0
    ].tolist()
    assert sum(found) == min(total, sum(size)) and all(0 <= n <= most for n, most in zip(found, size, strict=True))
    slow = slow_shares([float(w) for w in weight], size, total)
    assert all(abs(a - b) <= 1 for a, b in zip(found, slow, strict=True))  # remainders that are equal but for rounding
    exact = [total * w / max(1, sum(weight)) for w in weight]
    # nobody is full: plain largest remainders
    if sum(weight) and all(w and share < n for w, share, n in zip(weight, exact, size, strict=True)):
        assert all(abs(a - b) < 1 for a, b in zip(found, exact, strict=True))


@many
@given(seeds, st.integers(0, 14))
def test_the_best_of_each_group(seed: int, count: int) -> None:
    scores, group, valid = table(seed)
    quota = torch.randint(0, 4, (3, 4), generator=torch.Generator().manual_seed(seed))
    counts = torch.minimum(torch.tensor([count, 3, 6]), valid.sum(1))
    found = groups.top_of_groups(scores, group, valid, quota, counts)
    for row in range(3):
        rank = {}
        for number in range(4):
            members = [i for i in range(14) if valid[row, i] and group[row, i] == number]
            rank |= {
                token: max(-1, place - int(quota[row, number]))
                for place, token in enumerate(by_rank(scores[row], members))
            }
        wanted = sorted(rank, key=lambda i: (rank[i], -float(scores[row, i]), i))[: int(counts[row])]
        assert found[row].nonzero().flatten().tolist() == sorted(wanted)


@many
@given(seeds, st.integers(1, 4))
def test_no_group_gives_more_than_its_limit(seed: int, limit: int) -> None:
    scores, group, valid = table(seed)
    found = groups.top_with_limit(scores, group, valid, torch.tensor([limit, 1, 3]), torch.tensor([6, 6, 6]))
    for row, most in enumerate((limit, 1, 3)):
        taken: list[int] = []
        for token in by_rank(scores[row], valid[row].nonzero().flatten().tolist()):
            if len(taken) < 6 and sum(int(group[row, i]) == int(group[row, token]) for i in taken) < most:
                taken.append(token)
        assert found[row].nonzero().flatten().tolist() == sorted(taken)


@pytest.mark.parametrize(("rows", "columns", "side"), [(24, 24, 6), (13, 18, 4), (3, 9, 4), (1, 1, 6)])
def test_windows_of_a_grid(rows: int, columns: int, side: int) -> None:
    """Left-over rows and columns belong to the last window; a second part has windows of its own."""
    place = torch.tensor([(y, x) for _ in range(2) for y in range(rows) for x in range(columns)])[None]
    parts = torch.arange(2).repeat_interleave(rows * columns)[None]
    number, count = groups.window_numbers(place, torch.tensor([[rows, columns]]), parts, side, 2)
    high, wide = max(1, rows // side), max(1, columns // side)
    window = [min(y // side, high - 1) * wide + min(x // side, wide - 1) for y in range(rows) for x in range(columns)]
    expected = [*window, *(high * wide + each for each in window)]
    assert number[0].tolist() == expected and count.tolist() == [2 * high * wide]


@many
@given(seeds, st.integers(1, 6))
def test_suppression_within_groups(seed: int, steps: int) -> None:
    scores, group, valid = table(seed)
    likeness = torch.randint(0, 5, (3, 14, 14), generator=torch.Generator().manual_seed(seed)).float()
    likeness = torch.maximum(likeness, likeness.transpose(1, 2))
    threshold = torch.tensor([2.5, 3.5, 1.5])
    found = groups.survivors(likeness, scores, group, valid, threshold, 4, steps)
    for row in range(3):
        expected = [steps] * 14
        for number in range(4):
            alive = [i for i in range(14) if valid[row, i] and group[row, i] == number]
            for step in range(steps):
                if alive:
                    best = by_rank(scores[row], alive)[0]
                    expected[best] = step
                    alive = [i for i in alive if i != best and likeness[row, best, i] <= threshold[row]]
        assert found[row].tolist() == expected


# ---- greedy choices


def slow_map(kernel: Tensor, tokens: list[int], count: int) -> list[int]:
    """The determinant itself, in float64, for every candidate."""
    kernel, chosen = kernel.double(), []
    for _ in range(count):
        rest = [i for i in tokens if i not in chosen]
        volume = [float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest]
        chosen.append(rest[max(range(len(rest)), key=lambda j: (volume[j], -rest[j]))])
    return chosen


@many
@given(seeds, st.integers(0, 6))
def test_the_largest_determinant(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(2, 9, 12, generator=draw), torch.rand(2, 9, generator=draw) + 0.1
    valid = torch.tensor([[True] * 9, [True] * 7 + [False] * 2])
    kernel = weight[:, :, None] * greedy.cosine(rows, valid) * weight[:, None]
    found = greedy.greedy_dpp_map(kernel, valid, torch.tensor([count, min(count, 3)]), count)
    for row, n in enumerate((count, min(count, 3))):
        assert found[row].nonzero().flatten().tolist() == sorted(
            slow_map(kernel[row], valid[row].nonzero().flatten().tolist(), n)
        )


def test_more_picks_than_the_rank_are_still_that_many() -> None:
    """Of features of rank 3 the first three picks span all; the others are the lowest, none twice, nothing is NaN."""
    rows = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    kernel = greedy.cosine(rows, torch.ones(1, 20, dtype=torch.bool))
    found = greedy.greedy_dpp_map(kernel, torch.ones(1, 20, dtype=torch.bool), torch.tensor([12]), 12)
    assert int(found.sum()) == 12
    first = set(slow_map(kernel[0], list(range(20)), 3))
    assert set(found[0].nonzero().flatten().tolist()) == first | set([i for i in range(20) if i not in first][:9])


def test_orthogonal_tokens_are_chosen_by_their_weight() -> None:
    weight = torch.tensor([[0.3, 0.9, 0.1, 0.9, 0.5]])
    kernel = torch.diag_embed(weight.square())
    found = greedy.greedy_dpp_map(kernel, torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), 2)
    assert found[0].nonzero().flatten().tolist() == [1, 3]


@many
@given(seeds, st.integers(0, 8))
def test_weight_and_distance_from_the_chosen(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(2, 10, 6, generator=draw), torch.randint(0, 4, (2, 10), generator=draw) / 3
    valid = torch.tensor([[True] * 10, [False] * 2 + [True] * 8])
    likeness = greedy.cosine(rows, valid)
    found = greedy.pairwise_distance(likeness, weight, valid, torch.tensor([count, min(count, 5)]), count)
    for row, n in enumerate((count, min(count, 5))):
        chosen: list[int] = []
        for _ in range(n):
            rest = [i for i in valid[row].nonzero().flatten().tolist() if i not in chosen]
            gain = {
                i: weight[row, i] * (1 - max((likeness[row, i, j] for j in chosen), default=torch.tensor(0.0)))
                for i in rest
            }
            chosen.append(max(rest, key=lambda i: (float(gain[i]), -i)))
        assert found[row].nonzero().flatten().tolist() == sorted(chosen)


# ---- directions


def spectral(seed: int, tokens: int, channels: int, values: list[float]) -> Tensor:
    """Tokens whose covariance over channels has these eigenvalues, far apart."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(tokens, len(values), generator=draw)).Q
    right = torch.randn(channels, len(values), generator=draw)
    right = torch.linalg.qr(right - right.mean(0)).Q
    return left @ torch.diag(torch.tensor(values).sqrt()) @ right.T


@pytest.mark.parametrize("count", [1, 3])
def test_principal_directions_are_eigenvectors(count: int) -> None:
    rows = spectral(1, 12, 30, [81.0, 27.0, 9.0, 3.0, 1.0])[None]
    found = groups.principal(rows, torch.ones(1, 12, dtype=torch.bool), torch.tensor([count]), count, rounds=40)
    centred = rows[0].double() - rows[0].double().mean(-1, keepdim=True)
    _, vectors = torch.linalg.eigh(centred @ centred.T)
    expected = vectors.flip(1)[:, :count].abs().float()
    torch.testing.assert_close(found[0].abs(), expected, rtol=1e-3, atol=1e-3)


def test_principal_directions_do_not_depend_on_the_batch() -> None:
    one, two = spectral(2, 12, 30, [50.0, 20.0, 8.0, 2.0]), spectral(3, 8, 30, [60.0, 15.0, 4.0, 1.0])
    padded = torch.zeros(2, 12, 30)
    padded[0], padded[1, :8] = one, two
    padded[1, 8:] = 7.0  # whatever stands in padding
    valid = torch.arange(12) < torch.tensor([[12], [8]])
    found = groups.principal(padded, valid, torch.tensor([4, 2]), 4)
    alone: Any = groups.principal(two[None], torch.ones(1, 8, dtype=torch.bool), torch.tensor([2]), 2)
    torch.testing.assert_close(found[1, :8, :2].abs(), alone[0].abs(), rtol=1e-4, atol=1e-5)
    assert not found[1, 8:].any() and not found[1, :, 2:].any()
