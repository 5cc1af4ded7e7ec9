"""Merging tokens: assignment to anchors, and the merged rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.planning.tokens import Selection

BLOCK = 1024  # rows that look for their nearest at once
ROWS = 64  # rows that sort all tokens at once
CELLS = 1 << 22  # of tables of rows x tokens that are there at once


def unit_rows(rows: Tensor) -> Tensor:
    """Scale rows [..., C] to length 1 in float32; rows of zeros stay zeros."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def nearest_anchor(metric: Tensor, members: Tensor, anchors: Tensor, anchor_valid: Tensor) -> Tensor:
    """Assign each member to the anchor with the largest cosine similarity, the first one on a tie.

    Parameters
    ----------
    metric : Tensor
        [B, N, d] features compared by cosine.
    members : Tensor
        [B, P] long, tokens to assign.
    anchors : Tensor
        [B, K] long, anchor tokens.
    anchor_valid : Tensor
        [B, K] bool, False for padding.

    Returns
    -------
    Tensor
        [B, P] long, anchor number.
    """
    unit = unit_rows(metric)
    similarity = gather_rows(unit, members) @ gather_rows(unit, anchors).transpose(1, 2)
    return similarity.masked_fill(~anchor_valid[:, None], float("-inf")).argmax(-1)


def neighbours(metric: Tensor, tokens: Tensor, times: Tensor, count: int) -> Tensor:
    """Find the ``count`` tokens that are most similar to each of ``tokens``, by falling cosine; ties to the lower
    index.

    Runs over blocks of rows, so memory is linear in N.

    Parameters
    ----------
    metric : Tensor
        [B, N, d] features compared by cosine.
    tokens : Tensor
        [B, K] long.
    times : Tensor
        [B, N], multiplicity of each token. A token is its own neighbour only with a multiplicity above 1; tokens of
        multiplicity 0 come last.
    count : int
        Neighbours per token.

    Returns
    -------
    Tensor
        [B, K, min(count, N)] long.
    """
    unit = unit_rows(metric)
    others, missing, once = unit.transpose(1, 2), times <= 0, times.gather(1, tokens) <= 1
    orders = []
    for rows, part_once in zip(tokens.split(ROWS, 1), once.split(ROWS, 1), strict=True):
        likeness = (gather_rows(unit, rows) @ others).masked_fill_(missing[:, None], float("-inf"))
        itself = likeness.gather(2, rows[..., None]).masked_fill(part_once[..., None], float("-inf"))
        order = likeness.scatter_(2, rows[..., None], itself).argsort(dim=2, descending=True, stable=True)
        orders.append(order[..., :count].clone())  # a copy: a view would hold the whole order
    return torch.cat(orders, 1)


def sizes_of(metric: Tensor, kept: Tensor, anchors: Tensor, anchor_valid: Tensor, size: Tensor) -> Tensor:
    """Size of each kept row if every other row is merged into its nearest kept one.

    Runs over blocks of rows, so memory is linear in N.

    Parameters
    ----------
    metric : Tensor
        [B, N, d] features compared by cosine.
    kept : Tensor
        [B, N] bool.
    anchors : Tensor
        [B, K] long, the kept rows.
    anchor_valid : Tensor
        [B, K] bool, False for padding.
    size : Tensor
        [B, N] float32, size of each row before.

    Returns
    -------
    Tensor
        [B, K] float32.
    """
    unit = unit_rows(metric)
    others, total = gather_rows(unit, anchors).transpose(1, 2), size.gather(1, anchors) * anchor_valid
    for rows, leaving in zip(unit.split(BLOCK, 1), (size * ~kept).split(BLOCK, 1), strict=True):
        into = (rows @ others).masked_fill_(~anchor_valid[:, None], float("-inf")).argmax(-1)
        total = total.scatter_add(1, into, leaving)
    return total


def weighed_means(rows: Tensor, size: Tensor, into: Tensor, index: Tensor) -> Tensor:
    """Merge rows into size-weighted means; rows without members are copied bit for bit.

    Parameters
    ----------
    rows : Tensor
        [B, N, C].
    size : Tensor
        [B, N] float32, size of each row.
    into : Tensor
        [B, N] long, target row of each row, its own number if it is kept.
    index : Tensor
        [B, K] long, kept rows.

    Returns
    -------
    Tensor
        [B, K, C] in the dtype of ``rows``, sums in float32.
    """
    target = into[..., None].expand_as(rows)
    total = torch.zeros_like(rows, dtype=torch.float32).scatter_add(1, target, rows.float() * size[..., None])
    weight, members = (torch.zeros_like(size).scatter_add(1, into, x) for x in (size, torch.ones_like(size)))
    # 0: padding
    means = gather_rows(total, index) / weight.gather(1, index).clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return torch.where(members.gather(1, index)[..., None] > 1, means.to(rows.dtype), gather_rows(rows, index))


def in_stretches(dropped: Tensor, count: Tensor) -> Tensor:
    """Group the dropped rows, in order, into ``count`` groups of equal size (up to one).

    No group is empty unless there are fewer dropped rows than groups.

    Parameters
    ----------
    dropped : Tensor
        [B, N] bool.
    count : Tensor
        [B] long.

    Returns
    -------
    Tensor
        [B, N] long, place of the middle row of each dropped row's group; other rows' own place, and every row's where
        ``count`` is 0.
    """
    own = torch.arange(dropped.shape[1], device=dropped.device).expand(dropped.shape)
    total, count = dropped.sum(1, keepdim=True).clamp(min=1), count[:, None]
    group = (dropped.cumsum(1) - 1).clamp(min=0) * count // total
    first, end = (-(-(group + more) * total // count.clamp(min=1)) for more in (0, 1))
    order, _ = pack_right(dropped, dropped.shape[1])
    middle = order.gather(1, ((first + end - 1) // 2).clamp(0, dropped.shape[1] - 1))
    return torch.where(dropped & (count > 0), middle, own)


def merged_rows(features: Tensor, selection: Selection) -> Tensor:
    """Rows of a selection: copies of the kept ones, with the members merged in.

    Sums run in float32. Rows without members are copied unchanged, bit for bit. With weights, and more members than
    tokens, the work is one product of a table [B, K, N] with the features, which autocast must not touch.

    Parameters
    ----------
    features : Tensor
        [B, N, C].
    selection : Selection
        K rows.

    Returns
    -------
    Tensor
        [B, K, C] in the dtype of ``features``.
    """
    rows = gather_rows(features, selection.index)
    if selection.source_tokens.shape[1] == 0:
        return rows
    width = rows.shape[1]
    # one spare row collects the tokens that join no row
    into = selection.target_row.masked_fill(selection.target_row < 0, width)
    if selection.custom_rows is not None:
        return _insert_custom_rows(selection.custom_rows, rows, into)
    if selection.weights is not None:
        return _weighted_rows(features, selection, selection.weights, rows, into)
    members = gather_rows(features, selection.source_tokens).float()
    total = members.new_zeros(rows.shape[0], width + 1, rows.shape[2])
    total = total.scatter_add(1, into[..., None].expand_as(members), members)[:, :width]
    count = members.new_zeros(rows.shape[0], width + 1).scatter_add_(
        1, into, torch.ones_like(into, dtype=members.dtype)
    )[:, :width, None]
    if selection.merge == "mean":
        merged = (rows.float() + total) / (1 + count)
    else:
        merged = rows.float() + total / count.clamp(min=1)
    return torch.where(count > 0, merged.to(rows.dtype), rows)


def _insert_custom_rows(custom: Tensor, rows: Tensor, into: Tensor) -> Tensor:
    """Replace the rows [B, K, C] that have members (``into``, K for none) by custom ones."""
    has_members = _has_members(into, rows.shape[1])
    custom = nn.functional.pad(custom, (0, 0, 0, rows.shape[1] - custom.shape[1]))
    return torch.where(has_members, custom.to(rows.dtype), rows)


def _has_members(into: Tensor, width: int) -> Tensor:
    """Mask [B, width, 1] of the rows that have members; ``into`` [B, P] is ``width`` for none."""
    return into.new_zeros(len(into), width + 1, dtype=torch.bool).scatter_(1, into, True)[:, :width, None]


def by_table(selection: Selection, tokens: int) -> bool:
    """True if weighted members are merged by a table of rows x ``tokens``: where tokens join several rows."""
    return selection.custom_rows is None and selection.weights is not None and selection.source_tokens.shape[1] > tokens


def _weighted_rows(features: Tensor, selection: Selection, weights: Tensor, rows: Tensor, into: Tensor) -> Tensor:
    """Run ``merged_rows`` for weighted members; ``into`` is a row of ``rows`` [B, K, C], or K for none."""
    batch, tokens, width = len(features), features.shape[1], rows.shape[1]
    has_members = _has_members(into, width)
    if not by_table(selection, tokens):
        shares = gather_rows(features, selection.source_tokens).float() * weights.float()[..., None]
        total = shares.new_zeros(batch, width + 1, rows.shape[2]).scatter_add(
            1, into[..., None].expand_as(shares), shares
        )[:, :width]
        return torch.where(has_members, total.to(rows.dtype), rows)
    parts: list[Tensor] = []
    features, weights = features.float(), weights.float()
    for part in rows.split(max(1, CELLS // (batch * tokens)), 1):  # a video has many rows of many tokens
        first, count = sum(done.shape[1] for done in parts), part.shape[1]
        local = torch.where((into >= first) & (into < first + count), into - first, count)
        table = features.new_zeros(batch, (count + 1) * tokens).scatter_add_(
            1, local * tokens + selection.source_tokens, weights
        )
        parts.append(table.unflatten(1, (count + 1, tokens))[:, :count] @ features)
    return torch.where(has_members, torch.cat(parts, 1).to(rows.dtype), rows)


def row_numbers(index: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """Number of the output row at each token: index [B, K] of ``tokens``, valid [B, K] -> [B, N] long, 0 where there is
    none.
    """
    number = torch.arange(index.shape[1], device=index.device).expand_as(index)
    spare = index.new_zeros(len(index), tokens + 1)
    return spare.scatter(1, index.masked_fill(~valid, tokens), number)[:, :tokens]


def shares(into: Tensor, rows: int) -> Tensor:
    """Weight of each member in a plain mean of all members of its row: into [B, P] below ``rows``, -1 for none -> [B,
    P] float32.
    """
    into = into.masked_fill(into < 0, rows)
    one = torch.ones_like(into, dtype=torch.float32)
    return 1 / one.new_zeros(len(into), rows + 1).scatter_add(1, into, one).gather(1, into)


def matched(metric: Tensor, valid: Tensor, protected: int = 0) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461): match every row at an even place with its most similar row at
    an odd one.

    Ties go to the lower place; padding comes last.

    Parameters
    ----------
    metric : Tensor
        [B, T, d] features compared by cosine.
    valid : Tensor
        [B, T] bool, padding on the right.
    protected : int
        First places (class token, distillation token) that are never a target and come last as a source.

    Returns
    -------
    source : Tensor
        [B, ceil(T / 2)] long, even places by falling cosine to their target.
    target : Tensor
        [B, ceil(T / 2)] long, odd place for each source.
    """
    unit = unit_rows(metric)
    likeness = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    likeness = likeness.masked_fill(~valid[:, None, 1::2], float("-inf"))
    likeness[:, :, : protected // 2] = float("-inf")
    if likeness.shape[2] == 0:
        none = torch.zeros_like(valid, dtype=torch.long)
        return none, none
    best, target = likeness.max(2)
    best = best.masked_fill(~valid[:, 0::2], float("-inf"))
    best[:, : (protected + 1) // 2] = float("-inf")
    source = best.argsort(dim=1, descending=True, stable=True)
    return 2 * source, 2 * target.gather(1, source) + 1
