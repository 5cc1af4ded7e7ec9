"""Shorten a list of tokens by repeatedly dropping those most similar to another one (VisPruner, arXiv 2412.01818)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows, pack_right, upload
from duet_vlm.ops.select import ranking, top

ROUND = 8  # tokens that leave together


def remove_duplicates(
    similarity: Tensor, scores: Tensor, valid: Tensor, sizes: Sequence[tuple[int, int]], important: float
) -> Tensor:
    """Choose the best tokens by score, and the least duplicated of the others.

    The others form a list by falling score. It is split alternately: places 0, 2, 4, ... are compared with places 1, 3,
    5, ..., and the ``ROUND`` tokens of the first half that are most similar to one of the second are dropped. The rest
    of the first half, most similar first, then the second half, make the next list, until the count is reached.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    scores : Tensor
        [B, N] float.
    valid : Tensor
        [B, N] bool, False for padding.
    sizes : sequence of (int, int)
        For each image, known on the host: number of tokens, and number to choose.
    important : float
        Share of the chosen tokens that is taken by score alone, in [0, 1].

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    num_best = [int(num_choose * important) for _, num_choose in sizes]
    target = upload([num_choose - n for (_, num_choose), n in zip(sizes, num_best, strict=True)], valid.device)
    first = top(scores, valid, upload(num_best, valid.device))
    rest = valid & ~first
    order, length = ranking(scores, rest), rest.sum(1)
    lengths = [(tokens - n, num_choose - n) for (tokens, num_choose), n in zip(sizes, num_best, strict=True)]
    for _ in range(max(_rounds(length_now, length_end) for length_now, length_end in lengths)):
        order, length = _drop_round(similarity, order, length, target)
    rank = torch.arange(order.shape[1], device=order.device)
    return first | torch.zeros_like(first).scatter(1, order, rank < torch.minimum(length, target)[:, None])


def _rounds(length: int, target: int) -> int:
    """Number of rounds that shorten a list of ``length`` to ``target``; 0 where ``target`` is 0."""
    count = 0
    while length > target > 0:
        length -= min(ROUND, length - target, (length + 1) // 2)
        count += 1
    return count


def _drop_round(similarity: Tensor, order: Tensor, length: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Run one round of dropping; lists that are short enough do not change.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    order : Tensor
        [B, R] long, token numbers of each list.
    length : Tensor
        [B] long, valid entries of each list.
    target : Tensor
        [B] long, target length.

    Returns
    -------
    order, length : Tensor
        The shorter lists.
    """
    rank = torch.arange(order.shape[1], device=order.device)
    alive = rank < length[:, None]
    sources, targets = order[:, 0::2], order[:, 1::2]
    likeness = gather_rows(similarity, sources).gather(2, targets[:, None].expand(-1, sources.shape[1], -1))
    if targets.shape[1]:
        best = likeness.masked_fill(~alive[:, None, 1::2], -torch.inf).amax(2)
    else:
        best = similarity.new_zeros(sources.shape)
    num_drop = torch.minimum(length - target, (length + 1) // 2).clamp(0, ROUND)
    by_likeness = ranking(best.clamp(min=-2.0), alive[:, 0::2])  # without a second half: below any cosine, but valid
    keep = alive[:, 0::2] & (torch.arange(sources.shape[1], device=order.device) >= num_drop[:, None])
    candidates = torch.cat([sources.gather(1, by_likeness), targets], 1)
    index, _ = pack_right(torch.cat([keep, alive[:, 1::2]], 1), order.shape[1])
    shorter = (num_drop > 0)[:, None]
    return torch.where(shorter, candidates.gather(1, index), order), length - num_drop
