"""Bases of the methods for videos: a count per span, tokens by time step and place, spans that are kept whole."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from duet_vlm.ops.video import VideoTokens, join_windows
from duet_vlm.planning.budget import (
    Budget,
    Keep,
    Schedule,
    SpanPlan,
    check_keep,
    check_schedule,
    count_of,
    layer_counts,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_fixed_count, plan_keep_all, plan_with_schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input

Self = TypeVar("Self", bound="ScheduledVideoReducer")


class VideoRows(NamedTuple):
    """Reduction of B videos of N tokens.

    Attributes
    ----------
    kept : Tensor
        [B, N] bool, tokens that are kept.
    owner : Tensor
        [B, M N] long, the kept token that each token is merged into, up to M for each; -1 for none.
    weight : Tensor
        [B, M N] float32, weight of each token there.
    order : Tensor or None
        [B, N] sort keys of the kept tokens; None: raster order.
    notes : Tensor or None
        [B, N] tags of the tokens for the stage inside the decoder; None: no tags.
    """

    kept: Tensor
    owner: Tensor
    weight: Tensor
    order: Tensor | None = None
    notes: Tensor | None = None

    @classmethod
    def alone(cls, kept: Tensor) -> VideoRows:
        """Keep tokens [B, N] without merging."""
        nothing = kept.new_zeros(len(kept), 0, dtype=torch.long)
        return cls(kept, nothing, nothing.float())


@dataclass(frozen=True)
class VideoReducer(EncoderReducer):
    """Base of the methods that compare all frames of a video. An image is a video of one step.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction. A budget of n keeps n.
    """

    compares_frames = True
    requires = frozenset({Input.PROJECTED_FEATURES})

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.options.crops == "per_crop":
            raise ValueError(
                f"{self.name} compares the frames of a clip, and crops='per_crop' would separate them: use crops='joint'"
            )

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        steps = view.parts if view.modality == "video" and view.parts is not None else torch.where(view.valid, 0, -1)
        clips = VideoTokens.of(
            steps, view.valid, view.max_parts if view.modality == "video" else (1, view.valid.shape[1])
        )
        count = view.dominant + view.contextual
        whole = (count >= view.valid.sum(1))[:, None]
        reduced = self.reduced(view, clips, torch.where(whole[:, 0], clips.placed.sum(1), count))
        kept = torch.where(whole, view.valid, reduced.kept)
        selection = join_windows(
            kept,
            reduced.owner.masked_fill(whole, -1),
            reduced.weight,
            max(plan.entry for plan in view.plans),
            reduced.order,
        )
        if reduced.notes is None:
            return selection
        notes = reduced.notes.float().masked_fill(whole, 0)  # a clip that stays whole is not always shown
        return replace(selection, tags=notes.gather(1, selection.index))

    @abstractmethod
    def reduced(self, view: EncoderView, clips: VideoTokens, count: Tensor) -> VideoRows:
        """Reduce every video to exactly ``count`` [B] tokens."""


@dataclass(frozen=True)
class ScheduledVideoReducer(VideoReducer, DecoderReducer):
    """Base of the methods for videos that also drop inside the decoder, at the layers of their paper
    (``paper_schedule``).

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction. A budget lets in as many as it allows.
    schedule : ((layer, keep), ...), optional
        Drops inside the decoder: before ``layer`` keep that many tokens (int) or that fraction of the entering ones
        (float). With a budget: fractions; left out, those of the paper. Without a budget and left out: none.
    """

    paper_schedule: ClassVar[Schedule]  # of the paper: (layer, share of what enters), falling
    layers: ClassVar[int] = 32  # of the paper's decoder
    min_layer: ClassVar[int] = 1  # no drop before this layer, as an earlier one ranks
    score_layer_offset = 1

    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is None:
            return
        object.__setattr__(self, "schedule", check_schedule(self.schedule, self.reenters))
        early = [layer for layer, _ in self.schedule if layer < self.min_layer]
        if early:
            why = f"what it decides by is made by earlier layers, so drop before layer {self.min_layer} or later"
            raise ValueError(f"{self.name}: schedule drops before layer {early[0]}, but {why}")

    def schedule_at_depth(self, depth: int) -> Schedule:
        """Scale the paper's stages to a decoder of ``depth`` layers; of two stages at one layer, the later one."""
        return tuple(
            {max(self.min_layer, layer * depth // self.layers): keep for layer, keep in self.paper_schedule}.items()
        )

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        given = self.keep is not None or (budget is None and self.schedule is not None)
        check_budget_or_fields(self, budget, given, "keep=, schedule=")
        if budget is None:
            entry = tokens if self.keep is None else count_of(self.keep, tokens)
            return SpanPlan(tokens, entry, 0, layer_counts(entry, depth, self.schedule or (), may_grow=self.reenters))
        schedule = self.schedule_at_depth(depth) if self.schedule is None else self.schedule
        if any(isinstance(kept, int) for _, kept in schedule):
            raise ValueError(f"{self.name}: with a budget give fractions in schedule= (0.0 to 1.0), got {schedule}")
        target = target_mean(budget, tokens)
        return (
            plan_keep_all(tokens, depth)
            if target >= tokens
            else plan_with_schedule(self, schedule, tokens, depth, target)
        )

    def with_paper_schedule(self: Self, depth: int, share: float | None = None) -> Self:
        return self if self.schedule is not None else replace(self, schedule=self.schedule_at_depth(depth))
