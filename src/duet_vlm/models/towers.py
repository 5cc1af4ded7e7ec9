"""Signals of vision towers without a CLS row, and blocks of the usual layout."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from duet_vlm.models.adapter import Inside, Recorded
from duet_vlm.ops.score import column_attention


def column_signals(recorded: Recorded) -> tuple[Tensor, Tensor]:
    """Importance [B, N] (attention received) and mean keys [B, N, d] of towers that see all N patches of a picture at once."""
    return column_attention(recorded.query, recorded.key, recorded.scaling, recorded.sample, recorded.size), recorded.key.float().mean(1)


def blocks_like_clip(layers: Iterable[nn.Module]) -> tuple[Inside, ...]:
    """The blocks of CLIP, SigLIP and their relatives."""
    return tuple(Inside(layer, layer.self_attn, layer.layer_norm2, layer.mlp) for layer in layers)


def cells(signals: Tensor, side: int, cell: int) -> Tensor:
    """Means over ``cell`` x ``cell`` patches: [B, side * side, c] -> [B, (side / cell) ** 2, c], both row by row."""
    grid = signals.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.avg_pool2d(grid, cell).flatten(2).transpose(1, 2)
