"""What makes a token count beside attention: its row, the question, the projector; and scores brought to [0, 1]. All in float32."""

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
    """The Euclidean length of each row: [B, N, C] -> [B, N]."""
    return rows.float().norm(dim=-1)


def contrast(rows: Tensor, valid: Tensor) -> Tensor:
    """How far each row is from the mean of its picture's: rows [B, N, C], valid [B, N] -> [B, N]."""
    real = torch.where(valid[..., None], rows.float(), 0.0)
    return length(rows.float() - real.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None])


def relevance(rows: Tensor, words: Tensor, real: Tensor) -> Tensor:
    """Mean cosine of each row and the words of the question: rows [B, N, D], words [B, T, D] of which ``real`` [B, T] bool are there -> [B, N]."""
    unit, asked = unit_rows(words), real.float()
    mean = (unit * asked[..., None]).sum(1) / asked.sum(1, keepdim=True).clamp(min=1)
    return (unit_rows(rows) @ mean[..., None])[..., 0]


def sensitivity(project: Callable[[Callable[[Tensor], Tensor]], Tensor], directions: int = DIRECTIONS, step: float = STEP, seed: int = 0) -> Tensor:
    """How far each projected row moves when the rows that it is made of move by ``step`` along a random direction and back, per length of the move,
    mean over ``directions`` (ZOO-Prune, arXiv 2509.24837): ``project`` runs the projector on changed rows [..., C] -> [B, N, D]; -> [B, N]."""
    total: Tensor | float = 0.0
    for number in range(directions):

        def moved(rows: Tensor, sign: float = 1.0, number: int = number) -> Tensor:
            return rows + sign * step * upload(direction(seed, number, rows.shape[-1]), rows.device).to(rows.dtype)

        total = total + (project(moved) - project(lambda rows: moved(rows, -1.0))).norm(dim=-1)  # noqa: B023
    assert isinstance(total, Tensor)  # one direction at least
    return total / (2 * step * directions)


@lru_cache(maxsize=512)
def direction(seed: int, number: int, width: int) -> Tensor:
    """A random direction of length 1, drawn on the CPU: [width] float32."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    drawn = torch.randn(width, generator=generator, device="cpu")
    return drawn / drawn.norm()


def min_max_scaled(score: Tensor, valid: Tensor, offset: float = 0.0, together: bool = False) -> Tensor:
    """Scores [B, N] from 0 (the smallest of the picture's) to 1 (the largest), 0 where not ``valid`` [B, N].

    ``offset`` of that range is added, so that the smallest can still be told from others; ``together``: smallest and largest of all pictures.
    """
    low, high = (score.masked_fill(~valid, end) for end in (torch.inf, -torch.inf))
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    if together:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    return ((score - low + offset) / (high - low).clamp(min=offset or TINY)).masked_fill(~valid, 0.0)


def of_largest(score: Tensor, valid: Tensor, alpha: float = 1.0) -> Tensor:
    """Scores [B, N], not negative, over the largest of the picture and to the power ``alpha``; 0 where not ``valid`` [B, N]. A row that must come
    first (a score of float32's largest) gets 2, which is more than any other."""
    first = score == torch.finfo(torch.float32).max
    most = score.masked_fill(first | ~valid, 0.0).amax(1, keepdim=True)
    share = (score / most.clamp(min=torch.finfo(score.dtype).tiny)).clamp(max=1.0) ** alpha
    return torch.where(first, 2.0, share).masked_fill(~valid, 0.0)
