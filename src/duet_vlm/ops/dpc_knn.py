"""Density-peak clustering by nearest neighbours (DPC-KNN).

A peak is a row with a high density of neighbours that is far from every row of higher density. Du, Ding, Jia: "Study on
density peaks clustering based on k-nearest neighbors", 2016. Sets of rows are a batch; ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 1 << 25  # of tables of distances alive at once


def distances(rows: Tensor) -> Tensor:
    """Compute all pairwise distances of each set, divided by the square root of the width: [G, P, C] -> [G, P, P]
    float32.
    """
    rows = rows.float()
    rows = rows - rows.mean(1, keepdim=True)  # products of smaller numbers round less
    norms = rows.square().sum(-1)
    squares = torch.baddbmm(norms[:, :, None] + norms[:, None], rows, rows.transpose(1, 2), alpha=-2).clamp_(min=0)
    squares.diagonal(dim1=1, dim2=2).zero_()
    return ((squares + squares.transpose(1, 2)) / (2 * rows.shape[2])).sqrt_()  # exactly symmetric


def peak_scores(distance: Tensor, valid: Tensor, neighbours: int, most: Tensor | None = None) -> Tensor:
    """Score rows by density times distance to the nearest denser row.

    Density is exp(-mean of the squared distances to the nearest ``neighbours``), the row itself included. The densest
    row has the largest distance of the set.

    Parameters
    ----------
    distance : Tensor
        [G, P, P] float32, pairwise distances.
    valid : Tensor
        [G, P] bool, False for padding.
    neighbours : int
        Rows in the density estimate, limited to the rows of the set.
    most : Tensor, optional
        [G] long, a further limit of ``neighbours``.

    Returns
    -------
    Tensor
        [G, P] float32, -1 for padding.
    """
    pairs = valid[:, :, None] & valid[:, None]
    near = distance.masked_fill(~pairs, float("inf")).topk(min(neighbours, distance.shape[2]), largest=False).values
    count = valid.sum(1) if most is None else torch.minimum(most, valid.sum(1))
    count = count.clamp(1, near.shape[2])[:, None, None]
    in_density = torch.arange(near.shape[2], device=near.device) < count
    density = (-near.masked_fill(~in_density | near.isinf(), 0).square().sum(2) / count[:, 0]).exp()
    number = torch.arange(density.shape[1], device=density.device)
    equal_before = (density[:, None] == density[:, :, None]) & (number[None] < number[:, None])
    denser = ((density[:, None] > density[:, :, None]) | equal_before) & pairs
    farthest = distance.masked_fill(~pairs, 0).amax((1, 2))[:, None]
    gap = distance.masked_fill(~denser, float("inf")).amin(2)
    return torch.where(valid, torch.where(gap.isinf(), farthest, gap) * density, -1.0)


def peaks(
    rows: Tensor, valid: Tensor, count: Tensor, neighbours: int, capped: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the ``count`` best peaks of each set, and the nearest peak of every row.

    Runs over the sets in blocks, so that memory is bounded.

    Parameters
    ----------
    rows : Tensor
        [G, P, C].
    valid : Tensor
        [G, P] bool, False for padding.
    count : Tensor
        [G] long, peaks per set.
    neighbours : int
        Rows in the density estimate.
    capped : bool
        Limit ``neighbours`` to the number of peaks.

    Returns
    -------
    is_peak : Tensor
        [G, P] bool.
    nearest : Tensor
        [G, P] long, nearest peak of each row (itself for a peak; 0 in a set without peaks).
    rank : Tensor
        [G, P] long, rank of every row by falling score.
    """
    size = max(1, CELLS // max(1, rows.shape[1] ** 2))
    blocks = zip(rows.split(size), valid.split(size), count.split(size), strict=True)
    results = [_peaks(part, part_valid, part_count, neighbours, capped) for part, part_valid, part_count in blocks]
    if not results:
        empty = torch.zeros_like(valid, dtype=torch.long)
        return valid, empty, empty
    is_peak, nearest, rank = zip(*results, strict=True)
    return torch.cat(is_peak), torch.cat(nearest), torch.cat(rank)


def _peaks(rows: Tensor, valid: Tensor, count: Tensor, neighbours: int, capped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``peaks`` on one block of sets."""
    if rows.shape[1] == 0:
        empty = torch.zeros_like(valid, dtype=torch.long)
        return valid, empty, empty
    distance = distances(rows.masked_fill(~valid[..., None], 0))
    order = peak_scores(distance, valid, neighbours, count if capped else None).argsort(
        dim=1, descending=True, stable=True
    )
    number = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    rank = torch.empty_like(order).scatter_(1, order, number)
    is_peak = (rank < count[:, None]) & valid
    nearest = distance.masked_fill(~is_peak[:, None], float("inf"))
    # of peaks at the same distance, the one with the higher score
    by_score = nearest.gather(2, order[:, None].expand_as(nearest))
    return is_peak, torch.where(is_peak, number, order.gather(1, by_score.argmin(2))), rank
