"""Clips as steps of time x places: where their rows are, which steps belong together, how rows are divided among groups.

Shapes: B clips, N rows, T steps of time, P places of a step, C channels.
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
    """The rows of B clips by step and place.

    Attributes
    ----------
    index, real : Tensor
        [B, T, P] long, bool: which of N rows stands there, and whether one does.
    step, place : Tensor
        [B, N] long: where each row stands; 0 for rows that stand nowhere.
    placed : Tensor
        [B, N] bool: whether it stands anywhere.
    """

    index: Tensor
    real: Tensor
    step: Tensor
    place: Tensor
    placed: Tensor

    @classmethod
    def of(cls, parts: Tensor, valid: Tensor, most: tuple[int, int] | None = None) -> VideoTokens:
        """From the step of every row, ``parts`` [B, N], -1 where there is none, in whatever order; places follow the order of the rows.

        Rows that are not ``valid`` [B, N] have a place and are not real. ``most``: bounds of T and P that the host knows; None reads them.
        """
        counted = parts >= 0
        order = parts.masked_fill(~counted, torch.iinfo(parts.dtype).max).argsort(dim=1, stable=True)
        step = parts.clamp(min=0)
        sizes = torch.zeros_like(step).scatter_add_(1, step, counted.long())
        place = (ranks(order) - (sizes.cumsum(1) - sizes).gather(1, step)).clamp(min=0)
        steps, places = most or (int(step.max()) + 1 if step.numel() else 0, int(sizes.max()) if step.numel() else 0)
        cell = torch.where(counted, step * places + place.clamp(max=max(places - 1, 0)), steps * places)
        number = torch.arange(parts.shape[1], device=parts.device).expand(parts.shape)
        index = step.new_zeros(len(parts), steps * places + 1).scatter_(1, cell, number)[:, :-1]
        real = torch.zeros_like(index, dtype=torch.bool)
        real = torch.cat([real, real.new_zeros(len(real), 1)], 1).scatter_(1, cell, counted & valid)[:, :-1]
        index, real = (x.unflatten(1, (steps, places)) for x in (index, real))
        return cls(index, real, step, torch.where(counted, place, 0), counted & valid)

    def grid(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [B, T, P, ...]; anything where no row is real."""
        return gather_rows(x, self.index.flatten(1)).unflatten(1, self.index.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, P] -> [B, N]; anything for rows that stand nowhere."""
        return x.flatten(1).gather(1, self.step * self.index.shape[2] + self.place)

    def of_step(self, x: Tensor) -> Tensor:
        """[B, T] -> [B, N]."""
        return x.gather(1, self.step)

    @property
    def sizes(self) -> Tensor:
        """[B, T] long, real rows of every step."""
        return self.real.sum(2)

    @property
    def length(self) -> Tensor:
        """[B] long, steps up to the last that has a real row."""
        number = torch.arange(1, self.real.shape[1] + 1, device=self.real.device)
        return (number * self.real.any(2)).amax(1)

    def means(self, rows: Tensor) -> Tensor:
        """[B, T, P, C] -> [B, T, C], means of the real rows of every step, in float32."""
        total = rows.float().masked_fill(~self.real[..., None], 0).sum(2)
        return total / self.sizes.clamp(min=1)[..., None]


@dataclass(frozen=True)
class FrameWindows:
    """Steps that belong together: runs of neighbours, numbered by time.

    ``number`` [B, T] window of each step; ``first`` and ``length`` [B, T] first step and steps of each window (up to T of them).
    """

    number: Tensor
    first: Tensor
    length: Tensor

    @classmethod
    def of(cls, starts: Tensor, length: Tensor) -> FrameWindows:
        """From the steps that begin one, ``starts`` [B, T] bool (step 0 always does), of clips of ``length`` [B] steps; what is behind a clip is a
        window of no length."""
        at = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
        starts = (starts & (at < length[:, None])) | (at == 0) | (at == length[:, None])
        number = starts.cumsum(1) - 1
        size = torch.zeros_like(number).scatter_add_(1, number, (at < length[:, None]).long())
        first = torch.full_like(number, starts.shape[1]).scatter_reduce_(1, number, at, "amin").clamp(max=max(starts.shape[1] - 1, 0))
        return cls(number, first, size)

    def of_step(self, x: Tensor) -> Tensor:
        """What belongs to windows [B, T, ...], for every step [B, T, ...]."""
        return gather_rows(x, self.number)

    def sums(self, x: Tensor) -> Tensor:
        """What belongs to steps [B, T, ...] added up by window [B, T, ...]."""
        into = self.number.view(*self.number.shape, *(1,) * (x.ndim - 2)).expand_as(x)
        return torch.zeros_like(x).scatter_add_(1, into, x)


def alike_before(rows: Tensor) -> Tensor:
    """Cosine of each row with the one a step before: [B, T, ..., C] -> [B, T - 1, ...] float32. Exactly 1 where nothing changed."""
    unit = unit_rows(rows)
    return 1 - (unit[:, 1:] - unit[:, :-1]).square_().sum(-1) / 2


def split_windows(total: Tensor, weight: Tensor, most: Tensor, least: Tensor | None = None) -> Tensor:
    """``total`` [B] rows divided among G groups in proportion to ``weight`` [B, G], none above ``most`` [B, G] nor below ``least``: [B, G] long.

    A common factor times the weights, cut at both bounds, adds up to ``total``; fractions are rounded by largest remainders, ties to the
    earlier group. Needs sum(least) <= total <= sum(most); where there is more to give than that, every group gets its most.
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
    for _ in range(2):  # the second time for those without weight
        left = total[:, None] - count.sum(1, keepdim=True)
        room = count < most
        more = ranks(ranking(exact - count, room)) < left.clamp(min=0)
        fewer = ranks(ranking(count - exact, count > least)) < (-left).clamp(min=0)
        count = count + (more & room).long() - (fewer & (count > least)).long()
    left = total[:, None] - count.sum(1, keepdim=True)
    spare = (most - count).clamp(min=0)
    before = spare.cumsum(1) - spare
    return count + torch.minimum(spare, (left - before).clamp(min=0))


def join_windows(kept: Tensor, owner: Tensor, weight: Tensor, width: int, order: Tensor | None = None) -> Selection:
    """The selection that keeps rows ``kept`` [B, N], at most ``width`` of a clip, and adds every row to that of its ``owner`` (-1: to none).

    ``owner`` and ``weight`` are [B, M N], for M rows that each one may join. A kept row whose owner is not itself is made of others alone.
    ``order`` [B, N]: rows by rising value; None: as they stand.
    """
    if order is None:
        index, valid = pack_right(kept, width)
    else:
        index = ranking(-order.float(), kept)[:, :width]
        valid = kept.gather(1, index)
    number = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    place = torch.arange(index.shape[1], device=kept.device).expand(index.shape)
    row = torch.full_like(number, -1).scatter(1, index, torch.where(valid, place, -1))
    into = torch.where(owner >= 0, row.gather(1, owner.clamp(min=0)), -1)
    return Selection(index, valid, number.repeat(1, owner.shape[1] // max(1, kept.shape[1])), into, weights=weight)
