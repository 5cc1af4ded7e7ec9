"""Importance from attention without a full map: one query row, a few query rows, or column sums in blocks. All in float32."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 256  # rows of the score matrix alive at once: H x 256 x T instead of H x T x T


def grouped_logits(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention logits with grouped key heads, keys not repeated.

    query [B, H, Q, d], key [B, Hkv, T, d] -> [B, H, Q, T] float32.
    """
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    query = (query.float() * scaling).reshape(batch, groups, heads // groups * rows, width)  # fewer numbers than logits
    return torch.matmul(query, key.float().transpose(-1, -2)).reshape(batch, heads, rows, -1)


def cls_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Softmax attention of the first row to all others, summed over heads.

    query, key [B, H, 1 + N, d] -> [B, N]. The softmax runs over all 1 + N keys (VisionZip, arXiv 2412.04467, section 3.2).
    """
    weights = grouped_logits(query[:, :, :1], key, scaling).softmax(-1)
    return weights[:, :, 0, 1:].sum(1)


def column_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """How much each token is looked at: mean over heads, sum over queries, of softmax attention.

    query, key [B, H, N, d] -> [B, N]; works through blocks of query rows, so memory is linear in N.
    """
    key, heads = key.float(), query.shape[1]
    total = key.new_zeros(key.shape[0], key.shape[2])
    for block in query.split(QUERY_BLOCK, dim=2):  # no name for a block's weights: it would keep them alive beside the next ones
        total += _column_sums(grouped_logits(block, key, scaling).softmax(-1).flatten(1, 2)) / heads
    return total


def _column_sums(rows: Tensor) -> Tensor:
    """[B, n, T] -> [B, T], as one product: summing twice is two more passes."""
    return (rows.new_ones(1, 1, rows.shape[1]) @ rows)[:, 0]


def query_attention(query: Tensor, key: Tensor, scaling: float, allowed: Tensor, weight: Tensor) -> Tensor:
    """Attention received from a set of query rows: softmax over all allowed keys, mean over heads, weighted mean over queries.

    Parameters
    ----------
    query : Tensor
        [B, H, Q, d] rotated queries of the chosen rows.
    key : Tensor
        [B, Hkv, T, d] rotated keys of every row.
    allowed : Tensor
        [B, Q, T] bool, which key each query may see; every real query must see at least one.
    weight : Tensor
        [B, Q] float32, 0 for padding queries; normalised here.

    Returns
    -------
    Tensor
        [B, T] float32.
    """
    key = key.float()
    total = key.new_zeros(key.shape[0], key.shape[2])
    blocks = zip(query.split(QUERY_BLOCK, 2), allowed.split(QUERY_BLOCK, 1), weight.split(QUERY_BLOCK, 1), strict=True)
    for rows, mask, share in blocks:
        logits = grouped_logits(rows, key, scaling).masked_fill_(~mask[:, None], torch.finfo(torch.float32).min)
        weights = logits.softmax(-1).flatten(1, 2)  # [B, H * Q, T]: heads and queries are summed in one product
        total += (share.repeat(1, query.shape[1])[:, None] @ weights)[:, 0]
    return total / (query.shape[1] * weight.sum(1, keepdim=True))
