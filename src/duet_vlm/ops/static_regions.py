"""What stands still in a window of a clip becomes one set of rows, averaged over time; the rest of every frame is a set of its own.

Shapes as in ``clips``: B clips, T steps, P places, C channels; a clip has up to 2 T sets: what is still in each of up to T windows, then what is
not in each of T steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.select import ranking
from duet_vlm.ops.video import FrameWindows, VideoTokens


@dataclass(frozen=True)
class StaticDynamicSets:
    """A clip as sets.

    ``still`` [B, T, P] bool: which rows are part of what is still in their window; ``rows`` [B, 2 T, P, C] float32 and ``real`` [B, 2 T, P]: the
    rows of every set by place.
    """

    clips: VideoTokens
    windows: FrameWindows
    still: Tensor
    rows: Tensor
    real: Tensor

    @classmethod
    def of(cls, clips: VideoTokens, windows: FrameWindows, rows: Tensor, places: Tensor) -> StaticDynamicSets:
        """From rows [B, T, P, C] and the still places of every window [B, T, P] bool."""
        still = windows.of_step(places) & clips.real
        total = windows.sums(rows.float().masked_fill(~still[..., None], 0))
        means = total / windows.length.clamp(min=1)[..., None, None]
        real = torch.cat([places & (windows.length > 0)[..., None], clips.real & ~still], 1)
        return cls(clips, windows, still, torch.cat([means, rows.float()], 1), real)

    @property
    def sizes(self) -> Tensor:
        """[B, 2 T] long."""
        return self.real.sum(2)

    def kept(self, chosen: Tensor) -> Tensor:
        """The tokens that the ``chosen`` [B, 2 T, P] rows stand at, a still one at the first step of its window: [B, N] bool."""
        steps = self.still.shape[1]
        at = torch.arange(steps, device=chosen.device)
        first = (self.windows.of_step(self.windows.first) == at)[..., None]
        return self.clips.rows(torch.where(self.still, self.windows.of_step(chosen[:, :steps]) & first, chosen[:, steps:])) & self.clips.placed

    def joins(self, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Which token every token is added to, and with which weight: [B, N] each, from the place of the row that every row of a set joins (-1:
        none) and its weight there, [B, 2 T, P] each."""
        steps, windows = self.still.shape[1], self.windows
        to = torch.where(self.still, windows.of_step(place[:, :steps]), place[:, steps:])
        step = torch.arange(steps, device=to.device).expand(to.shape[:2])
        step = torch.where(self.still, windows.of_step(windows.first)[..., None], step[..., None])
        owner = self.clips.index.flatten(1).gather(1, (step * to.shape[2] + to.clamp(min=0)).flatten(1)).view(to.shape)
        share = windows.of_step(weight[:, :steps]) / windows.of_step(windows.length).clamp(min=1)[..., None]
        share = torch.where(self.still, share, weight[:, steps:])
        owner = self.clips.rows(torch.where(to >= 0, owner, -1))
        return torch.where(self.clips.placed, owner, -1), self.clips.rows(share)


    @property
    def number(self) -> Tensor:
        """[B, T, P] long: which set every row is of, rising from window to window, what is still in one before the rest of its first step."""
        at = torch.arange(self.still.shape[1], device=self.still.device)
        return torch.where(self.still, 2 * self.windows.of_step(self.windows.first)[..., None], 2 * at[:, None] + 1)

    def sequence(self, rank: Tensor | None = None) -> Tensor:
        """[B, N] numbers by which tokens follow each other window by window: first what is still, then the rest step by step; within a set by
        ``rank`` [B, 2 T, P] or by place."""
        (steps, places), windows = self.still.shape[1:], self.windows
        place = torch.arange(places, device=self.still.device).expand(self.real.shape) if rank is None else rank
        place = torch.where(self.still, windows.of_step(place[:, :steps]), place[:, steps:])
        return self.clips.rows(self.number * places + place)


def everywhere(clips: VideoTokens, windows: FrameWindows) -> Tensor:
    """Places that have a real row in every step of a window of several: [B, T, P] bool."""
    return (windows.sums(clips.real.long()) == windows.length[..., None]) & (windows.length > 1)[..., None]


def most_similar(places: Tensor, score: Tensor, windows: FrameWindows, spare: Tensor) -> Tensor:
    """Still places [B, T, P], the likest first, as many as may be averaged if only ``spare`` [B] rows may vanish."""
    order = ranking(score.flatten(1), places.flatten(1))
    fewer = (windows.length - 1).clamp(min=0)[..., None].expand(places.shape).flatten(1) * places.flatten(1)
    fits = fewer.gather(1, order).cumsum(1) <= spare[:, None]
    return places & torch.zeros_like(fits).scatter(1, order, fits).view(places.shape)


def members_of(place: Tensor, real: Tensor) -> Tensor:
    """How many rows join each: places [G, P] joined (of real rows) -> [G, P] float32."""
    return torch.zeros_like(place, dtype=torch.float32).scatter_add_(1, place.clamp(min=0), real.float())


def gains(alike: Tensor, length: Tensor, most: int) -> FrameWindows:
    """The windows with the largest sum of gains, by dynamic programming; the gain of a window is steps - 1 times the places that are alike all along.

    alike [B, T - 1, P] bool, length [B] -> windows of up to ``most`` steps; of equal sums the one whose last window is shorter.
    """
    batch, steps, places = alike.shape[0], alike.shape[1] + 1, alike.shape[2]
    at = torch.arange(steps, device=alike.device)
    total = torch.zeros(batch, steps + 1, dtype=torch.long, device=alike.device)  # of the first t steps
    begin = torch.zeros(batch, steps, dtype=torch.long, device=alike.device)
    running = torch.ones(batch, steps, places, dtype=torch.bool, device=alike.device)  # alike from step a on up to here
    for last in range(steps):
        if last:
            running[:, :last] &= alike[:, last - 1 : last]
        gain = running[:, : last + 1].sum(2) * (last - at[: last + 1])
        gain = (gain + total[:, : last + 1]).masked_fill(last - at[: last + 1] >= most, -1)
        value = gain.amax(1)
        total[:, last + 1], begin[:, last] = value, last - _first(gain.flip(1), value)
    starts = torch.zeros(batch, steps, dtype=torch.bool, device=alike.device)
    end = length - 1
    for _ in range(steps):
        first = begin.gather(1, end.clamp(min=0)[:, None])
        starts |= (at == first) & (end >= 0)[:, None]
        end = torch.where(end >= 0, first[:, 0] - 1, end)
    return FrameWindows.of(starts, length)


def _first(values: Tensor, value: Tensor) -> Tensor:
    """Place of the first of ``values`` [B, n] that is ``value`` [B]."""
    return (values == value[:, None]).int().argmax(1)
