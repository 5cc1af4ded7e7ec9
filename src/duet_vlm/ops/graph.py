"""Graphs of tokens: similarity, closeness, and sets without edges between their members."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import ranking, ranks, top


def rescaled(likeness: Tensor, valid: Tensor) -> Tensor:
    """Rescale similarities to [0, 1] over the pairs of different tokens of each image; all 1 where they are equal.

    Parameters
    ----------
    likeness : Tensor
        [B, N, N].
    valid : Tensor
        [B, N] bool, False for padding.

    Returns
    -------
    Tensor
        [B, N, N].
    """
    itself = torch.eye(likeness.shape[1], dtype=torch.bool, device=likeness.device)
    pair = valid[:, None] & valid[..., None] & ~itself
    low = likeness.masked_fill(~pair, torch.inf).flatten(1).amin(1)[:, None, None]
    high = likeness.masked_fill(~pair, -torch.inf).flatten(1).amax(1)[:, None, None]
    return torch.where(high > low, (likeness - low) / (high - low), 1.0)


def closeness(row: Tensor, column: Tensor) -> Tensor:
    """Compute 1 / (1 + distance) of grid places: rows and columns [B, N] -> [B, N, N] float32."""
    coords = torch.stack([row, column], -1).float()
    return 1 / (1 + (coords[:, None] - coords[:, :, None]).norm(dim=-1))


def greedy_independent(scores: Tensor, edges: Tensor, free: Tensor, count: Tensor, steps: int) -> Tensor:
    """Pick tokens by falling score that share no edge with a picked one; ties go to the lower index.

    Parameters
    ----------
    scores : Tensor
        [B, N].
    edges : Tensor
        [B, N, N] bool; a token's entry for itself plays no part.
    free : Tensor
        [B, N] bool, candidates.
    count : Tensor
        [B] long, most picks of each sample.
    steps : int
        Largest of ``count``, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the picks.
    """
    picks, free = torch.zeros_like(free), free.clone()
    for step in range(steps):
        best = scores.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
        new = free.gather(1, best) & (count > step)[:, None]
        picks |= torch.zeros_like(free).scatter(1, best, new)
        free &= ~(gather_rows(edges, best)[:, 0] & new)
        free &= ~torch.zeros_like(free).scatter(1, best, new)
    return picks


def independent_set(
    scores: Tensor, edges: Tensor, valid: Tensor, count: Tensor, important: float, steps: int
) -> Tensor:
    """Choose ``count`` tokens: a share by score, then an independent set, then by score again (D2Pruner).

    Parameters
    ----------
    scores : Tensor
        [B, N].
    edges : Tensor
        [B, N, N] bool, pairs of similar tokens.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    important : float
        Share of ``count`` chosen by score alone, in [0, 1].
    steps : int
        Largest number of tokens not chosen by score alone, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    first = top(scores, valid, (count * important).long())
    free = valid & ~first & ~(edges & first[:, None]).any(2)
    picks = greedy_independent(scores, edges, free, count - first.sum(1), steps)
    rank = ranks(ranking(scores, valid))
    order = rank + rank.shape[1] * (2 - 2 * first.long() - picks.long())
    return top(-order.float(), valid, count)
