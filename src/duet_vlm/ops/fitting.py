"""Fit the number of tokens to drop after each layer, so that the kept tokens receive most of the attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 20  # of the bisection


def removable(received: Tensor, alive: Tensor, part: float) -> Tensor:
    """Mark the tokens with the least attention whose removal costs at most a share ``part`` of the total.

    Parameters
    ----------
    received : Tensor
        [N] attention received by each token.
    alive : Tensor
        [N] bool, tokens not dropped yet.
    part : float
        Largest share of all received attention that may be lost, in [0, 1].

    Returns
    -------
    Tensor
        [N] bool.
    """
    order = received.masked_fill(~alive, torch.inf).argsort(stable=True)
    count = int(alive.sum())
    line = received[order[:count]]
    dropped = line.sum() - line.cumsum(0) >= (1 - part) * received.sum()
    return torch.zeros_like(alive).scatter(0, order[:count], dropped)


def counts_after_layers(cross: Tensor, own: Tensor, part: float) -> list[int]:
    """Count the tokens of each layer if tokens removable by both scores are dropped after every layer.

    Parameters
    ----------
    cross, own : Tensor
        [L, N] attention received from text, and from visual tokens.
    part : float
        As in ``removable``.

    Returns
    -------
    list of int
        L + 1 counts.
    """
    alive = torch.ones(cross.shape[1], dtype=torch.bool, device=cross.device)
    counts = [len(alive)]
    for by_text, by_picture in zip(cross, own, strict=True):
        alive = alive & ~(removable(by_text, alive, part) & removable(by_picture, alive, part))
        counts.append(int(alive.sum()))
    return counts


def fitted(pictures: Sequence[tuple[Tensor, Tensor]], share: float) -> list[float]:
    """Fit a curve of tokens per layer to an average share.

    Bisects ``part`` for the smallest value at which layers keep at most ``share`` of the tokens in the mean.

    Parameters
    ----------
    pictures : sequence of (Tensor, Tensor)
        For each image, attention from text and from visual tokens, [L, N] each.
    share : float
        Mean share of the tokens per layer, in [0, 1].

    Returns
    -------
    list of float
        L + 1 shares, mean over the images.
    """

    def curve(part: float) -> Tensor:
        counts = [counts_after_layers(cross, own, part) for cross, own in pictures]
        tokens = torch.tensor([[cross.shape[1]] for cross, _ in pictures], dtype=torch.float64, device="cpu")
        return (torch.tensor(counts, dtype=torch.float64, device="cpu") / tokens).mean(0)

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(curve(middle).mean()) <= share else (middle, high)
    return [float(x) for x in curve(high)]
