"""Units of a picture: the patches of each, the frame before, and how many are left where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime.context import EncodeContext
from duet_vlm.runtime.validation import check_counts


def in_cells(grid: Tensor, cell: int) -> Tensor:
    """Numbers of patches [h, w] by unit: [U, cell * cell], units line by line; what fills no cell is left out."""
    rows, columns = (size // cell for size in grid.shape)
    table = grid[: rows * cell, : columns * cell].unflatten(1, (columns, cell)).unflatten(0, (rows, cell))
    return table.transpose(1, 2).flatten(2).flatten(0, 1)


def in_patches(pixels: Tensor, high: int, wide: int) -> Tensor:
    """Pictures [P, C, H, W] patch by patch: [P, high * wide, m]."""
    patches = pixels.unflatten(3, (wide, -1)).unflatten(2, (high, -1))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def frames_before(call: EncodeContext, spans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Per picture the number of the frame before it in its clip, or -1; ``spans`` lists the pictures of each."""
    starts = {sum(map(len, spans[:number])) for number in range(len(spans))}
    clip = call.encoding.stream == "video"
    return tuple(n - 1 if clip and n not in starts else -1 for n in range(sum(map(len, spans))))


def content_first(there: Tensor, content: Tensor, counts: Sequence[int]) -> Tensor:
    """[P, U] bool: what can be chosen of the units that are ``there``: those with ``content``; all, where these are fewer than ``counts``."""
    enough = content.sum(1) >= upload(counts, content.device)
    return torch.where(enough[:, None], content, there)


def stages_of(
    tower: TowerReducer, before: Sequence[int], left: Sequence[int], depth: int, whole: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Boundary -> units of each picture that are left there; only those at which some leave. ``before``: units of each picture that can become
    tokens, of the ``whole`` that the tower sees."""
    boundaries = tower.boundaries(depth)
    counts = list(zip(*(check_counts(tower, n, k, depth) for n, k in zip(before, left, strict=True)), strict=True))
    arriving, stages = tuple(whole), {}
    for after, staying in zip(boundaries, counts, strict=True):
        if staying != arriving:
            stages[after] = arriving = staying
    return stages
