"""Greedy choice of tokens one after the other: for coverage of all tokens, or for distance from the chosen ones.

All in float32; on a tie the lower index. Loops run over the tokens to choose, never over tokens or samples, and nothing
waits for the device: a span that needs fewer picks than the longest continues, and its surplus is cut off at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import ranking, ranks

TIE = 1e-5  # of the largest: closer than that, additions in another order would decide, and the lowest index is taken
CLOSE = 1e-6  # the same for sums of gains, which round less: two tokens that are nearest to each other gain the same
RANK = 1e-6  # of its own entry of a kernel: what rounding leaves of a token that is explained wholly


def cosine(rows: Tensor, valid: Tensor) -> Tensor:
    """Compute the cosine similarity of every pair of rows.

    Exactly symmetric, and exactly 1 between a row and itself, unlike a plain matrix product: two tokens that are each
    other's nearest tie, and the lower index must win.

    Parameters
    ----------
    rows : Tensor
        [B, N, C].
    valid : Tensor
        [B, N] bool, False for padding.

    Returns
    -------
    Tensor
        [B, N, N] float32, 0 for padding.
    """
    unit = unit_rows(rows) * valid[..., None]
    table = unit @ unit.transpose(1, 2)
    table = (table + table.transpose(1, 2)).mul_(0.5)
    table.diagonal(dim1=1, dim2=2).copy_(unit.any(-1))
    return table


def greedy_coverage(
    similarity: Tensor, weight: Tensor, valid: Tensor, count: Tensor, total: int, picks: int = 1, add: bool = False
) -> Tensor:
    """Pick tokens by the gain in coverage, sum_u max(0, max over chosen v of similarity[u, v]), times their weight.

    With ``picks`` > 1 several tokens are chosen per step from one pass over the similarities: the best of the 4 *
    ``picks`` largest scores, each times 1 - its similarity to the most similar one before it, so that the picks of a
    step do not cover the same.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32, symmetric.
    weight : Tensor
        [B, N], not negative, factor of each token's gain, or summand with ``add``.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    total : int
        Largest of ``count``, known on the host.
    picks : int
        Tokens chosen per step, at least 1.
    add : bool
        Add weights to gains instead of multiplying.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    # infinite for a token that must be first: inf * 0 is not 0
    weight = weight.clamp(max=torch.finfo(torch.float32).max)
    covered = similarity.new_zeros(similarity.shape[:2])
    out_of_play = covered.masked_fill(~valid, float("-inf"))
    missing = torch.empty_like(similarity)
    order = []
    for _ in range(0, total, picks):
        gain = torch.sub(similarity, covered[:, None], out=missing).relu_().sum(-1)
        score = out_of_play + gain + weight if add else torch.addcmul(out_of_play, gain, weight)
        best = _first(score, CLOSE) if picks == 1 else _dissimilar_picks(score, similarity, picks)
        out_of_play.scatter_(1, best, float("-inf"))
        covered = torch.maximum(covered, gather_rows(similarity, best).amax(1))
        order.append(best)
    return _mask_of(order, count, valid)


def _dissimilar_picks(score: Tensor, similarity: Tensor, picks: int) -> Tensor:
    """Choose the ``picks`` best of large scores [B, N] that are not similar: [B, picks], or all N if there are fewer;
    best first.
    """
    score, position = (t[:, : 4 * picks] for t in score.sort(dim=1, descending=True, stable=True))
    among = gather_rows(similarity, position).gather(2, position[:, None].expand(-1, position.shape[1], -1))
    fresh = 1 - among.tril(-1).amax(2)  # dissimilarity to the earlier candidates
    order = (score * fresh.clamp(min=torch.finfo(torch.float32).tiny)).argsort(dim=1, descending=True, stable=True)
    return position.gather(1, order[:, :picks])


def max_min_diversity(similarity: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Pick the token with the least similar nearest neighbour, then repeatedly the one least similar to its nearest
    pick.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    steps : int
        Largest of ``count``, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    infinity = float("inf")
    itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    nearest = similarity.masked_fill(itself | ~valid[:, None], -infinity).amax(-1)
    out_of_play = torch.zeros_like(nearest).masked_fill(~valid, infinity)
    order = []
    for step in range(steps):
        best = (nearest + out_of_play).argmin(1, keepdim=True)
        out_of_play.scatter_(1, best, infinity)
        row = gather_rows(similarity, best)[:, 0]
        nearest = torch.maximum(nearest, row) if step else row
        order.append(best)
    return _mask_of(order, count, valid)


def pairwise_distance(similarity: Tensor, weight: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Pick the token of largest weight, then repeatedly the one of largest weight times 1 - similarity to its nearest
    pick.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    weight : Tensor
        [B, N], not negative.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    steps : int
        Largest of ``count``, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    out_of_play = torch.zeros_like(weight).masked_fill(~valid, float("-inf"))
    nearest, order = torch.zeros_like(weight), []
    for step in range(steps):
        best = (out_of_play + weight * (1 - nearest)).argmax(1, keepdim=True)
        out_of_play.scatter_(1, best, float("-inf"))
        row = gather_rows(similarity, best)[:, 0]
        nearest = torch.maximum(nearest, row) if step else row
        order.append(best)
    return _mask_of(order, count, valid)


def conditional_kernel(similarity: Tensor, weight: Tensor, ridge: float = 0.0) -> Tensor:
    """Make the kernel w_i (cos(i, j) + ridge [i = j]) w_j of a determinantal point process.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    weight : Tensor
        [B, N].
    ridge : float
        Part of a token that no other token explains: once all are explained, the largest weights are next.

    Returns
    -------
    Tensor
        [B, N, N] float32.
    """
    kernel = similarity.clone()  # changed in place: for a long video this is the largest tensor
    if ridge:
        kernel.diagonal(dim1=1, dim2=2).add_(ridge)
    return kernel.mul_(weight[:, :, None]).mul_(weight[:, None])


def greedy_dpp_map(kernel: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Greedy MAP of a determinantal point process: pick the token whose kernel entry the picks explain least.

    Uses the update of Chen et al. 2018 (arXiv 1709.05135): one pass over the rows chosen so far for each step. A token
    that is explained completely, up to rounding, explains nothing more; where only such tokens remain the lowest are
    picked.

    Parameters
    ----------
    kernel : Tensor
        [B, N, N] float32, positive semidefinite.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    steps : int
        Largest of ``count``, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    unexplained = kernel.diagonal(dim1=1, dim2=2).clone()
    floor = (unexplained * RANK).clamp(min=torch.finfo(torch.float32).tiny)
    out_of_play = torch.zeros_like(unexplained).masked_fill(~valid, float("-inf"))
    parts, order = kernel.new_zeros(len(kernel), max(steps, 1), kernel.shape[1]), []
    for step in range(steps):
        score = unexplained + out_of_play
        best = _first(score, TIE)
        out_of_play.scatter_(1, best, float("-inf"))
        order.append(best)
        earlier, own = parts[:, :step], parts[:, :step].gather(2, best[:, None].expand(-1, step, -1))
        size, least = unexplained.gather(1, best), floor.gather(1, best)
        new = (gather_rows(kernel, best)[:, 0] - (own.transpose(1, 2) @ earlier)[:, 0]) * torch.maximum(
            size, least
        ).rsqrt()
        parts[:, step] = new = torch.where(size > least, new, 0.0)
        unexplained = (unexplained - new.square()).clamp(min=0)
        unexplained = torch.where(unexplained > floor, unexplained, 0.0)
    return _mask_of(order, count, valid)


def farthest_points(rows: Tensor, valid: Tensor, steps: int, start: Tensor) -> Tensor:
    """Farthest point sampling (Euclidean).

    Parameters
    ----------
    rows : Tensor
        [B, N, C].
    valid : Tensor
        [B, N] bool, False for padding.
    steps : int
        Number of picks.
    start : Tensor
        [B] long, first pick.

    Returns
    -------
    Tensor
        [B, steps] long, picks in order; samples with fewer valid tokens repeat some.
    """
    rows, best = rows.float(), start[:, None]
    nearest = torch.full_like(rows[..., 0], torch.inf).masked_fill(~valid, -torch.inf)
    order = []
    for _ in range(steps):
        order.append(best)
        distance = torch.cdist(rows, gather_rows(rows, best), compute_mode="donot_use_mm_for_euclid_dist")[..., 0]
        nearest = torch.minimum(nearest, distance).scatter(1, best, -torch.inf)
        best = nearest.argmax(1, keepdim=True)
    return torch.cat(order, 1) if order else start.new_zeros(len(start), 0)


def greedy_discounted(similarity: Tensor, score: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Pick the token of largest score, which discounts every other score by their similarity, repeatedly (SIEVE).

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32 in [0, 1].
    score : Tensor
        [B, N], not negative.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    steps : int
        Largest of ``count``, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    score, order = score.masked_fill(~valid, -torch.inf), []
    for _ in range(steps):
        best = score.argmax(1, keepdim=True)
        excluded = score == -torch.inf
        score = score * (1 - gather_rows(similarity, best)[:, 0])
        score = score.scatter(1, best, -torch.inf).masked_fill(excluded, -torch.inf)
        order.append(best)
    return _mask_of(order, count, valid)


def greedy_nms(similarity: Tensor, score: Tensor, valid: Tensor, count: Tensor, steps: int, threshold: float) -> Tensor:
    """Non-maximum suppression by falling score (PIO-FVLM, arXiv 2602.04657).

    A token is picked unless its similarity to an earlier pick is ``threshold`` or more; where these are too few, the
    best of the suppressed ones are added.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32.
    score : Tensor
        [B, N].
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, tokens to choose.
    steps : int
        Largest of ``count``, known on the host.
    threshold : float
        Similarity that suppresses.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    tokens = score.shape[1]
    # order of picks: free tokens, suppressed ones, padding
    pick_order = ranks(ranking(score, valid)) + 2 * tokens * ~valid
    free = valid.clone()
    order = []
    for _ in range(steps):
        best = pick_order.argmin(1, keepdim=True)
        near = (gather_rows(similarity, best)[:, 0] >= threshold) & free
        pick_order = pick_order + tokens * near
        free = (free & ~near).scatter(1, best, False)
        pick_order = pick_order.scatter(1, best, 4 * tokens)
        order.append(best)
    return _mask_of(order, count, valid)


def _first(score: Tensor, slack: float) -> Tensor:
    """Lowest index whose score [B, N] is within a relative ``slack`` of the largest: [B, 1]."""
    return (score >= score.amax(1, keepdim=True) * (1 - slack)).int().argmax(1, keepdim=True)


def _mask_of(order: list[Tensor], count: Tensor, valid: Tensor) -> Tensor:
    """Convert the first ``count`` [B] of the picks, each [B, n], to a mask [B, N]."""
    if not order:
        return torch.zeros_like(valid)
    picks = torch.cat(order, 1)
    real = torch.arange(picks.shape[1], device=picks.device) < count[:, None]
    return torch.zeros_like(valid).scatter_reduce_(1, picks, real, "amax")
