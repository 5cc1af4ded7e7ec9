"""Chosen tokens that take in those that resemble them, each by its weight, so that a token can be part of several rows (LLaVA-PruMerge)."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.merge import neighbours
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.tokens import Selection

TINY = torch.finfo(torch.float32).tiny


def merge_with_neighbours(
    tokens: Tensor, places: Tensor, real: Tensor, valid: Tensor, more: Tensor, weight: Tensor, metric: Tensor, count: int, mean: bool = True
) -> Selection:
    """Each chosen token and the ``count`` that resemble it most make a row, and all that is left one more (arXiv 2403.15388).

    Parameters
    ----------
    tokens, places, real : Tensor
        [B, K] the chosen tokens, where their rows stand (the tokens themselves, but for one that is chosen twice), and which of them are real. A
        place whose token is not chosen is lost: it joins no row. A token that is chosen twice counts twice as a neighbour.
    valid : Tensor
        [B, N] bool.
    more : Tensor
        [B], 1 where there is a row of all that is left, else 0.
    weight : Tensor
        [B, N] not negative: how much a token counts as a neighbour, and in the last row.
    metric : Tensor
        [B, N, d], who resembles whom (cosine).
    mean : bool
        Rows are means, of the token with weight 1 and its neighbours with their shares of all weights; False: sums (released code).
    """
    number = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    none, smaller = weight.new_zeros(valid.shape), real.sum(1) + more < valid.sum(1)
    kept, taken = none.scatter_add(1, tokens, real.float()), none.scatter_add(1, places, real.float())
    rest = valid & (kept + taken == 0)
    share = weight * valid
    if mean:
        share = share / share.sum(1, keepdim=True).clamp(min=TINY)
    near = neighbours(metric, tokens, kept + rest, count)
    often = (gather_rows(kept + rest, near.flatten(1)).view(near.shape) - (near == tokens[..., None]).float()).clamp(min=0)
    often = torch.minimum(often, (count - often.cumsum(2) + often).clamp(min=0))
    part = gather_rows(share, near.flatten(1)).view(near.shape) * often
    part = torch.cat([part.new_ones(*tokens.shape, 1), part], 2)  # the chosen token itself, then its neighbours
    others = share * rest
    if mean:
        part, others = part / part.sum(2, keepdim=True), others / others.sum(1, keepdim=True).clamp(min=TINY)
    joins = torch.cat([real[..., None], (often > 0) & real[..., None]], 2) & smaller[:, None, None]  # what stays whole stays as it is
    row = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    left = more[:, None] > 0
    into = torch.cat([torch.where(joins, row, -1).flatten(1), torch.where(rest & left & smaller[:, None], len(row), -1)], 1)
    members = torch.cat([torch.cat([tokens[..., None], near], 2).flatten(1), number], 1)
    last = share.masked_fill(~rest, -1.0).argmax(1, keepdim=True)
    index, stands, weights = torch.cat([places, last], 1), torch.cat([real, left], 1), torch.cat([part.flatten(1), others], 1)
    return Selection(index, stands, members, into, weights=weights)
