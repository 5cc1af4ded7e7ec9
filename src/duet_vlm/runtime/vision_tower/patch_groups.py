"""Units of a picture (groups of patches that become one token).

Their patches, the previous frame, and the kept counts by block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime.context import EncodeContext
from duet_vlm.runtime.validation import check_counts


def in_cells(grid: Tensor, cell: int) -> Tensor:
    """Patch numbers [h, w] grouped by unit: [U, cell * cell], in raster order, without patches that fill no cell."""
    rows, columns = (size // cell for size in grid.shape)
    table = grid[: rows * cell, : columns * cell].unflatten(1, (columns, cell)).unflatten(0, (rows, cell))
    return table.transpose(1, 2).flatten(2).flatten(0, 1)


def in_patches(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pictures [P, C, H, W] patch by patch: [P, height * width, m]."""
    patches = pixels.unflatten(3, (width, -1)).unflatten(2, (height, -1))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def previous_pictures(context: EncodeContext, spans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Per picture the number of the previous frame of its video, or -1; ``spans`` lists the pictures of each."""
    starts = {sum(map(len, spans[:number])) for number in range(len(spans))}
    is_video = context.encoding.stream == "video"
    return tuple(n - 1 if is_video and n not in starts else -1 for n in range(sum(map(len, spans))))


def selectable_units(valid: Tensor, content: Tensor, counts: Sequence[int]) -> Tensor:
    """[P, U] bool, the units that can be selected.

    Those with ``content``; all ``valid`` ones, where these are fewer than ``counts``.
    """
    enough = content.sum(1) >= upload(counts, content.device)
    return torch.where(enough[:, None], content, valid)


def stages_of(
    tower: TowerReducer, available: Sequence[int], kept: Sequence[int], depth: int, whole: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Boundary -> kept units of each picture, for boundaries where some are dropped.

    ``available`` are the units of each picture that can become tokens, of the ``whole`` picture in the tower.
    """
    boundaries = tower.boundaries(depth)
    counts_by_boundary = list(
        zip(*(check_counts(tower, n, k, depth) for n, k in zip(available, kept, strict=True)), strict=True)
    )
    arriving, stages = tuple(whole), {}
    for after, counts_after in zip(boundaries, counts_by_boundary, strict=True):
        if counts_after != arriving:
            stages[after] = arriving = counts_after
    return stages
