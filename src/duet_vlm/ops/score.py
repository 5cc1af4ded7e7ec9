"""Importance from attention without a full map: one query row, a few query rows, or column sums in blocks. All in
float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows

GOLDEN = (5**0.5 - 1) / 2
QUERY_BLOCK = 256  # rows of the score matrix alive at once: H x 256 x T instead of H x T x T


def grouped_logits(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Compute attention logits for grouped key heads, without repeating keys, with scale and bias fused.

    Parameters
    ----------
    query : Tensor
        [B, H, Q, d].
    key : Tensor
        [B, Hkv, T, d].
    scaling : float
        Factor of the logits.
    bias : Tensor, optional
        [B, Q, T] float32, added to the logits of every head.

    Returns
    -------
    Tensor
        [B, H, Q, T] float32.
    """
    batch, heads, rows, width = query.shape
    groups, shared = key.shape[1], heads // key.shape[1]
    query = query.float().reshape(batch * groups, shared * rows, width)
    key = key.float().flatten(0, 1).transpose(1, 2)
    if bias is None:
        logits = torch.baddbmm(query.new_zeros(()), query, key, beta=0, alpha=scaling)
    else:
        bias = torch.cat([bias] * shared, 1)[:, None].expand(-1, groups, -1, -1).flatten(0, 1)
        logits = torch.baddbmm(bias, query, key, alpha=scaling)
    return logits.view(batch, heads, rows, -1)


def one_head(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Concatenate all heads to a single wide one: [B, H, N, d] and [B, Hkv, N, d] -> [B, 1, N, H d] twice, and its
    scaling.
    """
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
    return query, key, scaling * heads**-0.5


def cls_attention(query: Tensor, key: Tensor, scaling: float, size: Tensor | None = None) -> Tensor:
    """Softmax attention from the first row (CLS) to all others, summed over heads.

    The softmax runs over all 1 + N keys (VisionZip, arXiv 2412.04467, section 3.2).

    Parameters
    ----------
    query, key : Tensor
        [B, H, 1 + N, d].
    scaling : float
        Factor of the logits.
    size : Tensor, optional
        [B, 1 + N] float32, size of each row after merging (its weight in the softmax); 0 for padding.

    Returns
    -------
    Tensor
        [B, N] float32.
    """
    bias = None if size is None else size.log()[:, None].clamp(min=torch.finfo(torch.float32).min)
    weights = grouped_logits(query[:, :, :1], key, scaling, bias).softmax(-1)
    return weights[:, :, 0, 1:].sum(1)


def spread_indices(total: int, count: int | None, device: torch.device) -> Tensor:
    """Choose ``count`` of ``total`` rows, ascending, one from each of as many equal segments; all if there are no more.

    The offset within a segment advances by the golden ratio, so that no column of a grid is sampled more often than
    others.
    """
    if count is None or count >= total:
        return torch.arange(total, device=device)
    number = torch.arange(count, device=device)
    start, end = number * total // count, (number + 1) * total // count
    return start + ((number * GOLDEN).frac() * (end - start)).long()


def sample_rows(valid: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Sample up to ``count`` of the valid rows of each sample, spread evenly.

    Parameters
    ----------
    valid : Tensor
        [B, N] bool, False for padding.
    count : int or None
        Rows per sample; None: all.

    Returns
    -------
    rows : Tensor
        [B, n] long.
    weight : Tensor
        [B, n] float32, 0 for padding, else 1.
    """
    order = (~valid).int().argsort(dim=1, stable=True)
    if count is None or count >= valid.shape[1]:
        return order, valid.gather(1, order).float()
    total = valid.sum(1, keepdim=True)
    number = torch.arange(count, device=valid.device)
    start, end = number * total // count, (number + 1) * total // count
    rank = start + ((number * GOLDEN).frac() * (end - start)).long()
    return order.gather(1, rank.clamp(max=valid.shape[1] - 1)), ((end > start) & (rank < total)).float()


def column_attention(
    query: Tensor, key: Tensor, scaling: float, sample: int | None = None, size: Tensor | None = None
) -> Tensor:
    """Attention received by each token: mean over heads, sum over queries, of softmax attention.

    Runs over blocks of query rows, so memory is linear in N.

    Parameters
    ----------
    query, key : Tensor
        [B, H, N, d].
    scaling : float
        Factor of the logits.
    sample : int, optional
        Number of query rows; the sum is scaled to that of all rows. None: all.
    size : Tensor, optional
        [B, N] float32, size of each row after merging (its weight as a query and as a key); 0 for padding.

    Returns
    -------
    Tensor
        [B, N] float32.
    """
    if size is not None:
        query_rows, query_weight = sample_rows(size > 0, sample)
        query = gather_rows(query.transpose(1, 2), query_rows).transpose(1, 2)
        allowed = (size > 0)[:, None].expand(-1, query_rows.shape[1], -1)
        return query_attention(
            query, key, scaling, allowed, query_weight * size.gather(1, query_rows), size
        ) * size.sum(1, keepdim=True)
    key, heads, num_queries = key.float(), query.shape[1], query.shape[2]
    if sample is not None and sample < num_queries:
        query = query[:, :, spread_indices(num_queries, sample, query.device)]
    heads = heads * query.shape[2] / num_queries
    total = key.new_zeros(key.shape[0], key.shape[2])
    for block in query.split(QUERY_BLOCK, dim=2):  # unnamed weights: a name would hold them during the next block
        total += _column_sums(grouped_logits(block, key, scaling).softmax(-1).flatten(1, 2)) / heads
    return total


def _column_sums(rows: Tensor) -> Tensor:
    """Sum over rows as one matrix product, which saves two passes: [B, n, T] -> [B, T]."""
    return (rows.new_ones(1, 1, rows.shape[1]) @ rows)[:, 0]


def query_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    allowed: Tensor | Callable[[slice], Tensor],
    weight: Tensor,
    size: Tensor | None = None,
    heads: str = "mean",
    divisor: Callable[[slice], Tensor] | None = None,
) -> Tensor:
    """Attention received from a set of query rows: softmax over all allowed keys, mean over heads, weighted mean over
    queries.

    Parameters
    ----------
    query : Tensor
        [B, H, Q, d] rotated queries of the chosen rows.
    key : Tensor
        [B, Hkv, T, d] rotated keys of every row.
    scaling : float
        Factor of the logits.
    allowed : Tensor or callable
        [B, Q, T] bool, keys that each query may attend to, at least one for each valid query; or a function that
        returns the [B, q, T] of a slice of queries.
    weight : Tensor
        [B, Q] float32, 0 for padding queries; normalised here.
    size : Tensor, optional
        [B, T] float32, size of each key after merging.
    heads : str
        "mean" over heads; "max": for each query and key the largest of all heads, before the mean over queries; "most":
        for each key the largest of all heads and queries; "each": by head.
    divisor : callable, optional
        Returns the [B, q, T] by which each head's attention of a slice of queries is divided.

    Returns
    -------
    Tensor
        [B, T] float32; with heads="each" [B, T, H].
    """
    key, count = key.float(), query.shape[1]
    # a prompt without images has no queries: zeros
    total_weight = weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    share = weight / ((count if heads == "mean" else 1) * total_weight)
    total = key.new_zeros(key.shape[0], count if heads == "each" else 1, key.shape[2])
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        block_allowed = allowed(block) if callable(allowed) else allowed[:, block]
        bias = torch.where(block_allowed, 0.0 if size is None else size.log()[:, None], torch.finfo(torch.float32).min)
        weights = grouped_logits(query[:, :, block], key, scaling, bias).softmax(-1)
        if divisor is not None:
            weights /= divisor(block)[:, None]
        if heads == "most":
            is_query = (share[:, block] > 0)[:, None, :, None]
            total = torch.maximum(total, weights.masked_fill(~is_query, 0).amax((1, 2))[:, None])
        else:
            total += _weighted_query_sum(weights, share[:, block], heads)
    return total.transpose(1, 2) if heads == "each" else total[:, 0]


def state_read_out(
    query: Tensor, key: Tensor, gate: Tensor, allowed: Callable[[slice], Tensor], weight: Tensor
) -> Tensor:
    """Score rows by the amount that query rows read out of a linear-attention state, without decay.

    Sum over heads, weighted mean over queries, of gate * abs(query . key).

    Parameters
    ----------
    query : Tensor
        [B, H, Q, d].
    key : Tensor
        [B, H, T, d].
    gate : Tensor
        [B, H, T].
    allowed : callable
        Returns the [B, q, T] bool of a slice of queries.
    weight : Tensor
        [B, Q] float32, normalised here.

    Returns
    -------
    Tensor
        [B, T] float32.
    """
    share = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    total = gate.new_zeros(gate.shape[0], gate.shape[2])
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        read_out = (query[:, :, block] @ key.transpose(2, 3)).abs() * (allowed(block) * share[:, block, None])[:, None]
        total += (read_out.sum(2) * gate).sum(1)
    return total


def _weighted_query_sum(weights: Tensor, share: Tensor, heads: str) -> Tensor:
    """Weighted sum over queries of attention [B, H, Q, T] with ``share`` [B, Q]: [B, H, T] by head, else [B, 1, T]."""
    if heads == "each":
        return (share[:, None, None] @ weights)[:, :, 0]
    if heads == "max":
        return share[:, None] @ weights.amax(1)
    every = share[:, None].expand(-1, weights.shape[1], -1).reshape(len(share), 1, -1)
    return every @ weights.flatten(1, 2)  # heads and queries in one product
