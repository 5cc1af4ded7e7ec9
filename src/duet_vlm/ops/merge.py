"""Merging tokens: which token joins which anchor, and what the merged rows are."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.ragged import take
from duet_vlm.tokens import Selection

BLOCK = 1024  # rows that look for their nearest at once


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [..., C] scaled to length 1 in float32; rows of zeros stay zeros."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def nearest_anchor(metric: Tensor, members: Tensor, anchors: Tensor, anchor_valid: Tensor) -> Tensor:
    """The anchor with the largest cosine similarity for each member, the first one on a tie.

    metric [B, N, d], members [B, P], anchors [B, K], anchor_valid [B, K] -> anchor number [B, P].
    """
    unit = unit_rows(metric)
    similarity = take(unit, members) @ take(unit, anchors).transpose(1, 2)
    return similarity.masked_fill(~anchor_valid[:, None], float("-inf")).argmax(-1)


def sizes_of(metric: Tensor, kept: Tensor, anchors: Tensor, anchor_valid: Tensor) -> Tensor:
    """How many rows each kept one stands for when every other row goes to its nearest: 1 + those that it is given.

    metric [B, N, d], kept [B, N] bool, anchors [B, K] the kept rows of which anchor_valid [B, K] are real -> [B, K] float32. Works through
    blocks of rows, so memory is linear in N.
    """
    unit = unit_rows(metric)
    others, size = take(unit, anchors).transpose(1, 2), anchor_valid.float()
    for rows, stays in zip(unit.split(BLOCK, 1), kept.split(BLOCK, 1), strict=True):
        into = (rows @ others).masked_fill_(~anchor_valid[:, None], float("-inf")).argmax(-1)
        size = size.scatter_add(1, into, (~stays).float())
    return size


def merged_rows(features: Tensor, selection: Selection) -> Tensor:
    """The rows that a selection leaves: features [B, N, C] -> [B, K, C] in the dtype of ``features``.

    Sums run in float32. Rows without members are copied unchanged, bit for bit.
    """
    rows = take(features, selection.index)
    if selection.members.shape[1] == 0:
        return rows
    width = rows.shape[1]
    into = selection.into.masked_fill(selection.into < 0, width)  # one spare row collects the tokens that join no row
    members = take(features, selection.members).float()
    total = members.new_zeros(rows.shape[0], width + 1, rows.shape[2])
    total = total.scatter_add(1, into[..., None].expand_as(members), members)[:, :width]
    count = members.new_zeros(rows.shape[0], width + 1).scatter_add_(1, into, torch.ones_like(into, dtype=members.dtype))[:, :width, None]
    if selection.merge == "mean":
        merged = (rows.float() + total) / (1 + count)
    else:
        merged = rows.float() + total / count.clamp(min=1)
    return torch.where(count > 0, merged.to(rows.dtype), rows)
