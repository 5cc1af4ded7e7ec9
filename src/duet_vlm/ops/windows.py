"""Windows of an image: any number of them, of equal size up to one token, as square as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.merge import shares
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import ranks
from duet_vlm.planning.tokens import Selection


@dataclass(frozen=True)
class GridWindows:
    """B images of up to N tokens in up to K windows of up to M tokens.

    Attributes
    ----------
    tokens : Tensor
        [B, K, M] long, tokens of each window, by column and then by row.
    real : Tensor
        [B, K, M] bool, False for padding.
    centre : Tensor
        [B, K] long, token nearest to the middle of each window, on a tie the lowest.
    valid : Tensor
        [B, K] bool, False for padding among the windows.
    of : Tensor
        [B, N] long, window of each token, -1 for none.
    whole : Tensor
        [B] bool, images with as many windows as tokens, in order.
    """

    tokens: Tensor
    real: Tensor
    centre: Tensor
    valid: Tensor
    of: Tensor
    whole: Tensor

    def selection(self, rows: Tensor | None = None) -> Selection:
        """Make each window one row at its centre: the mean of its tokens, or ``rows`` [B, K, C]. Whole images do not
        change.
        """
        numbers = torch.arange(self.of.shape[1], device=self.of.device).expand_as(self.of)
        into = self.of.masked_fill(self.whole[:, None], -1)
        return Selection(
            self.centre, self.valid, numbers, into, weights=shares(into, self.centre.shape[1]), custom_rows=rows
        )


def windows(coords: Tensor, valid: Tensor, count: Tensor, most: int, largest: int) -> GridWindows:
    """Cut images into ``count`` windows.

    Tokens are divided by row into bands of whole windows, and within a band by column into windows, so that window
    sizes differ by one at most. Where rows and columns are multiples of bands and windows, windows are rectangles. The
    cut of an image does not depend on the batch.

    Parameters
    ----------
    coords : Tensor
        [B, N, 2] long, row and column of each token.
    valid : Tensor
        [B, N] bool, False for padding.
    count : Tensor
        [B] long, at most the number of tokens.
    most : int
        Upper bound of the windows of an image, known on the host.
    largest : int
        Upper bound of the tokens of a window, known on the host.
    """
    total, num_windows = valid.sum(1, keepdim=True).clamp(min=1), count[:, None].clamp(min=1)
    whole = (count >= valid.sum(1))[:, None]
    lowest = torch.iinfo(torch.long).max
    first = coords.masked_fill(~valid[..., None], lowest).amin(1, keepdim=True)
    last = coords.masked_fill(~valid[..., None], -1).amax(1, keepdim=True)
    rows, columns = (last - first + 1).clamp(min=1).float().unbind(-1)
    bands = (num_windows * rows / columns).sqrt().round().long().clamp(min=1).minimum(num_windows)
    row, column = (coords - first).clamp(min=0).unbind(-1)
    tall, wide = row.amax(1, keepdim=True) + 1, column.amax(1, keepdim=True) + 1
    number = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    raster = torch.where(whole, number, row * wide + column)
    band = _rank(raster, valid) * num_windows // total * bands // num_windows
    order = _order(torch.where(whole, number, (band * wide + column) * tall + row), valid)
    of = (ranks(order) * num_windows // total).masked_fill(~valid | (count == 0)[:, None], -1)

    window = torch.arange(most, device=valid.device)[None]
    begins, ends = ((each * total + num_windows - 1) // num_windows for each in (window, window + 1))
    window_valid = window < count[:, None]
    slot = begins[..., None] + torch.arange(largest, device=valid.device)
    real = (slot < ends[..., None]) & window_valid[..., None]
    tokens = order.gather(1, slot.clamp(max=valid.shape[1] - 1).flatten(1)).view_as(slot)
    return GridWindows(tokens, real, _centre(coords, tokens, real), window_valid, of, whole[:, 0])


def _order(key: Tensor, valid: Tensor) -> Tensor:
    """Token numbers by rising key [B, N], ties by number, padding last."""
    return key.masked_fill(~valid, torch.iinfo(key.dtype).max).argsort(dim=1, stable=True)


def _rank(key: Tensor, valid: Tensor) -> Tensor:
    """Rank of each token by rising key [B, N]."""
    return ranks(_order(key, valid))


def _centre(coords: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Token nearest to the middle of each window [B, K]; in integers, so that equally near tokens tie."""
    places = gather_rows(coords, tokens.flatten(1)).unflatten(1, tokens.shape[1:])
    count = real.sum(2)[..., None, None]
    distance = (places * count - (places * real[..., None]).sum(2, keepdim=True)).square().sum(-1)
    distance = distance * coords.shape[1] + tokens
    nearest = distance.masked_fill(~real, torch.iinfo(distance.dtype).max).argmin(2, keepdim=True)
    return tokens.gather(2, nearest)[..., 0]


def within(coords: Tensor, grid_windows: GridWindows) -> Tensor:
    """Position of each token in its window, from -1 to 1 down and across, half a step from the border: [B, K, M, 2]
    float32.
    """
    places = gather_rows(coords, grid_windows.tokens.flatten(1)).unflatten(1, grid_windows.tokens.shape[1:])
    hidden = ~grid_windows.real[..., None]
    first = places.masked_fill(hidden, torch.iinfo(places.dtype).max).amin(2, keepdim=True)
    last = places.masked_fill(hidden, 0).amax(2, keepdim=True)
    size = (last - first + 1).clamp(min=1)
    return (2 * (places - first) + 1).float() / size - 1
