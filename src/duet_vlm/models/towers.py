"""Signals of vision towers without a CLS row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Recorded
from duet_vlm.ops.score import column_attention


def column_signals(recorded: Recorded) -> tuple[Tensor, Tensor]:
    """Importance [B, N] (attention received) and mean keys [B, N, d] of towers that see all N patches of a picture at once."""
    return column_attention(recorded.query, recorded.key, recorded.scaling, recorded.sample), recorded.key.float().mean(1)


def cells(signals: Tensor, side: int, cell: int) -> Tensor:
    """Means over ``cell`` x ``cell`` patches: [B, side * side, c] -> [B, (side / cell) ** 2, c], both row by row."""
    grid = signals.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.avg_pool2d(grid, cell).flatten(2).transpose(1, 2)


def cell_signals(recorded: Recorded, side: int, cell: int) -> tuple[list[Tensor], list[Tensor]]:
    """Importance and mean keys per picture, for projectors that make one token of each cell of patches."""
    importance, keys = column_signals(recorded)
    pooled = cells(torch.cat([importance[..., None], keys], -1), side, cell)
    return list(pooled[..., 0]), list(pooled[..., 1:])
