"""Static and dynamic sets of a video: static places of a window are averaged over time, the other tokens of a frame
form a set.

Shapes as in ``ops.video``: B videos, T steps, P places, C channels; a video has up to 2 T sets: the static tokens of
each of up to T windows, then the dynamic tokens of each of T steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.select import ranking
from duet_vlm.ops.video import FrameWindows, VideoTokens


@dataclass(frozen=True)
class StaticDynamicSets:
    """Videos as sets of rows.

    Attributes
    ----------
    clips : VideoTokens
        Layout of the videos.
    windows : FrameWindows
        Windows of the videos.
    still : Tensor
        [B, T, P] bool, rows that are static in their window.
    rows : Tensor
        [B, 2 T, P, C] float32, rows of every set by place.
    real : Tensor
        [B, 2 T, P] bool, False for padding.
    """

    clips: VideoTokens
    windows: FrameWindows
    still: Tensor
    rows: Tensor
    real: Tensor

    @classmethod
    def of(cls, clips: VideoTokens, windows: FrameWindows, rows: Tensor, places: Tensor) -> StaticDynamicSets:
        """Make the sets from rows [B, T, P, C] and the static places of every window [B, T, P] bool."""
        still = windows.of_step(places) & clips.real
        total = windows.sums(rows.float().masked_fill(~still[..., None], 0))
        means = total / windows.length.clamp(min=1)[..., None, None]
        real = torch.cat([places & (windows.length > 0)[..., None], clips.real & ~still], 1)
        return cls(clips, windows, still, torch.cat([means, rows.float()], 1), real)

    @property
    def sizes(self) -> Tensor:
        """Rows of each set: [B, 2 T] long."""
        return self.real.sum(2)

    def kept(self, chosen: Tensor) -> Tensor:
        """Tokens whose positions the ``chosen`` [B, 2 T, P] rows take, for a static row in the first step of its
        window: [B, N] bool.
        """
        steps = self.still.shape[1]
        at = torch.arange(steps, device=chosen.device)
        first = (self.windows.of_step(self.windows.first) == at)[..., None]
        return (
            self.clips.rows(torch.where(self.still, self.windows.of_step(chosen[:, :steps]) & first, chosen[:, steps:]))
            & self.clips.placed
        )

    def joins(self, position: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Translate targets within sets to targets among tokens.

        Parameters
        ----------
        position : Tensor
            [B, 2 T, P] long, place of the row that each row of a set is merged into; -1 for none.
        weight : Tensor
            [B, 2 T, P] float32, its weight there.

        Returns
        -------
        owner, weight : Tensor
            [B, N] long and float32: the token that each token is merged into (-1: none), and its weight there.
        """
        steps, windows = self.still.shape[1], self.windows
        to = torch.where(self.still, windows.of_step(position[:, :steps]), position[:, steps:])
        step = torch.arange(steps, device=to.device).expand(to.shape[:2])
        step = torch.where(self.still, windows.of_step(windows.first)[..., None], step[..., None])
        owner = self.clips.index.flatten(1).gather(1, (step * to.shape[2] + to.clamp(min=0)).flatten(1)).view(to.shape)
        share = windows.of_step(weight[:, :steps]) / windows.of_step(windows.length).clamp(min=1)[..., None]
        share = torch.where(self.still, share, weight[:, steps:])
        owner = self.clips.rows(torch.where(to >= 0, owner, -1))
        return torch.where(self.clips.placed, owner, -1), self.clips.rows(share)

    @property
    def number(self) -> Tensor:
        """Set of every row [B, T, P] long, rising from window to window, static rows before the dynamic rows of their
        first step.
        """
        at = torch.arange(self.still.shape[1], device=self.still.device)
        return torch.where(self.still, 2 * self.windows.of_step(self.windows.first)[..., None], 2 * at[:, None] + 1)

    def sequence(self, rank: Tensor | None = None) -> Tensor:
        """Sort keys of the tokens [B, N]: by window, static rows first, then dynamic ones step by step; within a set by
        ``rank`` [B, 2 T, P] or by place.
        """
        (steps, places), windows = self.still.shape[1:], self.windows
        position = torch.arange(places, device=self.still.device).expand(self.real.shape) if rank is None else rank
        position = torch.where(self.still, windows.of_step(position[:, :steps]), position[:, steps:])
        return self.clips.rows(self.number * places + position)


def everywhere(clips: VideoTokens, windows: FrameWindows) -> Tensor:
    """Mask of the places with a valid row in every step of a window of several: [B, T, P] bool."""
    return (windows.sums(clips.real.long()) == windows.length[..., None]) & (windows.length > 1)[..., None]


def most_similar(places: Tensor, score: Tensor, windows: FrameWindows, spare: Tensor) -> Tensor:
    """Limit static places [B, T, P], the most similar first, so that averaging removes at most ``spare`` [B] rows."""
    order = ranking(score.flatten(1), places.flatten(1))
    removed = (windows.length - 1).clamp(min=0)[..., None].expand(places.shape).flatten(1) * places.flatten(1)
    fits = removed.gather(1, order).cumsum(1) <= spare[:, None]
    return places & torch.zeros_like(fits).scatter(1, order, fits).view(places.shape)


def members_of(position: Tensor, real: Tensor) -> Tensor:
    """Number of rows that join each place: place [G, P] joined, real [G, P] -> [G, P] float32."""
    return torch.zeros_like(position, dtype=torch.float32).scatter_add_(1, position.clamp(min=0), real.float())


def gains(alike: Tensor, length: Tensor, most: int) -> FrameWindows:
    """Cut videos into windows of the largest total gain, by dynamic programming.

    The gain of a window is (steps - 1) times the number of places that are similar throughout.

    Parameters
    ----------
    alike : Tensor
        [B, T - 1, P] bool, similarity of neighbouring steps.
    length : Tensor
        [B] long, steps of each video.
    most : int
        Longest window, in steps.

    Returns
    -------
    FrameWindows
        Of equal sums the solution with the shorter last window.
    """
    batch, steps, places = alike.shape[0], alike.shape[1] + 1, alike.shape[2]
    at = torch.arange(steps, device=alike.device)
    total = torch.zeros(batch, steps + 1, dtype=torch.long, device=alike.device)  # gain of the first t steps
    begin = torch.zeros(batch, steps, dtype=torch.long, device=alike.device)
    # similar from step a up to this one
    running = torch.ones(batch, steps, places, dtype=torch.bool, device=alike.device)
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
    """Index of the first of ``values`` [B, n] equal to ``value`` [B]."""
    return (values == value[:, None]).int().argmax(1)
