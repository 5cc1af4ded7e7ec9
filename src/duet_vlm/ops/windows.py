"""A picture in windows: as many as are wanted, each of as many tokens as any other or one more, as square as they can be."""

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
    """B pictures of up to N tokens in up to K windows of up to M tokens.

    ``tokens`` [B, K, M] are token numbers, those of a window by column and then by row, of which ``real`` [B, K, M] are there; ``centre`` [B, K] is
    the token nearest to the middle of each (on a tie the lowest number), ``valid`` [B, K] which windows there are, ``of`` [B, N] the window of each
    token, -1 for none. ``whole`` [B]: pictures with as many windows as tokens, these in order.
    """

    tokens: Tensor
    real: Tensor
    centre: Tensor
    valid: Tensor
    of: Tensor
    whole: Tensor

    def selection(self, rows: Tensor | None = None) -> Selection:
        """Each window as one row at its centre: the mean of its tokens, or what ``rows`` [B, K, C] says. Whole pictures stay as they are."""
        numbers = torch.arange(self.of.shape[1], device=self.of.device).expand_as(self.of)
        into = self.of.masked_fill(self.whole[:, None], -1)
        return Selection(self.centre, self.valid, numbers, into, weights=shares(into, self.centre.shape[1]), custom_rows=rows)


def windows(place: Tensor, valid: Tensor, count: Tensor, most: int, largest: int) -> GridWindows:
    """Cut pictures into ``count`` windows.

    Tokens are dealt to bands of whole windows by row, and within a band to windows by column, so that no window has two tokens more than
    another. Where rows and columns are multiples of bands and windows, windows are rectangles. Each picture is cut by itself, whatever else
    is in the batch.

    Parameters
    ----------
    place : Tensor
        [B, N, 2] row and column of each token.
    valid : Tensor
        [B, N] bool.
    count : Tensor
        [B] long, at most as many as there are tokens.
    most, largest : int
        Bounds, on the host, of the windows of a picture, and of the tokens of a window.
    """
    total, wanted = valid.sum(1, keepdim=True).clamp(min=1), count[:, None].clamp(min=1)
    whole = (count >= valid.sum(1))[:, None]
    lowest = torch.iinfo(torch.long).max
    first = place.masked_fill(~valid[..., None], lowest).amin(1, keepdim=True)
    last = place.masked_fill(~valid[..., None], -1).amax(1, keepdim=True)
    rows, columns = (last - first + 1).clamp(min=1).float().unbind(-1)
    bands = (wanted * rows / columns).sqrt().round().long().clamp(min=1).minimum(wanted)
    row, column = (place - first).clamp(min=0).unbind(-1)
    tall, wide = row.amax(1, keepdim=True) + 1, column.amax(1, keepdim=True) + 1
    number = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    raster = torch.where(whole, number, row * wide + column)
    band = _rank(raster, valid) * wanted // total * bands // wanted
    order = _order(torch.where(whole, number, (band * wide + column) * tall + row), valid)
    of = (ranks(order) * wanted // total).masked_fill(~valid | (count == 0)[:, None], -1)

    window = torch.arange(most, device=valid.device)[None]
    begins, ends = ((each * total + wanted - 1) // wanted for each in (window, window + 1))
    there = window < count[:, None]
    slot = begins[..., None] + torch.arange(largest, device=valid.device)
    real = (slot < ends[..., None]) & there[..., None]
    tokens = order.gather(1, slot.clamp(max=valid.shape[1] - 1).flatten(1)).view_as(slot)
    return GridWindows(tokens, real, _centre(place, tokens, real), there, of, whole[:, 0])


def _order(key: Tensor, valid: Tensor) -> Tensor:
    """Token numbers by rising key [B, N], ties by number, invalid ones last."""
    return key.masked_fill(~valid, torch.iinfo(key.dtype).max).argsort(dim=1, stable=True)


def _rank(key: Tensor, valid: Tensor) -> Tensor:
    return ranks(_order(key, valid))


def _centre(place: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """[B, K]; in whole numbers, so that equally near ones tie."""
    places = gather_rows(place, tokens.flatten(1)).unflatten(1, tokens.shape[1:])
    count = real.sum(2)[..., None, None]
    far = (places * count - (places * real[..., None]).sum(2, keepdim=True)).square().sum(-1)
    far = far * place.shape[1] + tokens
    nearest = far.masked_fill(~real, torch.iinfo(far.dtype).max).argmin(2, keepdim=True)
    return tokens.gather(2, nearest)[..., 0]


def within(place: Tensor, found: GridWindows) -> Tensor:
    """Where in its window each token stands, from -1 to 1 down and across, half a step from the border: [B, K, M, 2] float32."""
    places = gather_rows(place, found.tokens.flatten(1)).unflatten(1, found.tokens.shape[1:])
    hidden = ~found.real[..., None]
    first = places.masked_fill(hidden, torch.iinfo(places.dtype).max).amin(2, keepdim=True)
    last = places.masked_fill(hidden, 0).amax(2, keepdim=True)
    size = (last - first + 1).clamp(min=1)
    return (2 * (places - first) + 1).float() / size - 1
