"""Groups of tokens (crops, windows, clusters): ranks, sums, counts, and choice within groups. Ties go to the lower
index.

Groups are numbered from 0 to a ``count`` known on the host; padding may have any number. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.select import ranking, ranks, top

SLACK = 1e-4  # of a token: shares and remainders closer than this differ by rounding alone
SMALLEST = 1e-6  # of the largest weight: what groups of no weight get once all others are full


def ranks_in_groups(scores: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Rank of each token within its group by falling score: scores, group, valid [B, N] -> [B, N] long."""
    order = ranking(scores, valid)
    number = torch.where(valid, group, torch.iinfo(torch.long).max).gather(1, order)
    number, by_group = number.sort(dim=1, stable=True)
    rank = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    begins = torch.ones_like(number, dtype=torch.bool)
    begins[:, 1:] = number[:, 1:] != number[:, :-1]
    first = torch.where(begins, rank, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order.gather(1, by_group), rank - first)


def numbered(key: Tensor, valid: Tensor) -> Tensor:
    """Number the distinct values of ``key`` [B, N] long from 0 by rising value: [B, N] long; undefined where not
    ``valid``.
    """
    key, order = key.masked_fill(~valid, torch.iinfo(torch.long).max).sort(dim=1, stable=True)
    fresh = torch.zeros_like(key)
    fresh[:, 1:] = key[:, 1:] != key[:, :-1]
    return torch.empty_like(order).scatter_(1, order, fresh.cumsum(1))


def sums_of_groups(values: Tensor, group: Tensor, valid: Tensor, count: int) -> Tensor:
    """Sum of the values of each group: [B, N] -> [B, count] float32."""
    kept = torch.where(valid, values.float(), 0.0)
    return kept.new_zeros(len(values), count).scatter_add_(1, group.clamp(0, count - 1), kept)


def proportional_shares(weight: Tensor, size: Tensor, total: Tensor) -> Tensor:
    """Divide a total among groups in proportion to weights, with upper limits.

    The excess of a full group goes to the others in proportion; fractions go to the largest remainders, ties to the
    earlier group.

    Parameters
    ----------
    weight : Tensor
        [B, G], not negative.
    size : Tensor
        [B, G], most tokens of each group.
    total : Tensor
        [B], tokens to divide, limited to the sum of the sizes.

    Returns
    -------
    Tensor
        [B, G] long.
    """
    size = size.float()
    total = torch.minimum(total.float(), size.sum(1))[:, None]
    weight = torch.where(size > 0, weight.float().clamp(min=0), 0.0)
    most = weight.amax(1, keepdim=True)
    weight = torch.where(
        size > 0, torch.where(most > 0, torch.maximum(weight / most, weight.new_full((), SMALLEST)), size), 0.0
    )
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
    """Divide a total in proportion to group sizes; fractions go to the largest remainders, ties to the earlier group.

    In integers, so that equal remainders are equal.

    Parameters
    ----------
    size : Tensor
        [B, G] long.
    total : Tensor
        [B] long.

    Returns
    -------
    Tensor
        [B, G] long.
    """
    product, tokens = total[:, None] * size, size.sum(1, keepdim=True).clamp(min=1)
    remaining = total[:, None] - (product // tokens).sum(1, keepdim=True)
    more = ranks((product % tokens).argsort(dim=1, descending=True, stable=True)) < remaining
    return product // tokens + more.long()


def top_of_groups(scores: Tensor, group: Tensor, valid: Tensor, quota: Tensor, count: Tensor) -> Tensor:
    """Choose the ``quota`` best tokens of each group, and exactly ``count`` in all.

    Of too many the ones with the largest scores are kept; where there are too few, the next one of every group is
    added, by score, and so on.

    Parameters
    ----------
    scores : Tensor
        [B, N].
    group : Tensor
        [B, N] long.
    valid : Tensor
        [B, N] bool, False for padding.
    quota : Tensor
        [B, G] long.
    count : Tensor
        [B] long.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    over = ranks_in_groups(scores, group, valid) - quota.gather(1, group.clamp(0, quota.shape[1] - 1))
    step = over.clamp(min=-1)  # tokens within their quota come first
    order = ranking(scores, valid)
    step = torch.where(valid, step, torch.iinfo(torch.long).max).gather(1, order).sort(dim=1, stable=True).indices
    best = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(valid).scatter_(1, order.gather(1, step), best) & valid


def top_with_limit(scores: Tensor, group: Tensor, valid: Tensor, limit: Tensor, count: Tensor) -> Tensor:
    """Mask [B, N] of the ``count`` [B] best tokens, at most ``limit`` [B] of each group; fewer if the groups have no
    more.
    """
    return top(scores, valid & (ranks_in_groups(scores, group, valid) < limit[:, None]), count)


def segment_numbers(valid: Tensor, count: int) -> Tensor:
    """Number the segments of each image: ``count`` runs of valid tokens of equal length, the first ones longer by one
    token.

    valid [B, N] bool -> [B, N] long.
    """
    position, total = valid.cumsum(1) - 1, valid.sum(1, keepdim=True)
    short, longer = total // count, total % count
    late = (position - longer * (short + 1)) // short.clamp(min=1) + longer
    return torch.where(position < longer * (short + 1), position // (short + 1), late).clamp(0, count - 1)


def window_numbers(coords: Tensor, sides: Tensor, parts: Tensor, side: int, most: int) -> tuple[Tensor, Tensor]:
    """Number the windows of ``side`` x ``side`` tokens on each part's grid; incomplete rows and columns join the last
    window.

    Parameters
    ----------
    coords : Tensor
        [B, N, 2] long, row and column of each token.
    sides : Tensor
        [B, 2] long, rows and columns of the grid.
    parts : Tensor
        [B, N] long, part (crop or frame) of each token, -1 for padding.
    side : int
        Rows and columns of a window; a shorter grid makes one window.
    most : int
        Upper bound of the number of parts, known on the host.

    Returns
    -------
    number : Tensor
        [B, N] long, window of each token.
    count : Tensor
        [B] long, windows in all.
    """
    count = (sides // side).clamp(min=1)
    at = torch.minimum(coords.clamp(min=0) // side, count[:, None] - 1)
    each = count.prod(1)
    number = parts.clamp(min=0) * each[:, None] + at[..., 0] * count[:, None, 1] + at[..., 1]
    return number, each * (torch.where(parts >= 0, parts, -1).amax(1) + 1).clamp(min=1, max=most)


def survivors(
    similarity: Tensor, scores: Tensor, group: Tensor, valid: Tensor, threshold: Tensor, count: int, steps: int
) -> Tensor:
    """Suppress similar tokens within groups.

    In each step every group yields its best token, and the tokens of the group that are more similar to it than
    ``threshold`` are suppressed.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N].
    scores : Tensor
        [B, N].
    group : Tensor
        [B, N] long.
    valid : Tensor
        [B, N] bool, False for padding.
    threshold : Tensor
        [B].
    count : int
        Number of groups.
    steps : int
        Number of steps.

    Returns
    -------
    Tensor
        [B, N] long, step in which each token was taken, ``steps`` if it was not.
    """
    rank = ranks(ranking(scores, valid))
    taken_in, alive = torch.full_like(rank, steps), valid
    group = group.clamp(0, count - 1)
    none = rank.shape[1]
    for step in range(steps):
        best = torch.full((len(rank), count), none, device=rank.device).scatter_reduce(
            1, group, torch.where(alive, rank, none), "amin"
        )
        best_rank = best.gather(1, group)
        chosen = alive & (rank == best_rank)
        best_token = (
            torch.zeros(len(rank), none + 1, dtype=torch.long, device=rank.device)
            .scatter(1, rank, _numbers(rank))
            .gather(1, best_rank)
        )
        alike = similarity.gather(2, best_token.clamp(max=none - 1)[..., None])[..., 0] > threshold[:, None]
        taken_in = torch.where(chosen, step, taken_in)
        alive = alive & ~chosen & ~(alike & (best_rank < none))
    return taken_in


def _numbers(rank: Tensor) -> Tensor:
    return torch.arange(rank.shape[1], device=rank.device).expand(rank.shape)


def principal(rows: Tensor, valid: Tensor, count: Tensor, most: int, rounds: int = 4) -> Tensor:
    """Compute principal directions among tokens.

    Tokens are the variables and channels the samples: the eigenvectors of the tokens' covariance over channels, by
    falling eigenvalue. Block power iteration from a fixed start, then a rotation to eigenvectors (the one step for
    which the library may wait for the device).

    Parameters
    ----------
    rows : Tensor
        [B, N, C].
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, number of directions.
    most : int
        Largest of ``count``, known on the host.
    rounds : int
        Iterations.

    Returns
    -------
    Tensor
        [B, N, most] float32; columns from ``count`` on are zero.
    """
    rows = torch.where(valid[..., None], rows.float() - rows.float().mean(-1, keepdim=True), 0.0)
    real = torch.arange(most, device=rows.device) < count[:, None]
    number = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float32)[:, None]
    start = torch.cos(1.0 + number * (1.0 + torch.arange(most, device=rows.device) * 0.6180339887))
    basis = start * valid[..., None] * real[:, None]
    for _ in range(rounds):
        basis = torch.linalg.qr(rows @ (rows.transpose(1, 2) @ basis)).Q * real[:, None]
    projected = rows.transpose(1, 2) @ basis
    _, rotation = torch.linalg.eigh(projected.transpose(1, 2) @ projected)
    return (basis @ rotation.flip(2)) * real[:, None]
