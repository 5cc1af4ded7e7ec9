"""Token scores beside attention: from features, the question and the projector; and scaling to [0, 1]. All in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import upload

TINY = torch.finfo(torch.float32).tiny
DIRECTIONS, STEP = 64, 0.01  # ZOO-Prune's (arXiv 2509.24837)
OFFSET = 1e-6  # of the least relevant token, so that it can still be told from others (CDPruner, arXiv 2506.10967)


def length(rows: Tensor) -> Tensor:
    """Euclidean norm of each row: [B, N, C] -> [B, N]."""
    return rows.float().norm(dim=-1)


def contrast(rows: Tensor, valid: Tensor) -> Tensor:
    """Distance of each row from the mean of its image: rows [B, N, C], valid [B, N] -> [B, N]."""
    masked = torch.where(valid[..., None], rows.float(), 0.0)
    return length(rows.float() - masked.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None])


def relevance(rows: Tensor, words: Tensor, valid: Tensor) -> Tensor:
    """Mean cosine of each token and the tokens of the question.

    Parameters
    ----------
    rows : Tensor
        [B, N, D] visual tokens.
    words : Tensor
        [B, T, D] question tokens.
    valid : Tensor
        [B, T] bool, False for padding of the question.

    Returns
    -------
    Tensor
        [B, N] float32.
    """
    unit, weight = unit_rows(words), valid.float()
    mean = (unit * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
    return (unit_rows(rows) @ mean[..., None])[..., 0]


def sensitivity(
    project: Callable[[Callable[[Tensor], Tensor]], Tensor],
    directions: int = DIRECTIONS,
    step: float = STEP,
    seed: int = 0,
) -> Tensor:
    """Zeroth-order sensitivity of the projector (ZOO-Prune, arXiv 2509.24837).

    The change of each projected row when its inputs move by ``step`` along a random direction and back, per unit of
    length, mean over ``directions``.

    Parameters
    ----------
    project : callable
        Runs the projector on inputs [..., C] changed by a function -> [B, N, D].
    directions : int
        Number of random directions, at least 1.
    step : float
        Length of a step, above 0.
    seed : int
        Seed of the directions.

    Returns
    -------
    Tensor
        [B, N] float32.
    """
    total: Tensor | float = 0.0
    for number in range(directions):

        def shifted(rows: Tensor, sign: float = 1.0, number: int = number) -> Tensor:
            return rows + sign * step * upload(direction(seed, number, rows.shape[-1]), rows.device).to(rows.dtype)

        total = total + (project(shifted) - project(lambda rows: shifted(rows, -1.0))).norm(dim=-1)  # noqa: B023
    assert isinstance(total, Tensor)  # at least one direction
    return total / (2 * step * directions)


@lru_cache(maxsize=512)
def direction(seed: int, number: int, width: int) -> Tensor:
    """Draw a random direction of length 1 on the CPU: [width] float32."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    sample = torch.randn(width, generator=generator, device="cpu")
    return sample / sample.norm()


def min_max_scaled(score: Tensor, valid: Tensor, offset: float = 0.0, together: bool = False) -> Tensor:
    """Scale scores to [0, 1] between the smallest and largest of each image.

    Parameters
    ----------
    score : Tensor
        [B, N].
    valid : Tensor
        [B, N] bool, False for padding.
    offset : float
        Part of the range that is added, so that the smallest score stays above 0.
    together : bool
        Smallest and largest of all images of the call.

    Returns
    -------
    Tensor
        [B, N] float32, 0 for padding.
    """
    low, high = (score.masked_fill(~valid, end) for end in (torch.inf, -torch.inf))
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    if together:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    return ((score - low + offset) / (high - low).clamp(min=offset or TINY)).masked_fill(~valid, 0.0)


def of_largest(score: Tensor, valid: Tensor, alpha: float = 1.0) -> Tensor:
    """Divide scores by the largest of their image, to the power ``alpha``.

    Parameters
    ----------
    score : Tensor
        [B, N], not negative; float32's largest value marks a token that must come first.
    valid : Tensor
        [B, N] bool, False for padding.
    alpha : float
        Exponent.

    Returns
    -------
    Tensor
        [B, N] in [0, 1]; 2 for a token that must come first, 0 for padding.
    """
    first = score == torch.finfo(torch.float32).max
    most = score.masked_fill(first | ~valid, 0.0).amax(1, keepdim=True)
    share = (score / most.clamp(min=torch.finfo(score.dtype).tiny)).clamp(max=1.0) ** alpha
    return torch.where(first, 2.0, share).masked_fill(~valid, 0.0)
