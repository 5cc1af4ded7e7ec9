"""D2Pruner: importance without the bias of places, then independent sets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_views import decoder_view

from duet_vlm.methods.decoder.d2pruner import D2Pruner
from duet_vlm.ops.graph import greedy_independent, rescaled
from duet_vlm.reducers.calibration import Calibration


def slow_d2pruner(
    relative: list[float], rows: list[list[float]], keep: int, important: float, alike: float
) -> set[int]:
    total = range(len(rows))

    def cosine(a: int, b: int) -> float:
        return sum(x * y for x, y in zip(rows[a], rows[b], strict=True)) / math.hypot(*rows[a]) / math.hypot(*rows[b])

    every = [cosine(a, b) for a in total for b in total if a != b]
    low, high = min(every), max(every)
    order = sorted(total, key=lambda i: -relative[i])
    chosen = order[: int(keep * important)]
    for token in order:
        likes = [(cosine(token, other) - low) / (high - low) for other in chosen if other != token]
        if len(chosen) < keep and token not in chosen and all(like <= alike for like in likes):
            chosen.append(token)
    for token in order:
        if len(chosen) < keep and token not in chosen:
            chosen.append(token)
    return set(chosen)


@pytest.mark.parametrize("alike", [0.3, 0.6, 0.8])
def test_d2pruner_chooses_as_loops_do(alike: float) -> None:
    there, stay = [30, 21, 8], [12, 9, 7]
    shown = decoder_view(there, stay, seed=int(alike * 10))
    shown = replace(
        shown,
        scores=shown.scores[..., 0],
        token_index=torch.arange(30).expand(3, -1),
        span_index=torch.zeros(3, 30, dtype=torch.long),
    )
    mask = D2Pruner(schedule=((2, 9),), alike=alike).prune_tokens(shown)
    for b, (n, k) in enumerate(shown.host_counts):
        expected = slow_d2pruner(shown.scores[b, :n].tolist(), shown.hidden_states[b, :n].tolist(), k, 0.7, alike)
        assert set(mask[b].nonzero().flatten().tolist()) == expected


def test_d2pruner_divides_by_the_prior_of_the_place(tmp_path: Path) -> None:
    """Attention that is the prior times something else: the something ranks."""
    bias, real = torch.rand(4, 6) + 0.1, torch.rand(24)
    path = str(Calibration("d2pruner", {}, {"4x6": bias}).save(tmp_path / "prior.safetensors"))
    shown = replace(
        decoder_view([24], [10], seed=1), scores=(bias.flatten() * real)[None], token_index=torch.arange(24)[None], span_index=torch.zeros(1, 24, dtype=torch.long),
        spans=((0, 24),), grids=((4, 6),),
    )  # fmt: skip
    mask = D2Pruner(schedule=((2, 9),), prior=path, important=1.0).prune_tokens(shown)
    assert set(mask[0].nonzero().flatten().tolist()) == set(real.topk(10).indices.tolist())
    other = replace(shown, grids=((6, 4),))
    with pytest.raises(ValueError, match=r"knows no grid of 6x4, only 4x6: resize=True"):
        D2Pruner(schedule=((2, 9),), prior=path).prune_tokens(other)
    assert D2Pruner(schedule=((2, 9),), prior=path, resize=True).prune_tokens(other).sum() == 10


def test_nothing_alike_is_picked_twice() -> None:
    """Three copies of each of four rows: a set of four has one of each."""
    rows = torch.eye(4).repeat_interleave(3, 0)[None]
    joined = rescaled(rows @ rows.transpose(1, 2), torch.ones(1, 12, dtype=torch.bool)) > 0.8
    picked = greedy_independent(torch.rand(1, 12), joined, torch.ones(1, 12, dtype=torch.bool), torch.tensor([6]), 6)
    assert sorted(token // 3 for token in picked[0].nonzero().flatten().tolist()) == [0, 1, 2, 3]
