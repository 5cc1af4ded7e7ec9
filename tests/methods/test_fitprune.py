"""FitPrune: products of cross and self attention, released tables, fitting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_views import decoder_view

import duet_vlm
from duet_vlm.methods.decoder.fitprune import FitPrune
from duet_vlm.ops.fitting import counts_after_layers, fitted


def test_fitprune_keeps_the_largest_products() -> None:
    draw = torch.Generator().manual_seed(1)
    shown = decoder_view([9, 5], [4, 2], seed=2)
    shown = replace(
        shown, scores=torch.rand(2, 9, generator=draw), visual_self_attention=torch.rand(2, 9, generator=draw)
    )
    mask = FitPrune(schedule=((1, 4),)).prune_tokens(shown)
    for b, (n, k) in enumerate(shown.host_counts):
        products = [
            c * s
            for c, s in zip(shown.scores[b, :n].tolist(), shown.visual_self_attention[b, :n].tolist(), strict=True)
        ]
        assert set(mask[b].nonzero().flatten().tolist()) == set(sorted(range(n), key=lambda i: -products[i])[:k])


@pytest.mark.parametrize(("reduction", "mean"), [(10, 541), (40, 362), (55, 274), (60, 245), (90, 73)])
def test_fitprune_released_tables(reduction: int, mean: int) -> None:
    """Mean tokens that enter attention, of 576; a budget of as many finds the same line of the table."""
    counts = FitPrune.official(reduction).plan(576, 32, None).counts
    assert round(sum(counts) / 32) == mean
    assert FitPrune().plan(576, 32, sum(counts) / 32 / 576 + 1e-9).counts == counts
    assert FitPrune.official(reduction, 6).plan(576, 6, None).counts == counts[:6]


@pytest.mark.parametrize("depth", [4, 8, 28, 32, 40])
def test_fitprune_budgets_between_the_lines(depth: int) -> None:
    for tokens in (64, 576, 1000):
        before = None
        for percent in range(99, int(100 / depth) + 1, -7):
            counts = FitPrune().plan(tokens, depth, percent / 100).counts
            assert percent / 100 * tokens - 1 < sum(counts) / depth <= percent / 100 * tokens + 1e-9
            assert before is None or all(a >= b for a, b in zip(before, counts, strict=True))
            before = counts
    with pytest.raises(duet_vlm.BudgetError, match="first layer runs at full width"):
        FitPrune().plan(576, depth, 0.5 / depth)


def slow_left(cross: list[list[float]], own: list[list[float]], part: float) -> list[int]:
    alive, counts = set(range(len(cross[0]))), [len(cross[0])]
    for layer in range(len(cross)):
        leaves = []
        for received in (cross[layer], own[layer]):
            gone: list[int] = []
            for token in sorted(alive, key=lambda t: (received[t], t)):
                if sum(received[t] for t in alive if t not in (*gone, token)) < (1 - part) * sum(received):
                    break
                gone.append(token)
            leaves.append(set(gone))
        alive -= leaves[0] & leaves[1]
        counts.append(len(alive))
    return counts


@pytest.mark.parametrize("part", [0.05, 0.2, 0.5])
def test_fitting_equals_loops(part: float) -> None:
    draw = torch.Generator().manual_seed(3)
    cross, own = (torch.rand(4, 17, generator=draw, dtype=torch.float64) ** 3 for _ in range(2))
    found = counts_after_layers(cross, own, part)
    assert found == slow_left(cross.tolist(), own.tolist(), part) and found[-1] < 17


def test_fitting_meets_its_share() -> None:
    draw = torch.Generator().manual_seed(4)
    pictures = [tuple(torch.rand(2, 7, n, generator=draw)) for n in (30, 50)]
    for share in (0.8, 0.4):
        curve = fitted(pictures, share)  # type: ignore[arg-type]
        assert len(curve) == 8 and curve[0] == 1 and curve == sorted(curve, reverse=True)
        assert share - 0.1 < sum(curve) / 8 <= share
