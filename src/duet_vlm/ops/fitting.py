"""How many tokens may leave after each layer, so that what the others receive stays most of what all received."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 20  # of the bisection


def removable(received: Tensor, alive: Tensor, part: float) -> Tensor:
    """The longest line of tokens alive, from the least on, without which those left still receive 1 - ``part`` of all: [N] and [N] bool -> [N]."""
    order = received.masked_fill(~alive, torch.inf).argsort(stable=True)
    count = int(alive.sum())
    line = received[order[:count]]
    leaves = line.sum() - line.cumsum(0) >= (1 - part) * received.sum()
    return torch.zeros_like(alive).scatter(0, order[:count], leaves)


def left_after(cross: Tensor, own: Tensor, part: float) -> list[int]:
    """Tokens that each layer reads when after every one those leave that may both by ``cross`` and by ``own`` [L, N]: L + 1 numbers."""
    alive = torch.ones(cross.shape[1], dtype=torch.bool, device=cross.device)
    counts = [len(alive)]
    for by_text, by_picture in zip(cross, own, strict=True):
        alive = alive & ~(removable(by_text, alive, part) & removable(by_picture, alive, part))
        counts.append(int(alive.sum()))
    return counts


def fitted(pictures: Sequence[tuple[Tensor, Tensor]], share: float) -> list[float]:
    """The mean curve over pictures (cross, own [L, N]) for the smallest part that leaves at most ``share`` of the tokens per layer: L + 1 shares."""

    def curve(part: float) -> Tensor:
        lines = [torch.tensor(left_after(cross, own, part), dtype=torch.float64, device="cpu") / cross.shape[1] for cross, own in pictures]
        return torch.stack(lines).mean(0)

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if float(curve(middle).mean()) <= share else (middle, high)
    return [float(x) for x in curve(high)]
