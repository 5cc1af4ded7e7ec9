"""FastVID: attended tokens of every frame and density peaks of each video segment, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.methods.video.video_base import VideoReducer, VideoRows
from duet_vlm.ops.dpc_knn import peaks
from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.ops.select import ranking, ranks, top
from duet_vlm.ops.video import FrameWindows, VideoTokens, split_windows
from duet_vlm.planning.budget import Budget, Keep, SpanPlan
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice

NEIGHBOURS = 4  # that decide how dense it is around a row


@register("fastvid")
@dataclass(frozen=True)
class FastVID(VideoReducer):
    """FastVID (NeurIPS 2025, arXiv 2503.11187): dynamic density pruning of video tokens before the decoder.

    A video is cut into segments where neighbouring frames differ most. Every frame keeps its most attended tokens. In
    each segment, every ``every``-th frame, counted back from the last, contributes density peaks among its other
    tokens; all other tokens of the segment are merged into the peak that they resemble most (cosine). A merged token
    has weight ``own`` on the peak and the rest on the mean of its members.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction. A budget of n keeps n.
    context : float
        Share of the kept tokens that are peaks, in [0, 1].
    segments : int
        Least number of segments of a video (of one frame each where it has no more frames), at least 1.
    threshold : float
        Cosine of the means of neighbouring frames below which a video is always cut.
    every : int
        Distance, in frames, of the frames of a segment that contribute peaks, at least 1.
    own : float
        Weight of the peak in its merged token, in [0, 1]; never less than that of any of its members.
    merge : str
        "one": every other token joins one peak; "frames": the most similar peak of each contributing frame, and peaks
        are merged too (released code).

    Cost: attention of one vision layer, a table of distances per frame, cosines of all tokens with the tokens of every
    ``every``-th frame. Needs: vision attention and frames. Usable in training (the choice carries no gradient, merged
    tokens do).

    Differences from the authors' code (LunarShen/FastVID): counts add up to the budget (released: each is rounded
    separately); a token joins one peak (``merge``); frames are compared by their means and tokens by the family's
    attention, not by SigLIP's pooling head. Where a video has too few other tokens for its peaks, more attended ones
    are kept.
    """

    paper = "FastVID, NeurIPS 2025, arXiv 2503.11187"
    summary = "keep the most attended tokens of every frame, and density peaks of each segment with what resembles them, before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.PROJECTED_FEATURES})

    context: float = 0.4
    segments: int = 8
    threshold: float = 0.9
    every: int = 4
    own: float = 0.6
    merge: str = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "own"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, in [0, 1]")
        for name, what in (("segments", "segments"), ("every", "frames")):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a number of {what}, at least 1")
        check_choice("merge", self.merge, ("one", "frames"))

    @classmethod
    def official(cls, keep: Keep = 0.25, **fields: Any) -> FastVID:
        """Return the settings of the released rule with a given count."""
        options = TokenOptions(protect_predicting_tokens=False, signal_queries=None)
        return cls.from_preset(options, fields, keep=keep, merge="frames")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        plan = super().plan(tokens, depth, budget)
        merged = int(plan.entry * self.context) if plan.reduces_entry else 0
        return SpanPlan(tokens, plan.entry - merged, merged, plan.counts)

    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        importance = view.require(Input.IMPORTANCE)
        rows, attention = clips.grid(view.require(Input.FEATURES)), clips.grid(importance)
        windows = self.windows(clips.means(rows), clips.length)
        salient = self.salient(
            attention, clips, split_windows(torch.minimum(view.dominant, count), clips.sizes, clips.sizes)
        )
        others, left = clips.real & ~salient, count - salient.sum((1, 2))
        frames, share = self.frames(windows, clips.length)
        room = others.sum(2) * frames
        peak = self.peaks(rows, others, split_windows(torch.minimum(left, room.sum(1)), share * frames, room))
        kept = clips.rows(salient | peak) & clips.placed
        kept |= top(importance, clips.placed & ~kept, left - peak.sum((1, 2)))
        return VideoRows(kept, *self.joins(clips, rows, kept, peak, windows))

    def salient(self, attention: Tensor, clips: VideoTokens, count: Tensor) -> Tensor:
        """Mask the ``count`` [B, T] most attended tokens of every frame: attention [B, T, P] -> [B, T, P] bool."""
        return top(attention.flatten(0, 1), clips.real.flatten(0, 1), count.flatten()).view(attention.shape)

    def joins(
        self, clips: VideoTokens, rows: Tensor, kept: Tensor, peak: Tensor, windows: FrameWindows
    ) -> tuple[Tensor, Tensor]:
        """Assign tokens to peaks.

        Parameters
        ----------
        clips : VideoTokens
            Layout of B videos.
        rows : Tensor
            [B, T, P, C] features.
        kept : Tensor
            [B, N] bool, kept tokens, which are not merged into others.
        peak : Tensor
            [B, T, P] bool, peaks.
        windows : FrameWindows
            Segments.

        Returns
        -------
        owner, weight : Tensor
            [B, M N] long and float32: the peak that each token is merged into (-1: none), and its weight there, for M
            peaks per token.
        """
        each, nearest = self.nearest(clips, rows, peak, windows)
        itself = clips.rows(peak) & clips.placed
        number = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        targets, stays = ([nearest], kept) if self.merge == "one" else (each, kept & ~itself)
        owner = torch.stack([torch.where(clips.placed & ~stays, target, -1) for target in targets], 1)
        members = torch.zeros_like(kept, dtype=torch.float32).scatter_add_(
            1, owner.clamp(min=0).flatten(1), (owner >= 0).flatten(1).float()
        )
        own = (1 / (members + 1)).clamp(min=self.own)
        share = (1 - own) / members.clamp(min=1)
        owner = torch.cat([torch.where(itself, number, -1), owner.flatten(1)], 1)
        return owner, torch.cat([own, share.gather(1, owner[:, kept.shape[1] :].clamp(min=0))], 1)

    def windows(self, frames: Tensor, length: Tensor) -> FrameWindows:
        """Cut videos into segments by frame features: [B, T, C], [B] frames -> segments."""
        alike = (unit_rows(frames)[:, 1:] * unit_rows(frames)[:, :-1]).sum(-1)
        inside = torch.arange(1, frames.shape[1], device=frames.device) < length[:, None]
        lowest = ranks(ranking(-alike, inside)) < self.segments - 1
        starts = ((alike < self.threshold) | lowest) & inside
        return FrameWindows.of(torch.nn.functional.pad(starts, (1, 0), value=True), length)

    def frames(self, windows: FrameWindows, length: Tensor) -> tuple[Tensor, Tensor]:
        """Frames that contribute peaks [B, T] bool, and the number of frames that each represents [B, T] float32."""
        at = torch.arange(windows.number.shape[1], device=length.device)
        size, first = windows.of_step(windows.length), windows.of_step(windows.first)
        gives = ((first + size - 1 - at) % self.every == 0) & (at < length[:, None])
        return gives, size / ((size + self.every - 1) // self.every).clamp(min=1)

    def peaks(self, rows: Tensor, others: Tensor, count: Tensor) -> Tensor:
        """Mask the ``count`` [B, T] density peaks among ``others`` [B, T, P] of every frame: [B, T, P] bool."""
        return peaks(rows.flatten(0, 1), others.flatten(0, 1), count.flatten(), NEIGHBOURS)[0].view(others.shape)

    def nearest(
        self, clips: VideoTokens, rows: Tensor, peak: Tensor, windows: FrameWindows
    ) -> tuple[list[Tensor], Tensor]:
        """Find the most similar peak of each token.

        Returns
        -------
        list of Tensor
            [B, N] each: the most similar peak in each contributing frame of the token's segment, from the last frame
            on; -1 for none.
        Tensor
            [B, N], the most similar peak of all; -1 for none.
        """
        unit, first, last = (
            unit_rows(rows),
            windows.of_step(windows.first),
            windows.of_step(windows.first + windows.length - 1),
        )
        each, most, best = (
            [],
            rows.new_full(clips.real.shape, float("-inf"), dtype=torch.float32),
            torch.full_like(clips.index, -1),
        )
        for back in range(0, rows.shape[1], self.every):
            frame = (last - back).clamp(min=0)
            there = gather_rows(peak, frame) & (last - back >= first)[..., None]
            cosine = (unit @ gather_rows(unit, frame).transpose(2, 3)).masked_fill_(~there[:, :, None], float("-inf"))
            near, nearest_frame = cosine.max(3) if cosine.shape[3] else (most, best)
            target = torch.where(
                near > float("-inf"), gather_rows(clips.index, frame).gather(2, nearest_frame.clamp(min=0)), -1
            )
            best, most = torch.where(near > most, target, best), torch.maximum(near, most)
            each.append(target)
        return [clips.rows(target) for target in each], clips.rows(best)
