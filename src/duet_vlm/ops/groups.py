"""Tokens in groups (crops, windows, clusters): ranks, sums and counts of each, and choosing by them. Ties go to the lower index.

Groups are numbered from 0 to a ``count`` that the host knows; tokens that are not valid may have any number. Nothing is read from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.select import ranking, ranks, top

SLACK = 1e-4  # of a token: shares and remainders closer than this differ by rounding alone
SMALLEST = 1e-6  # of the largest weight: what groups of no weight get once all others are full


def ranks_in_groups(scores: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """The rank of each token within its group by falling score: scores, group, valid [B, N] -> [B, N] long."""
    order = ranking(scores, valid)
    number = torch.where(valid, group, torch.iinfo(torch.long).max).gather(1, order)
    number, by_group = number.sort(dim=1, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    begins = torch.ones_like(number, dtype=torch.bool)
    begins[:, 1:] = number[:, 1:] != number[:, :-1]
    first = torch.where(begins, place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order.gather(1, by_group), place - first)


def numbered(key: Tensor, valid: Tensor) -> Tensor:
    """Numbers 0, 1, ... of the different values of ``key`` [B, N] long, by rising value: [B, N] long; anything where not ``valid``."""
    key, order = key.masked_fill(~valid, torch.iinfo(torch.long).max).sort(dim=1, stable=True)
    fresh = torch.zeros_like(key)
    fresh[:, 1:] = key[:, 1:] != key[:, :-1]
    return torch.empty_like(order).scatter_(1, order, fresh.cumsum(1))


def sums_of_groups(values: Tensor, group: Tensor, valid: Tensor, count: int) -> Tensor:
    """The sum of the values of each group: [B, N] -> [B, count] float32."""
    kept = torch.where(valid, values.float(), 0.0)
    return kept.new_zeros(len(values), count).scatter_add_(1, group.clamp(0, count - 1), kept)


def proportional_shares(weight: Tensor, size: Tensor, total: Tensor) -> Tensor:
    """Whole numbers in proportion to ``weight`` [B, G], none above ``size`` [B, G], that add up to ``total`` [B] (or to all there is).

    What a full group leaves goes to the others in proportion; what is left of a token to the largest remainders, ties to the earlier group.
    """
    size = size.float()
    total = torch.minimum(total.float(), size.sum(1))[:, None]
    weight = torch.where(size > 0, weight.float().clamp(min=0), 0.0)
    most = weight.amax(1, keepdim=True)
    weight = torch.where(size > 0, torch.where(most > 0, torch.maximum(weight / most, weight.new_full((), SMALLEST)), size), 0.0)
    fills = (size / weight.clamp(min=torch.finfo(torch.float32).tiny)).masked_fill(size == 0, 0.0)
    fills, order = fills.sort(dim=1, stable=True)
    sizes, weights = size.gather(1, order), weight.gather(1, order)
    before, rest = sizes.cumsum(1) - sizes, weights.flip(1).cumsum(1).flip(1)
    full = fills * rest <= (total - before) * (1 + 1e-6)
    filled, others = (sizes * full).sum(1, keepdim=True), (weights * ~full).sum(1, keepdim=True)
    level = (total - filled).clamp(min=0) / others.clamp(min=torch.finfo(torch.float32).tiny)
    share = torch.where(full, sizes, torch.minimum(weights * level, sizes))
    share = torch.zeros_like(share).scatter(1, order, share)
    whole = (share + SLACK).floor()
    left = (total - whole.sum(1, keepdim=True)).clamp(min=0)
    remainder = ((share - whole) / SLACK).round().masked_fill(whole >= size, float("-inf"))  # rounding decides no tie
    more = ranks(remainder.argsort(dim=1, descending=True, stable=True)) < left
    return (whole + (more & (whole < size))).long()


def equal_shares(size: Tensor, total: Tensor) -> Tensor:
    """``total`` [B] tokens divided in proportion to the ``size`` [B, G] long of each group; what is left by largest remainder, ties to the earlier
    group. In whole numbers, so that equal remainders are equal."""
    product, tokens = total[:, None] * size, size.sum(1, keepdim=True).clamp(min=1)
    left = total[:, None] - (product // tokens).sum(1, keepdim=True)
    more = ranks((product % tokens).argsort(dim=1, descending=True, stable=True)) < left
    return product // tokens + more.long()


def top_of_groups(scores: Tensor, group: Tensor, valid: Tensor, quota: Tensor, count: Tensor) -> Tensor:
    """Mask [B, N] of ``count`` [B] tokens: the ``quota`` [B, G] best of each group; of too many those with the largest scores, and where there
    are too few the next ones of every group, again by score, and so on."""
    over = ranks_in_groups(scores, group, valid) - quota.gather(1, group.clamp(0, quota.shape[1] - 1))
    step = over.clamp(min=-1)  # all that is within its quota comes first
    order = ranking(scores, valid)
    step = torch.where(valid, step, torch.iinfo(torch.long).max).gather(1, order).sort(dim=1, stable=True).indices
    best = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(valid).scatter_(1, order.gather(1, step), best) & valid


def top_with_limit(scores: Tensor, group: Tensor, valid: Tensor, limit: Tensor, count: Tensor) -> Tensor:
    """Mask [B, N] of the ``count`` [B] best tokens of which no group gives more than ``limit`` [B]; fewer where the groups have no more."""
    return top(scores, valid & (ranks_in_groups(scores, group, valid) < limit[:, None]), count)


def segment_numbers(valid: Tensor, count: int) -> Tensor:
    """Which of ``count`` stretches of its picture, in order, each token is of: as long as each other, the first ones by one token longer.

    valid [B, N] -> [B, N] long.
    """
    place, total = valid.cumsum(1) - 1, valid.sum(1, keepdim=True)
    short, longer = total // count, total % count
    late = (place - longer * (short + 1)) // short.clamp(min=1) + longer
    return torch.where(place < longer * (short + 1), place // (short + 1), late).clamp(0, count - 1)


def window_numbers(place: Tensor, sides: Tensor, parts: Tensor, side: int, most: int) -> tuple[Tensor, Tensor]:
    """Windows of ``side`` x ``side`` tokens on each part's grid; rows and columns that fill none belong to the last one.

    place [B, N, 2], sides [B, 2], parts [B, N] (of which there are up to ``most``) -> the window of each token [B, N] and how many there are
    in all [B]. A side shorter than a window makes one.
    """
    count = (sides // side).clamp(min=1)
    at = torch.minimum(place.clamp(min=0) // side, count[:, None] - 1)
    each = count.prod(1)
    number = parts.clamp(min=0) * each[:, None] + at[..., 0] * count[:, None, 1] + at[..., 1]
    return number, each * (torch.where(parts >= 0, parts, -1).amax(1) + 1).clamp(min=1, max=most)


def survivors(similarity: Tensor, scores: Tensor, group: Tensor, valid: Tensor, threshold: Tensor, count: int, steps: int) -> Tensor:
    """Suppression within groups: in each step every group gives its best token, and those of the group that are more similar to it than
    ``threshold`` [B] leave.

    similarity [B, N, N], scores, group, valid [B, N] -> the step in which each token was taken [B, N] long, ``steps`` where it was not.
    """
    rank = ranks(ranking(scores, valid))
    taken, alive = torch.full_like(rank, steps), valid
    group = group.clamp(0, count - 1)
    nobody = rank.shape[1]
    for step in range(steps):
        best = torch.full((len(rank), count), nobody, device=rank.device).scatter_reduce(1, group, torch.where(alive, rank, nobody), "amin")
        first = best.gather(1, group)
        chosen = alive & (rank == first)
        winner = torch.zeros(len(rank), nobody + 1, dtype=torch.long, device=rank.device).scatter(1, rank, _numbers(rank)).gather(1, first)
        alike = similarity.gather(2, winner.clamp(max=nobody - 1)[..., None])[..., 0] > threshold[:, None]
        taken = torch.where(chosen, step, taken)
        alive = alive & ~chosen & ~(alike & (first < nobody))
    return taken


def _numbers(rank: Tensor) -> Tensor:
    return torch.arange(rank.shape[1], device=rank.device).expand(rank.shape)


def principal(rows: Tensor, valid: Tensor, count: Tensor, most: int, rounds: int = 4) -> Tensor:
    """The first ``count`` [B] principal directions among tokens, of which ``most`` is the largest: rows [B, N, C] -> [B, N, most] float32.

    Tokens are the variables and channels the samples: the eigenvectors of the tokens' covariance over channels, by falling eigenvalue; columns
    from ``count`` on are zero. Block power iteration from a fixed start, then a rotation to eigenvectors (the one step for which the library
    may wait for the device).
    """
    rows = torch.where(valid[..., None], rows.float() - rows.float().mean(-1, keepdim=True), 0.0)
    real = torch.arange(most, device=rows.device) < count[:, None]
    number = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32)[:, None]
    start = torch.cos(1.0 + number * (1.0 + torch.arange(most, device=rows.device) * 0.6180339887))
    basis = start * valid[..., None] * real[:, None]
    for _ in range(rounds):
        basis = torch.linalg.qr(rows @ (rows.transpose(1, 2) @ basis)).Q * real[:, None]
    seen = rows.transpose(1, 2) @ basis
    _, rotation = torch.linalg.eigh(seen.transpose(1, 2) @ seen)
    return (basis @ rotation.flip(2)) * real[:, None]
