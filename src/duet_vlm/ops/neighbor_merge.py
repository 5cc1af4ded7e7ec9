"""Merge similar tokens into chosen ones by weight, so that a token can be part of several rows (LLaVA-PruMerge)."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.merge import neighbours
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import Selection

TINY = torch.finfo(torch.float32).tiny


def merge_with_neighbours(
    tokens: Tensor,
    places: Tensor,
    real: Tensor,
    valid: Tensor,
    more: Tensor,
    weight: Tensor,
    metric: Tensor,
    count: int,
    mean: bool = True,
) -> Selection:
    """Make a row of each chosen token and its ``count`` nearest neighbours, and one more of all other tokens (arXiv
    2403.15388).

    Parameters
    ----------
    tokens, places, real : Tensor
        [B, K] chosen tokens, the tokens whose positions their rows take (the same, except for a token that is chosen
        twice), and a mask of the valid ones. A token of ``places`` that is not chosen is lost: it joins no row. A token
        that is chosen twice counts twice as a neighbour.
    valid : Tensor
        [B, N] bool, False for padding.
    more : Tensor
        [B] long, 1 for a row of all other tokens, else 0.
    weight : Tensor
        [B, N], not negative: weight of a token as a neighbour, and in the last row.
    metric : Tensor
        [B, N, d] features compared by cosine.
    count : int
        Neighbours per chosen token.
    mean : bool
        True: rows are means, of the token with weight 1 and its neighbours with their shares of all weights; False:
        sums (released code).
    """
    number = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    zeros, reduces = weight.new_zeros(valid.shape), real.sum(1) + more < valid.sum(1)
    kept, occupied = zeros.scatter_add(1, tokens, real.float()), zeros.scatter_add(1, places, real.float())
    rest = valid & (kept + occupied == 0)
    share = weight * valid
    if mean:
        share = share / share.sum(1, keepdim=True).clamp(min=TINY)
    near = neighbours(metric, tokens, kept + rest, count)
    multiplicity = gather_rows(kept + rest, near.flatten(1)).view(near.shape)
    multiplicity = (multiplicity - (near == tokens[..., None]).float()).clamp(min=0)
    multiplicity = torch.minimum(multiplicity, (count - multiplicity.cumsum(2) + multiplicity).clamp(min=0))
    part = gather_rows(share, near.flatten(1)).view(near.shape) * multiplicity
    part = torch.cat([part.new_ones(*tokens.shape, 1), part], 2)  # the chosen token itself, then its neighbours
    others = share * rest
    if mean:
        part, others = part / part.sum(2, keepdim=True), others / others.sum(1, keepdim=True).clamp(min=TINY)
    # spans without reduction do not change
    joins = torch.cat([real[..., None], (multiplicity > 0) & real[..., None]], 2) & reduces[:, None, None]
    row = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    has_last = more[:, None] > 0
    to_chosen = torch.where(joins, row, -1).flatten(1)
    to_last = torch.where(rest & has_last & reduces[:, None], len(row), -1)
    into = torch.cat([to_chosen, to_last], 1)
    members = torch.cat([torch.cat([tokens[..., None], near], 2).flatten(1), number], 1)
    last = share.masked_fill(~rest, -1.0).argmax(1, keepdim=True)
    index, row_valid = torch.cat([places, last], 1), torch.cat([real, has_last], 1)
    weights = torch.cat([part.flatten(1), others], 1)
    return Selection(index, row_valid, members, into, weights=weights)
