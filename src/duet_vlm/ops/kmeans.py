"""Spherical k-means over rows of unit length, every sample by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows, pack_right

TIE = 1e-5  # of a cosine: closer than that, additions in another order would decide
CHANGE = 1e-4  # of all centres together (Frobenius norm): less, and nothing moves any more


def farthest_start(rows: Tensor, valid: Tensor, count: int) -> Tensor:
    """First centres: the row nearest to the mean, then again and again the one that is least like its most similar centre; ties to the lower index.

    rows [B, N, C] of unit length, valid [B, N] -> token numbers [B, count]; those beyond the number of rows are repeated. The loop runs over
    centres, never over tokens or samples.
    """
    mean = (rows * valid[..., None]).sum(1, keepdim=True)
    best = (rows @ mean.transpose(1, 2))[..., 0].masked_fill(~valid, float("-inf")).argmax(1, keepdim=True)
    chosen, nearest = [best], torch.full_like(rows[..., 0], float("-inf"))
    for _ in range(count - 1):
        nearest = torch.maximum(nearest, (rows @ gather_rows(rows, best).transpose(1, 2))[..., 0])
        best = nearest.masked_fill(~valid, float("inf")).argmin(1, keepdim=True)
        chosen.append(best)
    return torch.cat(chosen, 1)


def kmeans(rows: Tensor, valid: Tensor, first: Tensor, there: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Which centre each row belongs to, and the centres.

    Rows go to the centre of the largest cosine, a centre becomes the plain mean of its rows and one without rows stays; a sample whose centres
    change by less than 1e-4 is done, its labels those that this last step had.

    Parameters
    ----------
    rows : Tensor
        [B, N, C] of unit length, of which ``valid`` [B, N] are there.
    first : Tensor
        [B, K] token numbers of the first centres, of which ``there`` [B, K] are.

    Returns
    -------
    labels, centres : Tensor, Tensor
        [B, N] long, -1 for rows that are not there, and [B, K, C].
    """
    centres = gather_rows(rows, first)
    labels = torch.full_like(valid, -1, dtype=torch.long)
    done = torch.zeros(len(rows), 1, dtype=torch.bool, device=rows.device)
    for _ in range(rounds):
        cosine = rows @ unit_rows(centres).transpose(1, 2)
        found = cosine.masked_fill(~there[:, None], float("-inf")).argmax(2).masked_fill(~valid, -1)
        labels = torch.where(done, labels, found)
        moved = torch.where(done[..., None], centres, means(rows, labels, centres))
        done = done | ((moved - centres).flatten(1).norm(dim=1, keepdim=True) < CHANGE)
        centres = moved
    return labels, centres


def means(rows: Tensor, labels: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of the rows [B, N, C] of each label [B, N] (-1: none), ``otherwise`` [B, K, C] where there are none."""
    count = otherwise.shape[1]
    slot = labels.masked_fill(labels < 0, count)
    total = rows.new_zeros(len(rows), count + 1, rows.shape[2]).scatter_add(1, slot[..., None].expand_as(rows), rows)[:, :count]
    size = rows.new_zeros(len(rows), count + 1).scatter_add(1, slot, torch.ones_like(rows[..., 0]))[:, :count, None]
    return torch.where(size > 0, total / size.clamp(min=1), otherwise)


def cluster_sums(rows: Tensor, valid: Tensor, labels: Tensor, centres: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """A row of its own for every centre: the one that is most like it (ties to the lower index), of a cluster without rows one that stands for no
    other.

    Clusters are numbered by these rows. -> token numbers [B, K], rising where ``there`` [B, K]; labels [B, N] by the new numbers.
    """
    count, number = centres.shape[1], torch.arange(rows.shape[1], device=rows.device)
    own = labels[..., None] == torch.arange(count, device=rows.device)
    alike = (rows @ unit_rows(centres).transpose(1, 2)).masked_fill(~own, float("-inf"))
    nearest = alike >= alike.amax(1, keepdim=True) - TIE  # two rows of a cluster are both as like its mean: rounding must not decide
    place, filled = nearest.int().argmax(1), own.any(1)
    spare = valid.new_zeros(len(valid), valid.shape[1] + 1)
    taken = spare.scatter_(1, place.masked_fill(~filled, valid.shape[1]), True)[:, :-1]
    free, _ = pack_right(valid & ~taken, rows.shape[1])
    place = torch.where(filled, place, free.gather(1, ((there & ~filled).cumsum(1) - 1).clamp(min=0)))
    order = torch.where(there, place, rows.shape[1]).argsort(dim=1, stable=True)
    new = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=rows.device).expand_as(order))
    labels = torch.where(labels < 0, labels, new.gather(1, labels.clamp(min=0)))
    place = place.gather(1, order)
    hits = (place[:, None] == number[:, None]) & there[:, None]  # a row of an empty cluster leaves the one that it was in
    return place, torch.where(hits.any(2), hits.int().argmax(2), labels)


def elbow(distortions: Sequence[float], least: int) -> int:
    """How many clusters the released code of VQToken takes, from the distortions of ``least``, ``least`` + 1, ... clusters: the place of the
    largest second difference, counted from 4, but ``least`` at the least."""
    bends = [a - 2 * b + c for a, b, c in zip(distortions, distortions[1:], distortions[2:], strict=False)]
    return max(max(range(len(bends)), key=bends.__getitem__) + 4, least) if bends else least
