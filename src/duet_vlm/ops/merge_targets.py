"""Targets of the tokens that were not chosen: chosen tokens, or rows of their own. Each function makes the whole
selection.

``index`` [B, K] are the chosen tokens in the order of their rows, of which ``valid`` [B, K] are no padding; ``metric``
[B, N, d] are features compared by cosine; ties go to the lower row. Nothing waits for the device: the caller passes
bounds of widths.
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
    """Number of contextual rows among ``entry`` rows in DUET-VLM's settings, for an image of ``tokens``: fewer at a
    large entry.
    """
    return max(0, min(max(1, round(entry * (0.023 if entry >= 0.45 * tokens else 0.17))), entry - 1))


def visionzip_contextual_count(entry: int) -> int:
    """Number of contextual rows among ``entry`` rows in VisionZip's settings: 10 of 64."""
    return max(0, min(round(10 * entry / 64), entry - 1))


def merge_into_nearest(
    index: Tensor, valid: Tensor, rest: Tensor, most: int, metric: Tensor, weight: Tensor | None = None
) -> Selection:
    """Merge every token of ``rest`` into the chosen token most similar to it.

    Parameters
    ----------
    index, valid, metric : Tensor
        As in the module's docstring.
    rest : Tensor
        [B, N] bool, tokens to merge.
    most : int
        Largest number of them in an image, known on the host.
    weight : Tensor, optional
        [B, N], not negative: a row is the weighted mean of its tokens (a plain one where all of its weights are 0).
    """
    if index.shape[1] == 0:
        return Selection.keep_only(index, valid)
    members, real = pack_right(rest, max(1, most))
    into = nearest_anchor(metric, members, index, valid).masked_fill(~(real & valid.any(1, keepdim=True)), -1)
    if weight is None:
        return Selection(index, valid, members, into)
    row = torch.full_like(rest, -1, dtype=torch.long).scatter(1, members, into)
    number, spare = torch.arange(index.shape[1], device=index.device).expand(index.shape), index.shape[1]
    has_members = (
        valid.new_zeros(len(valid), spare + 1).scatter(1, into.masked_fill(into < 0, spare), True)[:, :-1] & valid
    )
    # a chosen token is a member of its row if others join it
    row = row.scatter_reduce(1, index, torch.where(has_members, number, -1), "amax")
    share, bins = weight.float().clamp(min=TINY), row.masked_fill(row < 0, spare)
    total = share.new_zeros(len(row), spare + 1).scatter_add(1, bins, share)
    all_tokens = torch.arange(row.shape[1], device=row.device).expand(row.shape)
    return Selection(index, valid, all_tokens, row, weights=share / total.gather(1, bins))


def merge_if_similar(
    index: Tensor, valid: Tensor, members: Tensor, offered: Tensor, similarity: Tensor, tau: float
) -> Selection:
    """Merge each of the first ``offered`` members into the chosen token most similar to it, if the two are similar
    enough (DUET+).

    All other tokens are dropped.

    Parameters
    ----------
    index, valid : Tensor
        As in the module's docstring.
    members : Tensor
        [B, P] long, tokens that were not chosen, best first.
    offered : Tensor
        [B] long, members that may merge.
    similarity : Tensor
        [B, N, N].
    tau : float
        Similarity above which two tokens merge.
    """
    if min(members.shape[1], index.shape[1]) == 0:
        return Selection.keep_only(index, valid)
    likeness = gather_rows(similarity, members).gather(2, index[:, None].expand(-1, members.shape[1], -1))
    nearest, into = likeness.masked_fill(~valid[:, None], -torch.inf).max(2)
    joins = (torch.arange(members.shape[1], device=into.device) < offered[:, None]) & (nearest > tau)
    return Selection(index, valid, members, into.masked_fill(~joins, -1))


def merge_around_anchors(
    index: Tensor,
    valid: Tensor,
    rest: Tensor,
    pool: Tensor,
    count: Tensor,
    width: int,
    metric: Tensor,
    merge: str = "mean",
    spread: bool = True,
) -> Selection:
    """Merge unchosen tokens into contextual rows around anchors spaced over a list.

    Anchors are at places floor(i pool / count) of the list, and each other token of the list joins the anchor most
    similar to it. DUET-VLM (arXiv 2602.18846) lists the next tokens by importance; VisionZip (arXiv 2412.04467) all
    others in raster order.

    Parameters
    ----------
    index, valid, metric : Tensor
        As in the module's docstring.
    rest : Tensor
        [B, M] long, the list of tokens that were not chosen.
    pool : Tensor
        [B] long, the first entries of the list that take part.
    count : Tensor
        [B] long, contextual rows.
    width : int
        Largest of ``count``, known on the host.
    merge : str
        As in ``Selection``.
    spread : bool
        False: anchors at every (pool // count)-th place (both released codes).
    """
    if width == 0:
        return Selection.keep_only(index, valid)
    position, real = rank_positions(count, width, pool) if spread else _stride_anchors(count, width, pool)
    anchors = rest.gather(1, position.clamp(max=rest.shape[1] - 1))
    rank = torch.arange(rest.shape[1], device=rest.device).expand(rest.shape)
    is_anchor = ((rank[:, :, None] == position[:, None]) & real[:, None]).any(-1)
    joins = (rank < pool[:, None]) & ~is_anchor & real.any(1, keepdim=True)
    into = index.shape[1] + nearest_anchor(metric, rest, anchors, real)
    return Selection(
        torch.cat([index, anchors], 1), torch.cat([valid, real], 1), rest, into.masked_fill(~joins, -1), merge
    )


def _stride_anchors(count: Tensor, width: int, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the anchors at every (pool // count)-th entry, and a mask of the valid ones: [B, width] each."""
    i = torch.arange(width, device=pool.device).expand(len(pool), -1)
    position = i * (pool // count.clamp(min=1)).clamp(min=1)[:, None]
    return position, (i < count[:, None]) & (position < pool[:, None])


def merge_dpc_clusters(
    index: Tensor, valid: Tensor, rest: Tensor, most: int, count: Tensor, width: int, rows: Tensor, neighbours: int
) -> Selection:
    """Merge unchosen tokens into contextual rows around density peaks (``ops.dpc_knn.peaks``), each into the nearest
    peak.

    Parameters
    ----------
    index, valid : Tensor
        As in the module's docstring.
    rest : Tensor
        [B, N] bool, tokens to merge.
    most : int
        Largest number of them in an image, known on the host.
    count : Tensor
        [B] long, contextual rows.
    width : int
        Largest of ``count``, known on the host.
    rows : Tensor
        [B, N, C] features whose distances are used.
    neighbours : int
        Rows in the density estimate.
    """
    if width == 0:
        return Selection.keep_only(index, valid)
    members, real = pack_right(rest, max(1, most))
    is_peak, nearest, _ = peaks(gather_rows(rows, members), real, count, neighbours)
    position, place_valid = pack_right(is_peak, width)
    into = index.shape[1] + row_numbers(position, place_valid, members.shape[1]).gather(1, nearest)
    joins = real & ~is_peak & (count > 0)[:, None]
    both = torch.cat([index, members.gather(1, position)], 1), torch.cat([valid, place_valid], 1)
    return Selection(*both, members, into.masked_fill(~joins, -1))
