"""Choosing tokens one after the other, each in view of those before: to cover all tokens, or to stay far from the chosen.

All in float32; on a tie the lower index. The loops run over the tokens to choose, never over tokens or samples, and read nothing back to the
host: a span that needs fewer picks than the longest goes on picking, and its surplus is cut off at the end.
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
    """Cosine similarity of every pair: rows [B, N, C], valid [B, N] -> [B, N, N] float32, 0 where either row is not valid.

    Exactly symmetric and exactly 1 between a row and itself, which a matrix product is not: two tokens that are each other's nearest tie,
    and the lower index must win.
    """
    unit = unit_rows(rows) * valid[..., None]
    table = unit @ unit.transpose(1, 2)
    table = (table + table.transpose(1, 2)).mul_(0.5)
    table.diagonal(dim1=1, dim2=2).copy_(unit.any(-1))
    return table


def greedy_coverage(similarity: Tensor, weight: Tensor, valid: Tensor, count: Tensor, total: int, picks: int = 1, add: bool = False) -> Tensor:
    """Greedy coverage: again and again the token that adds most to sum_u max(0, max over chosen v of similarity[u, v]), times its weight.

    With ``picks`` > 1 that many are chosen in one step, the similarities being read once: the best of the 4 * ``picks`` largest scores, each
    times 1 - its similarity to the most similar one before it, so that the picks of a step do not cover the same.

    Parameters
    ----------
    similarity : Tensor
        [B, N, N] float32, symmetric.
    weight : Tensor
        [B, N], what each token's gain is multiplied by, or what is added to it (``add``); not negative.
    valid : Tensor
        [B, N] bool.
    count : Tensor
        [B], how many tokens to choose; ``total`` is the largest of them, known on the host.

    Returns
    -------
    Tensor
        [B, N] bool, the chosen tokens.
    """
    weight = weight.clamp(max=torch.finfo(torch.float32).max)  # of a row that must come first: times a gain of 0 it has to be 0
    covered = similarity.new_zeros(similarity.shape[:2])
    out_of_play = covered.masked_fill(~valid, float("-inf"))
    missing = torch.empty_like(similarity)
    order = []
    for _ in range(0, total, picks):
        gain = torch.sub(similarity, covered[:, None], out=missing).relu_().sum(-1)
        score = out_of_play + gain + weight if add else torch.addcmul(out_of_play, gain, weight)
        best = _first(score, CLOSE) if picks == 1 else _unlike(score, similarity, picks)
        out_of_play.scatter_(1, best, float("-inf"))
        covered = torch.maximum(covered, gather_rows(similarity, best).amax(1))
        order.append(best)
    return _mask_of(order, count, valid)


def _unlike(score: Tensor, similarity: Tensor, picks: int) -> Tensor:
    """The tokens of ``picks`` large scores [B, N] that are not alike: [B, picks], or all N if there are fewer; best first."""
    score, place = (t[:, : 4 * picks] for t in score.sort(dim=1, descending=True, stable=True))
    among = gather_rows(similarity, place).gather(2, place[:, None].expand(-1, place.shape[1], -1))
    fresh = 1 - among.tril(-1).amax(2)  # of each, in view of those before it
    order = (score * fresh.clamp(min=torch.finfo(torch.float32).tiny)).argsort(dim=1, descending=True, stable=True)
    return place.gather(1, order[:, :picks])


def max_min_diversity(similarity: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Greedy max-min: first the token that is least like its nearest neighbour, then the one that is least like its nearest chosen one.

    similarity [B, N, N], valid [B, N], count [B] of which ``steps`` is the largest -> the chosen tokens [B, N] bool.
    """
    never = float("inf")
    itself = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    nearest = similarity.masked_fill(itself | ~valid[:, None], -never).amax(-1)
    out_of_play = torch.zeros_like(nearest).masked_fill(~valid, never)
    order = []
    for step in range(steps):
        best = (nearest + out_of_play).argmin(1, keepdim=True)
        out_of_play.scatter_(1, best, never)
        row = gather_rows(similarity, best)[:, 0]
        nearest = torch.maximum(nearest, row) if step else row
        order.append(best)
    return _mask_of(order, count, valid)


def pairwise_distance(similarity: Tensor, weight: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Again and again the token with the largest weight times 1 - its similarity to the most similar chosen one; first the largest weight.

    similarity [B, N, N], weight [B, N] not negative, valid [B, N], count [B] of which ``steps`` is the largest -> the chosen tokens [B, N] bool.
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
    """The kernel w_i (cos(i, j) + ridge [i = j]) w_j: similarity [B, N, N], weight [B, N] -> [B, N, N]. ``ridge`` is what no other token explains of
    one: where all are explained, the largest weights are next."""
    kernel = similarity.clone()  # changed in place: of a long clip these are the largest tensors that are made
    if ridge:
        kernel.diagonal(dim1=1, dim2=2).add_(ridge)
    return kernel.mul_(weight[:, :, None]).mul_(weight[:, None])


def greedy_dpp_map(kernel: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """The greedy choice of largest determinant (MAP of a determinantal point process): again and again the token whose part of the kernel is
    explained least by those chosen.

    kernel [B, N, N] positive semidefinite, valid [B, N], count [B] of which ``steps`` is the largest -> the chosen tokens [B, N] bool. By the
    update of Chen et al. 2018 (arXiv 1709.05135): one pass over the rows chosen so far for each step. A token that is explained wholly, up
    to rounding, explains nothing more; where only such are left the lowest are taken.
    """
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    floor = (left * RANK).clamp(min=torch.finfo(torch.float32).tiny)
    out_of_play = torch.zeros_like(left).masked_fill(~valid, float("-inf"))
    parts, order = kernel.new_zeros(len(kernel), max(steps, 1), kernel.shape[1]), []
    for step in range(steps):
        score = left + out_of_play
        best = _first(score, TIE)
        out_of_play.scatter_(1, best, float("-inf"))
        order.append(best)
        known, mine = parts[:, :step], parts[:, :step].gather(2, best[:, None].expand(-1, step, -1))
        size, least = left.gather(1, best), floor.gather(1, best)
        new = (gather_rows(kernel, best)[:, 0] - (mine.transpose(1, 2) @ known)[:, 0]) * torch.maximum(size, least).rsqrt()
        parts[:, step] = new = torch.where(size > least, new, 0.0)
        left = (left - new.square()).clamp(min=0)
        left = torch.where(left > floor, left, 0.0)
    return _mask_of(order, count, valid)


def farthest_points(rows: Tensor, valid: Tensor, steps: int, start: Tensor) -> Tensor:
    """Farthest point sampling: from ``start`` [B] on, again and again the token farthest from the nearest chosen one (Euclidean).

    rows [B, N, C], valid [B, N] -> the picks [B, steps] in their order; rows with fewer valid tokens repeat some.
    """
    rows, best = rows.float(), start[:, None]
    nearest = torch.full_like(rows[..., 0], torch.inf).masked_fill(~valid, -torch.inf)
    order = []
    for _ in range(steps):
        order.append(best)
        away = torch.cdist(rows, gather_rows(rows, best), compute_mode="donot_use_mm_for_euclid_dist")[..., 0]
        nearest = torch.minimum(nearest, away).scatter(1, best, -torch.inf)
        best = nearest.argmax(1, keepdim=True)
    return torch.cat(order, 1) if order else start.new_zeros(len(start), 0)


def greedy_discounted(similarity: Tensor, score: Tensor, valid: Tensor, count: Tensor, steps: int) -> Tensor:
    """Again and again the token of the largest score, which takes of every other one's the share by which they are alike (SIEVE).

    similarity [B, N, N] in [0, 1], score [B, N] not negative, valid [B, N], count [B] of which ``steps`` is the largest -> [B, N] bool.
    """
    score, order = score.masked_fill(~valid, -torch.inf), []
    for _ in range(steps):
        best = score.argmax(1, keepdim=True)
        score = (score * (1 - gather_rows(similarity, best)[:, 0])).scatter(1, best, -torch.inf).masked_fill(score == -torch.inf, -torch.inf)
        order.append(best)
    return _mask_of(order, count, valid)


def greedy_nms(similarity: Tensor, score: Tensor, valid: Tensor, count: Tensor, steps: int, threshold: float) -> Tensor:
    """Non-maximum suppression by falling score: a token is chosen unless one before it resembles it by ``threshold`` or more; where these are
    too few, the best of the suppressed fill up (PIO-FVLM, arXiv 2602.04657).

    similarity [B, N, N], score [B, N], valid [B, N], count [B] of which ``steps`` is the largest -> the chosen tokens [B, N] bool.
    """
    tokens = score.shape[1]
    turn = ranks(ranking(score, valid)) + 2 * tokens * ~valid  # who comes next: the free, the suppressed, then nobody
    free = valid.clone()
    order = []
    for _ in range(steps):
        best = turn.argmin(1, keepdim=True)
        near = (gather_rows(similarity, best)[:, 0] >= threshold) & free
        turn = turn + tokens * near
        free = (free & ~near).scatter(1, best, False)
        turn = turn.scatter(1, best, 4 * tokens)
        order.append(best)
    return _mask_of(order, count, valid)


def _first(score: Tensor, slack: float) -> Tensor:
    """The lowest index whose score [B, N] is the largest but for the share ``slack`` of it: [B, 1]."""
    return (score >= score.amax(1, keepdim=True) * (1 - slack)).int().argmax(1, keepdim=True)


def _mask_of(order: list[Tensor], count: Tensor, valid: Tensor) -> Tensor:
    """The first ``count`` [B] of the picks, each [B, n], as a mask [B, N]."""
    if not order:
        return torch.zeros_like(valid)
    picks = torch.cat(order, 1)
    real = torch.arange(picks.shape[1], device=picks.device) < count[:, None]
    return torch.zeros_like(valid).scatter_reduce_(1, picks, real, "amax")
