"""The order of the tokens of an image that was cut into tiles."""

from __future__ import annotations

import torch
from torch import Tensor


def mosaic_order(patches: Tensor, contextual: int, columns: int, side: int) -> Tensor:
    """Order of the rows of several tiles, as released for LLaVA-NeXT: dominant patches of all tiles line by line over
    the whole mosaic, then the CLS rows of all tiles, then the contextual rows of all tiles. No newline rows.

    Parameters
    ----------
    patches : Tensor
        [tiles, D] long, raster number within its tile of each dominant patch; tiles in raster order.
    contextual : int
        Contextual rows per tile.
    columns : int
        Tiles per line of the mosaic.
    side : int
        Patches per tile side.

    Returns
    -------
    Tensor
        [tiles * (1 + D + contextual)] long, indices into the flattened rows of the tiles, each [CLS, dominant,
        contextual].
    """
    tiles, dominant = patches.shape
    tile = torch.arange(tiles, device=patches.device)[:, None]
    line = tile // columns * side + patches // side
    column = tile % columns * side + patches % side
    by_place = torch.argsort((line * columns * side + column).flatten(), stable=True)
    row = torch.arange(tiles * (1 + dominant + contextual), device=patches.device).view(tiles, -1)
    return torch.cat([row[:, 1 : 1 + dominant].flatten()[by_place], row[:, 0], row[:, 1 + dominant :].flatten()])
