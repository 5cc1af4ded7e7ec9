"""Choice of tokens: ranked, evenly spaced, outliers. Ties go to the lower index, so a choice never depends on the sort."""

from __future__ import annotations

import torch
from torch import Tensor


def ranking(scores: Tensor, valid: Tensor) -> Tensor:
    """Token indices by falling score, padding last: scores [B, N] float, valid [B, N] bool -> order [B, N] long."""
    return scores.masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)


def ranks(order: Tensor) -> Tensor:
    """Rank of each token, the inverse of ``ranking``: [B, N] long."""
    rank = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(1, order, rank)


def top(scores: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Mask of the ``count`` [B] best valid tokens of each row: [B, N] bool."""
    best = torch.arange(valid.shape[1], device=valid.device) < count[:, None]
    return torch.zeros_like(valid).scatter_(1, ranking(scores, valid), best) & valid


def spaced_picks(valid: Tensor, count: Tensor) -> Tensor:
    """Mask of ``count`` [B] valid tokens evenly spaced over each row's valid tokens: [B, N] bool."""
    total = valid.sum(1, keepdim=True).clamp(min=1)
    position = valid.cumsum(1) - 1
    chosen = ((position + 1) * count[:, None]) // total > (position * count[:, None]) // total
    return chosen & valid


def rank_positions(count: Tensor, width: int, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced ranks floor(i * pool / count) for i < count.

    Parameters
    ----------
    count : Tensor
        [B] long, number of ranks.
    width : int
        Largest of ``count``, known on the host.
    pool : Tensor
        [B] long, number of entries that are ranked.

    Returns
    -------
    rank : Tensor
        [B, width] long.
    valid : Tensor
        [B, width] bool, False for padding.
    """
    i = torch.arange(width, device=count.device)
    rank = i * pool[:, None] // count.clamp(min=1)[:, None]
    return rank, i < count[:, None]


def quantile(values: Tensor, valid: Tensor, q: float) -> Tensor:
    """The ``q``-th quantile of each row's valid values, linear between neighbours as in numpy: [B, N] float32 -> [B,
    1].
    """
    ordered = values.masked_fill(~valid, float("inf")).sort(dim=1).values
    position = q * (valid.sum(1, keepdim=True) - 1).clamp(min=0).float()
    below = position.floor().long()
    low, high = (ordered.gather(1, at) for at in (below, position.ceil().long()))
    return torch.where(position > below, low + (high - low) * (position - below).to(low.dtype), low)


def outliers(values: Tensor, valid: Tensor) -> Tensor:
    """Mask of the valid values more than 1.5 interquartile ranges above the third quartile: [B, N] bool."""
    first, third = quantile(values, valid, 0.25), quantile(values, valid, 0.75)
    return valid & (values > third + 1.5 * (third - first))
