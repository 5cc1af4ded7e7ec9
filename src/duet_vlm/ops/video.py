"""Videos as time steps x places: layout of tokens, windows of steps, division of counts.

Shapes: B videos, N tokens, T time steps, P places of a step, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.ops.select import ranking, ranks
from duet_vlm.planning.tokens import Selection

HALVINGS = 48  # of the interval in which a common factor is looked for


@dataclass(frozen=True)
class VideoTokens:
    """Tokens of B videos by step and place.

    Attributes
    ----------
    index : Tensor
        [B, T, P] long, token at each step and place.
    real : Tensor
        [B, T, P] bool, False for padding.
    step : Tensor
        [B, N] long, step of each token; 0 for tokens without one.
    place : Tensor
        [B, N] long, place of each token; 0 for tokens without one.
    placed : Tensor
        [B, N] bool, tokens with a step and a place.
    """

    index: Tensor
    real: Tensor
    step: Tensor
    place: Tensor
    placed: Tensor

    @classmethod
    def of(cls, parts: Tensor, valid: Tensor, most: tuple[int, int] | None = None) -> VideoTokens:
        """Make the layout from the step of every token; places follow the order of the tokens.

        Parameters
        ----------
        parts : Tensor
            [B, N] long, step of each token, in any order; -1 for none.
        valid : Tensor
            [B, N] bool; invalid tokens have a place but are padding there.
        most : tuple of (int, int), optional
            Upper bounds of T and P, known on the host; None waits for the device.
        """
        has_step = parts >= 0
        order = parts.masked_fill(~has_step, torch.iinfo(parts.dtype).max).argsort(dim=1, stable=True)
        step = parts.clamp(min=0)
        sizes = torch.zeros_like(step).scatter_add_(1, step, has_step.long())
        position = (ranks(order) - (sizes.cumsum(1) - sizes).gather(1, step)).clamp(min=0)
        steps, places = most or (int(step.max()) + 1 if step.numel() else 0, int(sizes.max()) if step.numel() else 0)
        cell = torch.where(has_step, step * places + position.clamp(max=max(places - 1, 0)), steps * places)
        number = torch.arange(parts.shape[1], device=parts.device).expand(parts.shape)
        index = step.new_zeros(len(parts), steps * places + 1).scatter_(1, cell, number)[:, :-1]
        real = torch.zeros_like(index, dtype=torch.bool)
        real = torch.cat([real, real.new_zeros(len(real), 1)], 1).scatter_(1, cell, has_step & valid)[:, :-1]
        index, real = (x.unflatten(1, (steps, places)) for x in (index, real))
        return cls(index, real, step, torch.where(has_step, position, 0), has_step & valid)

    def grid(self, x: Tensor) -> Tensor:
        """Arrange by step and place: [B, N, ...] -> [B, T, P, ...]; undefined for padding."""
        return gather_rows(x, self.index.flatten(1)).unflatten(1, self.index.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """Arrange by token: [B, T, P] -> [B, N]; undefined for tokens without a place."""
        return x.flatten(1).gather(1, self.step * self.index.shape[2] + self.place)

    def of_step(self, x: Tensor) -> Tensor:
        """Value of each token's step: [B, T] -> [B, N]."""
        return x.gather(1, self.step)

    @property
    def sizes(self) -> Tensor:
        """Tokens of every step: [B, T] long."""
        return self.real.sum(2)

    @property
    def length(self) -> Tensor:
        """Steps up to the last one with a token: [B] long."""
        number = torch.arange(1, self.real.shape[1] + 1, device=self.real.device)
        return (number * self.real.any(2)).amax(1)

    def means(self, rows: Tensor) -> Tensor:
        """Mean of the tokens of every step, in float32: [B, T, P, C] -> [B, T, C]."""
        total = rows.float().masked_fill(~self.real[..., None], 0).sum(2)
        return total / self.sizes.clamp(min=1)[..., None]


@dataclass(frozen=True)
class FrameWindows:
    """Windows of a video: runs of neighbouring steps, numbered by time.

    Attributes
    ----------
    number : Tensor
        [B, T] long, window of each step.
    first : Tensor
        [B, T] long, first step of each window (up to T windows).
    length : Tensor
        [B, T] long, steps of each window.
    """

    number: Tensor
    first: Tensor
    length: Tensor

    @classmethod
    def of(cls, starts: Tensor, length: Tensor) -> FrameWindows:
        """Make windows from their first steps.

        Parameters
        ----------
        starts : Tensor
            [B, T] bool, steps that begin a window; step 0 always does.
        length : Tensor
            [B] long, steps of each video; padding becomes a window of length 0.
        """
        at = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
        starts = (starts & (at < length[:, None])) | (at == 0) | (at == length[:, None])
        number = starts.cumsum(1) - 1
        size = torch.zeros_like(number).scatter_add_(1, number, (at < length[:, None]).long())
        first = (
            torch.full_like(number, starts.shape[1])
            .scatter_reduce_(1, number, at, "amin")
            .clamp(max=max(starts.shape[1] - 1, 0))
        )
        return cls(number, first, size)

    def of_step(self, x: Tensor) -> Tensor:
        """Value of each step's window: [B, T, ...] by window -> [B, T, ...] by step."""
        return gather_rows(x, self.number)

    def sums(self, x: Tensor) -> Tensor:
        """Sum of each window's steps: [B, T, ...] by step -> [B, T, ...] by window."""
        into = self.number.view(*self.number.shape, *(1,) * (x.ndim - 2)).expand_as(x)
        return torch.zeros_like(x).scatter_add_(1, into, x)


def alike_before(rows: Tensor) -> Tensor:
    """Cosine of each row with the one a step before, exactly 1 where nothing changed: [B, T, ..., C] -> [B, T - 1, ...]
    float32.
    """
    unit = unit_rows(rows)
    return 1 - (unit[:, 1:] - unit[:, :-1]).square_().sum(-1) / 2


def split_windows(total: Tensor, weight: Tensor, most: Tensor, least: Tensor | None = None) -> Tensor:
    """Divide a total among groups in proportion to weights, within lower and upper limits.

    A common factor times the weights, clipped at both limits, adds up to the total; fractions go to the largest
    remainders, ties to the earlier group. Requires sum(least) <= total <= sum(most); above that every group gets its
    upper limit.

    Parameters
    ----------
    total : Tensor
        [B] long.
    weight : Tensor
        [B, G], not negative.
    most : Tensor
        [B, G] long, upper limits.
    least : Tensor, optional
        [B, G] long, lower limits; None: 0.

    Returns
    -------
    Tensor
        [B, G] long.
    """
    weight = weight.float().clamp(min=0) * (most > 0)
    weight = weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    least = torch.zeros_like(most) if least is None else torch.minimum(least, most)
    aim, ends = total[:, None].float(), (least.float(), most.float())

    def shares(factor: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(weight * factor, ends[0]), ends[1])

    smallest = weight.masked_fill(weight <= 0, 1).amin(1, keepdim=True)
    low, high = torch.zeros_like(aim), (ends[1].amax(1, keepdim=True) + 1) / smallest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = shares(middle).sum(1, keepdim=True) <= aim
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    exact = shares(low)
    count = (exact + 1e-4).floor().long()
    for _ in range(2):  # the second time for groups without weight
        remaining = total[:, None] - count.sum(1, keepdim=True)
        room = count < most
        more = ranks(ranking(exact - count, room)) < remaining.clamp(min=0)
        fewer = ranks(ranking(count - exact, count > least)) < (-remaining).clamp(min=0)
        count = count + (more & room).long() - (fewer & (count > least)).long()
    remaining = total[:, None] - count.sum(1, keepdim=True)
    spare = (most - count).clamp(min=0)
    before = spare.cumsum(1) - spare
    return count + torch.minimum(spare, (remaining - before).clamp(min=0))


def join_windows(kept: Tensor, owner: Tensor, weight: Tensor, width: int, order: Tensor | None = None) -> Selection:
    """Make a selection that keeps some tokens and merges others into them.

    Parameters
    ----------
    kept : Tensor
        [B, N] bool, tokens that are kept. One whose owner is not itself is made of other tokens alone.
    owner : Tensor
        [B, M N] long, the kept token that each token is merged into, up to M for each; -1 for none.
    weight : Tensor
        [B, M N] float32, weight of each token there.
    width : int
        Largest number of kept tokens of a video, known on the host.
    order : Tensor, optional
        [B, N] sort keys of the tokens; None: raster order.
    """
    if order is None:
        index, valid = pack_right(kept, width)
    else:
        index = ranking(-order.float(), kept)[:, :width]
        valid = kept.gather(1, index)
    number = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    column = torch.arange(index.shape[1], device=kept.device).expand(index.shape)
    row = torch.full_like(number, -1).scatter(1, index, torch.where(valid, column, -1))
    into = torch.where(owner >= 0, row.gather(1, owner.clamp(min=0)), -1)
    return Selection(index, valid, number.repeat(1, owner.shape[1] // max(1, kept.shape[1])), into, weights=weight)
