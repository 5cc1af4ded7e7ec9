"""Density peaks (DPC-KNN): rows that many others are near, and that are far from every row of which that is more true.

Du, Ding, Jia: "Study on density peaks clustering based on k-nearest neighbors", 2016. Sets of rows are a batch; ties go to the lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 1 << 25  # of tables of distances alive at once


def distances(rows: Tensor) -> Tensor:
    """Between all rows of every set, divided by the root of their width: [G, P, C] -> [G, P, P] float32."""
    rows = rows.float()
    rows = rows - rows.mean(1, keepdim=True)  # products of smaller numbers round less
    length = rows.square().sum(-1)
    squares = torch.baddbmm(length[:, :, None] + length[:, None], rows, rows.transpose(1, 2), alpha=-2).clamp_(min=0)
    squares.diagonal(dim1=1, dim2=2).zero_()
    return ((squares + squares.transpose(1, 2)) / (2 * rows.shape[2])).sqrt_()  # the same in both directions, to the last bit


def peak_scores(apart: Tensor, real: Tensor, neighbours: int, most: Tensor | None = None) -> Tensor:
    """Density times distance to the nearest denser row: apart [G, P, P], real [G, P] -> [G, P], -1 where not real.

    Density is exp(-mean of the squared distances to the nearest ``neighbours``), the row itself being one, not more than there are nor than
    ``most`` [G]. The densest row has the largest distance of the set.
    """
    both = real[:, :, None] & real[:, None]
    near = apart.masked_fill(~both, float("inf")).topk(min(neighbours, apart.shape[2]), largest=False).values
    count = real.sum(1) if most is None else torch.minimum(most, real.sum(1))
    count = count.clamp(1, near.shape[2])[:, None, None]
    counted = torch.arange(near.shape[2], device=near.device) < count
    density = (-near.masked_fill(~counted | near.isinf(), 0).square().sum(2) / count[:, 0]).exp()
    place = torch.arange(density.shape[1], device=density.device)
    equal_before = (density[:, None] == density[:, :, None]) & (place[None] < place[:, None])
    denser = ((density[:, None] > density[:, :, None]) | equal_before) & both
    farthest = apart.masked_fill(~both, 0).amax((1, 2))[:, None]
    gap = apart.masked_fill(~denser, float("inf")).amin(2)
    return torch.where(real, torch.where(gap.isinf(), farthest, gap) * density, -1.0)


def peaks(rows: Tensor, real: Tensor, count: Tensor, neighbours: int, capped: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` [G] best peaks of each set and the peak that every row is nearest to.

    rows [G, P, C], real [G, P] -> is a peak [G, P] bool, nearest peak [G, P] (itself for a peak; 0 in a set without), place of every row by
    falling score [G, P]. ``neighbours`` decide the density; ``capped``: no more of them than peaks. Works through the sets in blocks, so that
    memory is bounded.
    """
    block = max(1, CELLS // max(1, rows.shape[1] ** 2))
    blocks = zip(rows.split(block), real.split(block), count.split(block), strict=True)
    found = [_peaks(some, there, wanted, neighbours, capped) for some, there, wanted in blocks]
    if not found:
        empty = torch.zeros_like(real, dtype=torch.long)
        return real, empty, empty
    chosen, nearest, place = zip(*found, strict=True)
    return torch.cat(chosen), torch.cat(nearest), torch.cat(place)


def _peaks(rows: Tensor, real: Tensor, count: Tensor, neighbours: int, capped: bool) -> tuple[Tensor, Tensor, Tensor]:
    if rows.shape[1] == 0:
        empty = torch.zeros_like(real, dtype=torch.long)
        return real, empty, empty
    apart = distances(rows.masked_fill(~real[..., None], 0))
    order = peak_scores(apart, real, neighbours, count if capped else None).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand(order.shape)
    place = torch.empty_like(order).scatter_(1, order, places)
    chosen = (place < count[:, None]) & real
    nearest = apart.masked_fill(~chosen[:, None], float("inf"))
    by_score = nearest.gather(2, order[:, None].expand_as(nearest))  # of peaks at the same distance, the better one
    return chosen, torch.where(chosen, places, order.gather(1, by_score.argmin(2))), place
