"""Graphs of tokens: how alike and how close they are, and sets in which no two are joined."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import ranking, ranks, top


def rescaled(likeness: Tensor, valid: Tensor) -> Tensor:
    """Likeness [B, N, N] of valid [B, N] tokens, the smallest of two different ones as 0 and the largest as 1; all 1 where they are equal."""
    itself = torch.eye(likeness.shape[1], dtype=torch.bool, device=likeness.device)
    pair = valid[:, None] & valid[..., None] & ~itself
    low = likeness.masked_fill(~pair, torch.inf).flatten(1).amin(1)[:, None, None]
    high = likeness.masked_fill(~pair, -torch.inf).flatten(1).amax(1)[:, None, None]
    return torch.where(high > low, (likeness - low) / (high - low), 1.0)


def closeness(row: Tensor, column: Tensor) -> Tensor:
    """1 / (1 + distance) of places [B, N] in a grid: [B, N, N] float32."""
    place = torch.stack([row, column], -1).float()
    return 1 / (1 + (place[:, None] - place[:, :, None]).norm(dim=-1))


def greedy_independent(scores: Tensor, joined: Tensor, free: Tensor, count: Tensor, steps: int) -> Tensor:
    """Up to ``count`` [B] of the ``free`` [B, N] tokens, none ``joined`` [B, N, N] to another: always the best that is left, ties to the lower index.

    -> [B, N] bool; ``steps`` is the largest count. A token's entry for itself plays no part.
    """
    picked, free = torch.zeros_like(free), free.clone()
    for step in range(steps):
        best = scores.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
        new = free.gather(1, best) & (count > step)[:, None]
        picked |= torch.zeros_like(free).scatter(1, best, new)
        free &= ~(gather_rows(joined, best)[:, 0] & new)
        free &= ~torch.zeros_like(free).scatter(1, best, new)
    return picked


def independent_set(scores: Tensor, joined: Tensor, valid: Tensor, count: Tensor, important: float, steps: int) -> Tensor:
    """``count`` [B] of the ``valid`` [B, N] tokens: the share ``important`` by score alone; then, by score, those that are not ``joined`` [B, N, N]
    to a chosen one; and where these run out, by score again (D2Pruner).

    -> [B, N] bool; ``steps`` is the largest number that is not chosen by score alone.
    """
    first = top(scores, valid, (count * important).long())
    free = valid & ~first & ~(joined & first[:, None]).any(2)
    picked = greedy_independent(scores, joined, free, count - first.sum(1), steps)
    place = ranks(ranking(scores, valid))
    order = place + place.shape[1] * (2 - 2 * first.long() - picked.long())
    return top(-order.float(), valid, count)
