"""Signals of vision towers without a CLS row."""

from __future__ import annotations

from torch import Tensor, nn

from duet_vlm.models.adapter import Recorded
from duet_vlm.ops.score import column_attention


def column_signals(recorded: Recorded) -> tuple[Tensor, Tensor]:
    """Importance [B, N] (attention received) and mean keys [B, N, d] of towers that see all N patches of a picture at once."""
    return column_attention(recorded.query, recorded.key, recorded.scaling, recorded.sample, recorded.size), recorded.key.float().mean(1)


def cells(signals: Tensor, side: int, cell: int) -> Tensor:
    """Means over ``cell`` x ``cell`` patches: [B, side * side, c] -> [B, (side / cell) ** 2, c], both row by row."""
    grid = signals.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.avg_pool2d(grid, cell).flatten(2).transpose(1, 2)
