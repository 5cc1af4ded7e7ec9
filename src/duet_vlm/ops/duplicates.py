"""Shortening a list of tokens by letting leave, again and again, those that another of the list resembles most (VisPruner, arXiv 2412.01818)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.ragged import gather_rows, pack_right, upload
from duet_vlm.ops.select import ranking, top

ROUND = 8  # tokens that leave together


def remove_duplicates(similarity: Tensor, scores: Tensor, valid: Tensor, sizes: Sequence[tuple[int, int]], important: float) -> Tensor:
    """The best tokens by score, and of the others those that no other resembles.

    The others stand in a list by falling score. Every other one of them (places 0, 2, 4, ...) is compared with those between, and the ``ROUND``
    that resemble one of these most leave; the rest, most similar first, then those between, make the next list, until as many are left as are
    wanted.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    scores, valid : Tensor
        [B, N].
    sizes : sequence of (int, int)
        Of each picture, known on the host: how many tokens there are, and how many to choose.
    important : float
        Share of them that the score alone chooses, in [0, 1].

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    best = [int(chosen * important) for _, chosen in sizes]
    wanted = upload([chosen - n for (_, chosen), n in zip(sizes, best, strict=True)], valid.device)
    first = top(scores, valid, upload(best, valid.device))
    rest = valid & ~first
    order, length = ranking(scores, rest), rest.sum(1)
    for _ in range(max(_rounds(tokens - n, chosen - n) for (tokens, chosen), n in zip(sizes, best, strict=True))):
        order, length = _fewer(similarity, order, length, wanted)
    place = torch.arange(order.shape[1], device=order.device)
    return first | torch.zeros_like(first).scatter(1, order, place < torch.minimum(length, wanted)[:, None])


def _rounds(length: int, wanted: int) -> int:
    """How often a list of ``length`` gets shorter until ``wanted`` are left; none where nobody is wanted."""
    count = 0
    while length > wanted > 0:
        length -= min(ROUND, length - wanted, (length + 1) // 2)
        count += 1
    return count


def _fewer(similarity: Tensor, order: Tensor, length: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """One round: lists ``order`` [B, R], the first ``length`` [B] of each alive, and what becomes of them; lists that are short enough stay."""
    place = torch.arange(order.shape[1], device=order.device)
    alive = place < length[:, None]
    asked, between = order[:, 0::2], order[:, 1::2]
    alike = gather_rows(similarity, asked).gather(2, between[:, None].expand(-1, asked.shape[1], -1))
    best = alike.masked_fill(~alive[:, None, 1::2], -torch.inf).amax(2) if between.shape[1] else similarity.new_zeros(asked.shape)
    leave = torch.minimum(length - wanted, (length + 1) // 2).clamp(0, ROUND)
    sorted_by = ranking(best.clamp(min=-2.0), alive[:, 0::2])  # nobody between: less alike than any cosine, but in the list
    stays = alive[:, 0::2] & (torch.arange(asked.shape[1], device=order.device) >= leave[:, None])
    candidates = torch.cat([asked.gather(1, sorted_by), between], 1)
    index, _ = pack_right(torch.cat([stays, alive[:, 1::2]], 1), order.shape[1])
    shorter = (leave > 0)[:, None]
    return torch.where(shorter, candidates.gather(1, index), order), length - leave
