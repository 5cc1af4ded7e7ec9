"""Importance from attention without a full map: one query row, a few query rows, or column sums in blocks. All in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows

GOLDEN = (5**0.5 - 1) / 2
QUERY_BLOCK = 256  # rows of the score matrix alive at once: H x 256 x T instead of H x T x T


def grouped_logits(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Attention logits with grouped key heads, keys not repeated, and scale and bias not passes of their own.

    query [B, H, Q, d], key [B, Hkv, T, d], bias [B, Q, T] float32 -> [B, H, Q, T] float32.
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
    """All heads side by side as a single one: [B, H, N, d] and [B, Hkv, N, d] -> [B, 1, N, H d] twice, and the scaling for that width."""
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
    return query, key, scaling * heads**-0.5


def cls_attention(query: Tensor, key: Tensor, scaling: float, size: Tensor | None = None) -> Tensor:
    """Softmax attention of the first row to all others, summed over heads.

    query, key [B, H, 1 + N, d] -> [B, N]. The softmax runs over all 1 + N keys (VisionZip, arXiv 2412.04467, section 3.2); a row that stands
    for ``size`` [B, 1 + N] of them counts as often, one of size 0 is not there.
    """
    bias = None if size is None else size.log()[:, None].clamp(min=torch.finfo(torch.float32).min)
    weights = grouped_logits(query[:, :, :1], key, scaling, bias).softmax(-1)
    return weights[:, :, 0, 1:].sum(1)


def spread_indices(total: int, count: int | None, device: torch.device) -> Tensor:
    """``count`` of ``total`` rows, ascending, one from each of as many equal stretches; all where there are no more.

    Where in its stretch a row is taken moves on by the golden ratio, so that no column of a grid is met more often than others.
    """
    if count is None or count >= total:
        return torch.arange(total, device=device)
    number = torch.arange(count, device=device)
    start, end = number * total // count, (number + 1) * total // count
    return start + ((number * GOLDEN).frac() * (end - start)).long()


def sample_rows(real: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Up to ``count`` of the real rows of each sample, spread over them: real [B, N] bool -> rows [B, n] and their weight, 0 or 1, float32."""
    order = (~real).int().argsort(dim=1, stable=True)
    if count is None or count >= real.shape[1]:
        return order, real.gather(1, order).float()
    total = real.sum(1, keepdim=True)
    number = torch.arange(count, device=real.device)
    start, end = number * total // count, (number + 1) * total // count
    rank = start + ((number * GOLDEN).frac() * (end - start)).long()
    return order.gather(1, rank.clamp(max=real.shape[1] - 1)), ((end > start) & (rank < total)).float()


def column_attention(query: Tensor, key: Tensor, scaling: float, sample: int | None = None, size: Tensor | None = None) -> Tensor:
    """How much each token is looked at: mean over heads, sum over queries, of softmax attention.

    query, key [B, H, N, d] -> [B, N]; works through blocks of query rows, so memory is linear in N. ``sample`` query rows stand for all
    (None: all ask); the sum is scaled to what all would give. A row that stands for ``size`` [B, N] of them asks and is looked at as often,
    one of size 0 is not there.
    """
    if size is not None:
        asks, real = sample_rows(size > 0, sample)
        query = gather_rows(query.transpose(1, 2), asks).transpose(1, 2)
        everyone = (size > 0)[:, None].expand(-1, asks.shape[1], -1)
        return query_attention(query, key, scaling, everyone, real * size.gather(1, asks), size) * size.sum(1, keepdim=True)
    key, heads, every = key.float(), query.shape[1], query.shape[2]
    if sample is not None and sample < every:
        query = query[:, :, spread_indices(every, sample, query.device)]
    heads = heads * query.shape[2] / every
    total = key.new_zeros(key.shape[0], key.shape[2])
    for block in query.split(QUERY_BLOCK, dim=2):  # no name for a block's weights: it would keep them alive beside the next ones
        total += _column_sums(grouped_logits(block, key, scaling).softmax(-1).flatten(1, 2)) / heads
    return total


def _column_sums(rows: Tensor) -> Tensor:
    """[B, n, T] -> [B, T], as one product: summing twice is two more passes."""
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
    """Attention received from a set of query rows: softmax over all allowed keys, mean over heads, weighted mean over queries.

    Parameters
    ----------
    query : Tensor
        [B, H, Q, d] rotated queries of the chosen rows.
    key : Tensor
        [B, Hkv, T, d] rotated keys of every row.
    allowed : Tensor or callable
        [B, Q, T] bool, which key each query may see; every real query must see at least one. A function gives the [B, q, T] of a slice of queries.
    weight : Tensor
        [B, Q] float32, 0 for padding queries; normalised here.
    size : Tensor, optional
        [B, T] float32, how many rows each key stands for.
    heads : str
        "mean" over heads; "max": for each query and key the largest of all heads, before the mean over queries; "most": for each key the largest of
        all heads and queries; "each": by head.
    divisor : callable, optional
        [B, q, T] that each head's attention of the queries of a slice is divided by.

    Returns
    -------
    Tensor
        [B, T] float32; with heads="each" [B, T, H].
    """
    key, count = key.float(), query.shape[1]
    asked = weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # nobody asks in a prompt without images: zeros
    share = weight / ((count if heads == "mean" else 1) * asked)
    total = key.new_zeros(key.shape[0], count if heads == "each" else 1, key.shape[2])
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        seen = allowed(block) if callable(allowed) else allowed[:, block]
        bias = torch.where(seen, 0.0 if size is None else size.log()[:, None], torch.finfo(torch.float32).min)
        weights = grouped_logits(query[:, :, block], key, scaling, bias).softmax(-1)
        if divisor is not None:
            weights /= divisor(block)[:, None]
        if heads == "most":
            asks = (share[:, block] > 0)[:, None, :, None]
            total = torch.maximum(total, weights.masked_fill(~asks, 0).amax((1, 2))[:, None])
        else:
            total += _asked(weights, share[:, block], heads)
    return total.transpose(1, 2) if heads == "each" else total[:, 0]


def state_read_out(query: Tensor, key: Tensor, gate: Tensor, allowed: Callable[[slice], Tensor], weight: Tensor) -> Tensor:
    """How much of each row a set of query rows reads out of a linear layer's state, fading left out: sum over heads, weighted mean over queries, of
    gate * abs(query . key).

    query [B, H, Q, d], key [B, H, T, d], gate [B, H, T]; ``allowed`` gives the [B, q, T] bool of a slice of queries, weight [B, Q] float32 is
    normalised here -> [B, T] float32.
    """
    share = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    total = gate.new_zeros(gate.shape[0], gate.shape[2])
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        read = (query[:, :, block] @ key.transpose(2, 3)).abs() * (allowed(block) * share[:, block, None])[:, None]
        total += (read.sum(2) * gate).sum(1)
    return total


def _asked(weights: Tensor, share: Tensor, heads: str) -> Tensor:
    """Weighted sum over queries of attention [B, H, Q, T], ``share`` [B, Q]: -> [B, H, T] by head, else [B, 1, T]."""
    if heads == "each":
        return (share[:, None, None] @ weights)[:, :, 0]
    if heads == "max":
        return share[:, None] @ weights.amax(1)
    every = share[:, None].expand(-1, weights.shape[1], -1).reshape(len(share), 1, -1)
    return every @ weights.flatten(1, 2)  # heads and queries in one product
