"""Spherical k-means over unit vectors, each sample separately."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows, pack_right

TIE = 1e-5  # of a cosine: closer than that, additions in another order would decide
CHANGE = 1e-4  # of all centres together (Frobenius norm): less, and nothing moves any more


def farthest_start(rows: Tensor, valid: Tensor, count: int) -> Tensor:
    """Choose first centres: the row nearest to the mean, then repeatedly the one least similar to its nearest centre.

    Ties go to the lower index. The loop runs over centres, never over tokens or samples.

    Parameters
    ----------
    rows : Tensor
        [B, N, C] unit vectors.
    valid : Tensor
        [B, N] bool, False for padding.
    count : int
        Number of centres.

    Returns
    -------
    Tensor
        [B, count] token numbers, repeated where there are fewer rows.
    """
    mean = (rows * valid[..., None]).sum(1, keepdim=True)
    best = (rows @ mean.transpose(1, 2))[..., 0].masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)
    chosen, nearest = [best], torch.full_like(rows[..., 0], float("-inf"))
    for _ in range(count - 1):
        nearest = torch.maximum(nearest, (rows @ gather_rows(rows, best).transpose(1, 2))[..., 0])
        best = nearest.masked_fill(~valid, float("inf")).argmin(1, keepdim=True)
        chosen.append(best)
    return torch.cat(chosen, 1)


def kmeans(rows: Tensor, valid: Tensor, first: Tensor, used: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Cluster rows around centres.

    Rows are assigned to the centre of the largest cosine; a centre becomes the plain mean of its rows, and one without
    rows does not move. A sample whose centres change by less than 1e-4 has converged, with the labels of that last
    step.

    Parameters
    ----------
    rows : Tensor
        [B, N, C] unit vectors.
    valid : Tensor
        [B, N] bool, False for padding.
    first : Tensor
        [B, K] token numbers of the first centres.
    used : Tensor
        [B, K] bool, False for padding among the centres.
    rounds : int
        Most iterations.

    Returns
    -------
    labels : Tensor
        [B, N] long, -1 for padding.
    centres : Tensor
        [B, K, C].
    """
    centres = gather_rows(rows, first)
    labels = torch.full_like(valid, -1, dtype=torch.long)
    converged = torch.zeros(len(rows), 1, dtype=torch.bool, device=rows.device)
    for _ in range(rounds):
        cosine = rows @ unit_rows(centres).transpose(1, 2)
        nearest = cosine.masked_fill(~used[:, None], float("-inf")).argmax(2).masked_fill(~valid, -1)
        labels = torch.where(converged, labels, nearest)
        new_centres = torch.where(converged[..., None], centres, means(rows, labels, centres))
        converged = converged | ((new_centres - centres).flatten(1).norm(dim=1, keepdim=True) < CHANGE)
        centres = new_centres
    return labels, centres


def means(rows: Tensor, labels: Tensor, otherwise: Tensor) -> Tensor:
    """Mean of the rows of each label.

    Parameters
    ----------
    rows : Tensor
        [B, N, C].
    labels : Tensor
        [B, N] long, -1 for none.
    otherwise : Tensor
        [B, K, C] values for labels without rows.

    Returns
    -------
    Tensor
        [B, K, C].
    """
    count = otherwise.shape[1]
    slot = labels.masked_fill(labels < 0, count)
    total = rows.new_zeros(len(rows), count + 1, rows.shape[2]).scatter_add(1, slot[..., None].expand_as(rows), rows)[
        :, :count
    ]
    size = rows.new_zeros(len(rows), count + 1).scatter_add(1, slot, torch.ones_like(rows[..., 0]))[:, :count, None]
    return torch.where(size > 0, total / size.clamp(min=1), otherwise)


def cluster_sums(rows: Tensor, valid: Tensor, labels: Tensor, centres: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a representative token for every centre: the most similar row of its cluster, ties to the lower index.

    A cluster without rows gets a token that represents no other cluster. Clusters are renumbered by these tokens.

    Parameters
    ----------
    rows : Tensor
        [B, N, C] unit vectors.
    valid : Tensor
        [B, N] bool, False for padding.
    labels : Tensor
        [B, N] long, cluster of each row, -1 for padding.
    centres : Tensor
        [B, K, C].
    used : Tensor
        [B, K] bool, False for padding among the centres.

    Returns
    -------
    place : Tensor
        [B, K] long, token numbers, rising where ``used``.
    labels : Tensor
        [B, N] long, by the new numbers.
    """
    count, number = centres.shape[1], torch.arange(rows.shape[1], device=rows.device)
    members = labels[..., None] == torch.arange(count, device=rows.device)
    alike = (rows @ unit_rows(centres).transpose(1, 2)).masked_fill(~members, float("-inf"))
    # two rows of a cluster are equally similar to its mean: rounding must not decide
    nearest = alike >= alike.amax(1, keepdim=True) - TIE
    slot, has_rows = nearest.int().argmax(1), members.any(1)
    spare = valid.new_zeros(len(valid), valid.shape[1] + 1)
    occupied = spare.scatter_(1, slot.masked_fill(~has_rows, valid.shape[1]), True)[:, :-1]
    free, _ = pack_right(valid & ~occupied, rows.shape[1])
    slot = torch.where(has_rows, slot, free.gather(1, ((used & ~has_rows).cumsum(1) - 1).clamp(min=0)))
    order = torch.where(used, slot, rows.shape[1]).argsort(dim=1, stable=True)
    new = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=rows.device).expand_as(order))
    labels = torch.where(labels < 0, labels, new.gather(1, labels.clamp(min=0)))
    slot = slot.gather(1, order)
    # the token of an empty cluster moves to it from its old one
    hits = (slot[:, None] == number[:, None]) & used[:, None]
    return slot, torch.where(hits.any(2), hits.int().argmax(2), labels)


def elbow(distortions: Sequence[float], least: int) -> int:
    """Number of clusters that VQToken's released code chooses, from the distortions of ``least``, ``least`` + 1, ...
    clusters.

    It is the place of the largest second difference, counted from 4, but at least ``least``.
    """
    bends = [a - 2 * b + c for a, b, c in zip(distortions, distortions[1:], distortions[2:], strict=False)]
    return max(max(range(len(bends)), key=bends.__getitem__) + 4, least) if bends else least
