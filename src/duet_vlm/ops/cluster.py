"""Clustering rows around density peaks."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.ragged import take
from duet_vlm.ops.select import ranking


def density_peaks(rows: Tensor, valid: Tensor, count: Tensor, nearest: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Clusters around rows that are dense and far from any denser one (DPC-KNN, Du et al. 2016).

    The density of a row is exp(-mean of its ``nearest`` smallest squared distances, its own included), distances being L2 / sqrt(D); of equally
    dense rows the earlier one counts as denser. Centres are the rows with the largest product of density and distance to the nearest denser
    row (of the densest: the largest distance of all); every other row joins the nearest centre. Ties go to the earlier row or centre.

    Parameters
    ----------
    rows : Tensor
        [B, P, D]; computed in float32.
    valid : Tensor
        [B, P] bool.
    count, nearest : Tensor
        [B] clusters, and neighbours that density looks at; at most as many as rows are valid.
    width : int
        The largest ``count``.

    Returns
    -------
    centres, into : Tensor
        [B, width] rows by falling product, those from ``count`` on meaningless; [B, P] the number of each row's centre.
    """
    rows = rows.float()
    # not through a product of matrices: rows that are each other's nearest must come out equally dense
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[2] ** 0.5
    pair = valid[:, None] & valid[..., None]
    near = distance.masked_fill(~pair, torch.inf).sort(dim=2).values
    among = torch.arange(near.shape[2], device=rows.device) < nearest[:, None, None]
    density = (-(near.square().masked_fill(~among, 0).sum(2) / nearest[:, None])).exp()
    order = ranking(density, valid)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=rows.device).expand_as(order))
    denser = (place[:, None] < place[..., None]) & pair
    farthest = distance.masked_fill(~pair, 0).flatten(1).amax(1)[:, None]
    apart = torch.minimum(distance.masked_fill(~denser, torch.inf).amin(2), farthest)
    centres = ranking(apart * density, valid)[:, :width]
    real = torch.arange(width, device=rows.device) < count[:, None]
    into = take(distance, centres).masked_fill(~real[..., None], torch.inf).argmin(1)
    number = torch.arange(width, device=rows.device).expand_as(centres)
    own = torch.full_like(into, -1).scatter_reduce(1, centres, number.masked_fill(~real, -1), "amax")
    return centres, torch.where(own >= 0, own, into)
