"""Signals of vision towers: importance and mean keys from the queries and keys of one attention; and blocks of the
usual layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import BlockModules, RecordedQK
from duet_vlm.ops.score import cls_attention, column_attention


def cls_signals(recorded: RecordedQK) -> tuple[Tensor, Tensor]:
    """Importance [B, N] (attention from the CLS position) and mean keys [B, N, d] of the patches after it."""
    return cls_attention(recorded.query, recorded.key, recorded.scaling, recorded.size), recorded.key.float().mean(1)[
        :, 1:
    ]


def column_signals(recorded: RecordedQK) -> tuple[Tensor, Tensor]:
    """Importance [B, N] (attention received) and mean keys [B, N, d] of towers that attend to all N patches of an image
    at once."""
    return column_attention(
        recorded.query, recorded.key, recorded.scaling, recorded.sample, recorded.size
    ), recorded.key.float().mean(1)


def blocks_like_clip(layers: Iterable[nn.Module]) -> tuple[BlockModules, ...]:
    """The blocks of CLIP, SigLIP and their relatives."""
    return tuple(BlockModules(layer, layer.self_attn, layer.layer_norm2, layer.mlp) for layer in layers)


def cells(signals: Tensor, side: int, cell: int) -> Tensor:
    """Means over ``cell`` x ``cell`` patches: [B, side * side, c] -> [B, (side / cell) ** 2, c], both in raster
    order."""
    grid = signals.transpose(1, 2).unflatten(2, (side, side))
    return nn.functional.avg_pool2d(grid, cell).flatten(2).transpose(1, 2)


def packed_signals(calls: Sequence[RecordedQK], unit: int, segmented: bool) -> tuple[Tensor, Tensor]:
    """Importance [U] and mean keys [U, d] of towers that pack the patches of all images into one sequence.

    Importance is attention received within the tower's own segments or (not ``segmented``) within all of them together.
    Both are means over the ``unit`` patches of a token, in the tower's order.
    """
    calls = [part for recorded in calls for part in segments_of(recorded)]
    if not segmented:
        together = {"query": torch.cat([c.query for c in calls], 2), "key": torch.cat([c.key for c in calls], 2)}
        if calls[0].size is not None:
            together["size"] = torch.cat([c.size for c in calls if c.size is not None], 1)
        calls = [replace(calls[0], **together)]
    importance = torch.cat([column_attention(c.query, c.key, c.scaling, c.sample, c.size)[0] for c in calls])
    keys = torch.cat([c.key[0].float() for c in calls], 1).transpose(0, 1)  # [patches, H, d]
    return importance.view(-1, unit).mean(1), keys.reshape(-1, unit, *keys.shape[1:]).mean((1, 2))


def segments_of(recorded: RecordedQK) -> list[RecordedQK]:
    """Split a packed call (flash attention) into the segments that the tower attends within."""
    if recorded.segments is None:
        return [recorded]
    lengths = recorded.segments.tolist()
    pairs = zip(recorded.query.split(lengths, 2), recorded.key.split(lengths, 2), strict=True)
    return [replace(recorded, query=query, key=key, segments=None) for query, key in pairs]


def patches_of(frames: Tensor, side: int) -> Tensor:
    """Frames [t, c, H, W] patch by patch, ``side`` pixels high and wide: [t, n, m]. Pixels that fill no patch are cut
    off."""
    high, wide = (size // side for size in frames.shape[2:])
    patches = frames[..., : high * side, : wide * side].unflatten(3, (wide, side)).unflatten(2, (high, side))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
