"""What becomes of tokens that were not chosen: they join chosen ones, or rows of their own. Each function makes the whole selection.

``index`` [B, K] are the chosen tokens in the order of their rows, of which ``valid`` [B, K] are real; ``metric`` [B, N, d] says who is like whom (by
cosine); ties go to the lower row. Nothing is read from the device: what bounds a width is given by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.merge import nearest_anchor, row_numbers
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.ops.select import rank_positions
from duet_vlm.planning.tokens import Selection

TINY = torch.finfo(torch.float32).tiny


def duet_contextual_count(entry: int, tokens: int) -> int:
    """How many of ``entry`` rows DUET-VLM's settings make of tokens that were not chosen, of a picture of ``tokens``: fewer where many enter."""
    return max(0, min(max(1, round(entry * (0.023 if entry >= 0.45 * tokens else 0.17))), entry - 1))


def visionzip_contextual_count(entry: int) -> int:
    """As ``few_more``, by VisionZip's settings: 10 of 64."""
    return max(0, min(round(10 * entry / 64), entry - 1))


def merge_into_nearest(index: Tensor, valid: Tensor, rest: Tensor, most: int, metric: Tensor, weight: Tensor | None = None) -> Selection:
    """Every token of ``rest`` [B, N] bool, at most ``most`` of a picture, joins the chosen one that it is most like.

    A row is the mean of its tokens; with ``weight`` [B, N], not negative, the mean by weight (a plain one where all of a row's weights are 0).
    """
    if index.shape[1] == 0:
        return Selection.keep_only(index, valid)
    members, real = pack_right(rest, max(1, most))
    into = nearest_anchor(metric, members, index, valid).masked_fill(~(real & valid.any(1, keepdim=True)), -1)
    if weight is None:
        return Selection(index, valid, members, into)
    row = torch.full_like(rest, -1, dtype=torch.long).scatter(1, members, into)
    number, spare = torch.arange(index.shape[1], device=index.device).expand(index.shape), index.shape[1]
    joined = valid.new_zeros(len(valid), spare + 1).scatter(1, into.masked_fill(into < 0, spare), True)[:, :-1] & valid
    row = row.scatter_reduce(1, index, torch.where(joined, number, -1), "amax")  # chosen ones are part of rows that others join
    share, bins = weight.float().clamp(min=TINY), row.masked_fill(row < 0, spare)
    total = share.new_zeros(len(row), spare + 1).scatter_add(1, bins, share)
    everyone = torch.arange(row.shape[1], device=row.device).expand(row.shape)
    return Selection(index, valid, everyone, row, weights=share / total.gather(1, bins))


def merge_if_similar(index: Tensor, valid: Tensor, members: Tensor, offered: Tensor, similarity: Tensor, tau: float) -> Selection:
    """The first ``offered`` [B] of ``members`` [B, P], tokens that were not chosen, each join the chosen one that they are most like, if
    ``similarity`` [B, N, N] of the two is above ``tau``; all others leave (DUET+)."""
    if min(members.shape[1], index.shape[1]) == 0:
        return Selection.keep_only(index, valid)
    likeness = gather_rows(similarity, members).gather(2, index[:, None].expand(-1, members.shape[1], -1))
    nearest, into = likeness.masked_fill(~valid[:, None], -torch.inf).max(2)
    joins = (torch.arange(members.shape[1], device=into.device) < offered[:, None]) & (nearest > tau)
    return Selection(index, valid, members, into.masked_fill(~joins, -1))


def merge_around_anchors(
    index: Tensor, valid: Tensor, rest: Tensor, pool: Tensor, count: Tensor, width: int, metric: Tensor, merge: str = "mean", spread: bool = True
) -> Selection:
    """The first ``pool`` [B] of ``rest`` [B, M], tokens that were not chosen, make ``count`` [B] more rows, of which ``width`` is the largest: around
    those at places floor(i pool / count) of the list, each other one joining the one that it is most like (DUET-VLM, arXiv 2602.18846: the next
    ones by importance; VisionZip, arXiv 2412.04467: all, in raster order).

    ``spread=False``: around every (pool // count)-th (both released codes). ``merge`` as in ``Selection``.
    """
    if width == 0:
        return Selection.keep_only(index, valid)
    place, real = rank_positions(count, width, pool) if spread else _stride_anchors(count, width, pool)
    anchors = rest.gather(1, place.clamp(max=rest.shape[1] - 1))
    rank = torch.arange(rest.shape[1], device=rest.device).expand(rest.shape)
    is_anchor = ((rank[:, :, None] == place[:, None]) & real[:, None]).any(-1)
    joins = (rank < pool[:, None]) & ~is_anchor & real.any(1, keepdim=True)
    into = index.shape[1] + nearest_anchor(metric, rest, anchors, real)
    return Selection(torch.cat([index, anchors], 1), torch.cat([valid, real], 1), rest, into.masked_fill(~joins, -1), merge)


def _stride_anchors(count: Tensor, width: int, pool: Tensor) -> tuple[Tensor, Tensor]:
    """As ``places``, but every (pool // count)-th."""
    i = torch.arange(width, device=pool.device).expand(len(pool), -1)
    place = i * (pool // count.clamp(min=1)).clamp(min=1)[:, None]
    return place, (i < count[:, None]) & (place < pool[:, None])


def merge_dpc_clusters(
    index: Tensor, valid: Tensor, rest: Tensor, most: int, count: Tensor, width: int, rows: Tensor, neighbours: int
) -> Selection:
    """The tokens of ``rest`` [B, N] bool, at most ``most`` of a picture, make ``count`` [B] more rows, of which ``width`` is the largest: around
    density peaks among them (``ops.peaks``, by the distances of ``rows`` [B, N, C]), each other one joining the nearest peak."""
    if width == 0:
        return Selection.keep_only(index, valid)
    members, real = pack_right(rest, max(1, most))
    is_peak, nearest, _ = peaks(gather_rows(rows, members), real, count, neighbours)
    place, stands = pack_right(is_peak, width)
    into = index.shape[1] + row_numbers(place, stands, members.shape[1]).gather(1, nearest)
    joins = real & ~is_peak & (count > 0)[:, None]
    both = torch.cat([index, members.gather(1, place)], 1), torch.cat([valid, stands], 1)
    return Selection(*both, members, into.masked_fill(~joins, -1))
