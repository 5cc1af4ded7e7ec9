"""Merging tokens: which token joins which anchor, and what the merged rows are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.planning.tokens import Selection

BLOCK = 1024  # rows that look for their nearest at once
ROWS = 64  # rows that sort all tokens at once
CELLS = 1 << 22  # of tables of rows x tokens that are there at once


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [..., C] scaled to length 1 in float32; rows of zeros stay zeros."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def nearest_anchor(metric: Tensor, members: Tensor, anchors: Tensor, anchor_valid: Tensor) -> Tensor:
    """The anchor with the largest cosine similarity for each member, the first one on a tie.

    metric [B, N, d], members [B, P], anchors [B, K], anchor_valid [B, K] -> anchor number [B, P].
    """
    unit = unit_rows(metric)
    similarity = gather_rows(unit, members) @ gather_rows(unit, anchors).transpose(1, 2)
    return similarity.masked_fill(~anchor_valid[:, None], float("-inf")).argmax(-1)


def neighbours(metric: Tensor, tokens: Tensor, times: Tensor, count: int) -> Tensor:
    """The ``count`` tokens that resemble each of ``tokens`` most, by falling cosine; ties to the lower index.

    metric [B, N, d], tokens [B, K], times [B, N] how often each token is there -> token numbers [B, K, min(count, N)]. A token is its own
    neighbour only where it is there more than once; those that are not there come last. Works through blocks of rows, so memory is linear in N.
    """
    unit = unit_rows(metric)
    others, missing, alone = unit.transpose(1, 2), times <= 0, times.gather(1, tokens) <= 1
    found = []
    for rows, single in zip(tokens.split(ROWS, 1), alone.split(ROWS, 1), strict=True):
        likeness = (gather_rows(unit, rows) @ others).masked_fill_(missing[:, None], float("-inf"))
        itself = likeness.gather(2, rows[..., None]).masked_fill(single[..., None], float("-inf"))
        order = likeness.scatter_(2, rows[..., None], itself).argsort(dim=2, descending=True, stable=True)
        found.append(order[..., :count].clone())  # not a view: it would keep the whole order
    return torch.cat(found, 1)


def sizes_of(metric: Tensor, kept: Tensor, anchors: Tensor, anchor_valid: Tensor, given: Tensor) -> Tensor:
    """How many rows each kept one stands for when every other row goes to its nearest: those that it stood for, and those that it is given.

    metric [B, N, d], kept [B, N] bool, anchors [B, K] the kept rows of which anchor_valid [B, K] are real, given [B, N] float32 how many each
    row stood for -> [B, K] float32. Works through blocks of rows, so memory is linear in N.
    """
    unit = unit_rows(metric)
    others, size = gather_rows(unit, anchors).transpose(1, 2), given.gather(1, anchors) * anchor_valid
    for rows, leaving in zip(unit.split(BLOCK, 1), (given * ~kept).split(BLOCK, 1), strict=True):
        into = (rows @ others).masked_fill_(~anchor_valid[:, None], float("-inf")).argmax(-1)
        size = size.scatter_add(1, into, leaving)
    return size


def weighed_means(rows: Tensor, size: Tensor, into: Tensor, index: Tensor) -> Tensor:
    """What is left of rows that join others: rows [B, N, C] that stand for ``size`` [B, N] of them, into [B, N] the row that each joins (its
    own if it stays), index [B, K] those that stay -> [B, K, C] means by size, in float32; rows that nobody joins stay bit for bit.
    """
    target = into[..., None].expand_as(rows)
    total = torch.zeros_like(rows, dtype=torch.float32).scatter_add(1, target, rows.float() * size[..., None])
    weight, members = (torch.zeros_like(size).scatter_add(1, into, x) for x in (size, torch.ones_like(size)))
    means = gather_rows(total, index) / weight.gather(1, index).clamp(min=torch.finfo(torch.float32).tiny)[..., None]  # 0: not a row that is left
    return torch.where(members.gather(1, index)[..., None] > 1, means.to(rows.dtype), gather_rows(rows, index))


def in_stretches(gone: Tensor, count: Tensor) -> Tensor:
    """Rows in groups: those that are ``gone`` [B, N] bool, in order, in ``count`` [B] groups of the same size (but for one) -> [B, N] long, the place
    of the middle one of each one's group; of the others, and where ``count`` is 0, their own place. No group is empty unless there are fewer rows.
    """
    own = torch.arange(gone.shape[1], device=gone.device).expand(gone.shape)
    total, count = gone.sum(1, keepdim=True).clamp(min=1), count[:, None]
    group = (gone.cumsum(1) - 1).clamp(min=0) * count // total
    first, end = (-(-(group + more) * total // count.clamp(min=1)) for more in (0, 1))
    order, _ = pack_right(gone, gone.shape[1])
    middle = order.gather(1, ((first + end - 1) // 2).clamp(0, gone.shape[1] - 1))
    return torch.where(gone & (count > 0), middle, own)


def merged_rows(features: Tensor, selection: Selection) -> Tensor:
    """The rows that a selection leaves: features [B, N, C] -> [B, K, C] in the dtype of ``features``.

    Sums run in float32. Rows without members are copied unchanged, bit for bit. With weights, and more members than each token has once, the work is
    one product of a table [B, K, N], which autocast must not touch.
    """
    rows = gather_rows(features, selection.index)
    if selection.source_tokens.shape[1] == 0:
        return rows
    width = rows.shape[1]
    into = selection.target_row.masked_fill(selection.target_row < 0, width)  # one spare row collects the tokens that join no row
    if selection.custom_rows is not None:
        return _made(selection.custom_rows, rows, into)
    if selection.weights is not None:
        return _weighed(features, selection, selection.weights, rows, into)
    members = gather_rows(features, selection.source_tokens).float()
    total = members.new_zeros(rows.shape[0], width + 1, rows.shape[2])
    total = total.scatter_add(1, into[..., None].expand_as(members), members)[:, :width]
    count = members.new_zeros(rows.shape[0], width + 1).scatter_add_(1, into, torch.ones_like(into, dtype=members.dtype))[:, :width, None]
    if selection.merge == "mean":
        merged = (rows.float() + total) / (1 + count)
    else:
        merged = rows.float() + total / count.clamp(min=1)
    return torch.where(count > 0, merged.to(rows.dtype), rows)


def _made(made: Tensor, rows: Tensor, into: Tensor) -> Tensor:
    """``rows`` [B, K, C], and in place of those that members join (``into``, K for none) what was made of these."""
    joined = _joined(into, rows.shape[1])
    made = nn.functional.pad(made, (0, 0, 0, rows.shape[1] - made.shape[1]))
    return torch.where(joined, made.to(rows.dtype), rows)


def _joined(into: Tensor, width: int) -> Tensor:
    """[B, width, 1] bool: the rows that members join; ``into`` [B, P] is ``width`` for none."""
    return into.new_zeros(len(into), width + 1, dtype=torch.bool).scatter_(1, into, True)[:, :width, None]


def by_table(selection: Selection, tokens: int) -> bool:
    """Whether rows of weighted members are made as the product of a table of rows x ``tokens``: where tokens join several rows."""
    return selection.custom_rows is None and selection.weights is not None and selection.source_tokens.shape[1] > tokens


def _weighed(features: Tensor, selection: Selection, weights: Tensor, rows: Tensor, into: Tensor) -> Tensor:
    """``merged_rows`` where members have weights; ``into`` is a row of ``rows`` [B, K, C] or K."""
    batch, tokens, width = len(features), features.shape[1], rows.shape[1]
    joined = _joined(into, width)
    if not by_table(selection, tokens):
        shares = gather_rows(features, selection.source_tokens).float() * weights.float()[..., None]
        total = shares.new_zeros(batch, width + 1, rows.shape[2]).scatter_add(1, into[..., None].expand_as(shares), shares)[:, :width]
        return torch.where(joined, total.to(rows.dtype), rows)
    made: list[Tensor] = []
    features, weights = features.float(), weights.float()
    for part in rows.split(max(1, CELLS // (batch * tokens)), 1):  # a clip has many rows of many tokens
        first, count = sum(some.shape[1] for some in made), part.shape[1]
        here = torch.where((into >= first) & (into < first + count), into - first, count)
        table = features.new_zeros(batch, (count + 1) * tokens).scatter_add_(1, here * tokens + selection.source_tokens, weights)
        made.append(table.unflatten(1, (count + 1, tokens))[:, :count] @ features)
    return torch.where(joined, torch.cat(made, 1).to(rows.dtype), rows)


def row_numbers(index: Tensor, valid: Tensor, tokens: int) -> Tensor:
    """Which output row stands at each token: index [B, K] of ``tokens`` of which valid [B, K] -> [B, N], 0 where none does."""
    number = torch.arange(index.shape[1], device=index.device).expand_as(index)
    spare = index.new_zeros(len(index), tokens + 1)
    return spare.scatter(1, index.masked_fill(~valid, tokens), number)[:, :tokens]


def shares(into: Tensor, rows: int) -> Tensor:
    """What each member weighs in a plain mean of all that join its row: into [B, P] below ``rows``, -1 for none -> [B, P] float32."""
    into = into.masked_fill(into < 0, rows)
    one = torch.ones_like(into, dtype=torch.float32)
    return 1 / one.new_zeros(len(into), rows + 1).scatter_add(1, into, one).gather(1, into)


def matched(metric: Tensor, valid: Tensor, protected: int = 0) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv 2210.09461): every row at an even place and the row at an odd place that it resembles most.

    metric [B, T, d], valid [B, T] with all that is valid in front -> the even places by falling cosine to that row [B, ceil(T / 2)], and the
    place of that row for each. Ties go to the lower place. The first ``protected`` places (class token, distillation token) come last and
    nobody's row is one of them. Places that are not valid come behind all others.
    """
    unit = unit_rows(metric)
    likeness = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)
    likeness = likeness.masked_fill(~valid[:, None, 1::2], float("-inf"))
    likeness[:, :, : protected // 2] = float("-inf")
    if likeness.shape[2] == 0:
        nobody = torch.zeros_like(valid, dtype=torch.long)
        return nobody, nobody
    best, target = likeness.max(2)
    best = best.masked_fill(~valid[:, 0::2], float("-inf"))
    best[:, : (protected + 1) // 2] = float("-inf")
    source = best.argsort(dim=1, descending=True, stable=True)
    return 2 * source, 2 * target.gather(1, source) + 1
