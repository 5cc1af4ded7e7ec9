"""Frames: keep the tokens of a video that changed since the frame before, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.merge import unit_rows
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.ops.select import ranks, spaced_picks, top
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register


@register("frames")
@dataclass(frozen=True)
class Frames(EncoderReducer):
    """Temporal redundancy, after EVS (Efficient Video Sampling, NVIDIA).

    The score of a video token is 1 - cosine with the token at the same place one time step before. The whole first step
    is ranked before all others, then the tokens with the highest scores, ties to the lower index; the first ``keep`` of
    this order are kept. Content that never changes is kept once. No attention, no text, no merging.

    Where no earlier step exists, tokens are thinned evenly in raster order: in an image, and in the first step of a
    video whose budget is less than one step.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n. In a composition (``duet_vlm.compose``)
        with a method that reduces before the decoder: the size of the pool that this method chooses from.

    Cost: one cosine per token. Needs: frames; no input of the vision tower beyond features. Usable in training (the
    choice carries no gradient).

    Differences from the published description: a budget below one step is met (EVS never keeps less than the first
    step); kept positions.
    """

    paper = "after EVS (Efficient Video Sampling, NVIDIA)"
    summary = "keep the tokens of a clip that changed since the frame before; images are thinned evenly"
    requires = frozenset({Input.FEATURES})
    compares_frames = True

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.options.crops == "per_crop":
            raise ValueError(
                f"{self.name} compares the frames of a clip, and crops='per_crop' would separate them: use crops='joint'"
            )
        if self.options.cls_token:
            raise ValueError(
                f"cls_token=True cannot work with {self.name}: the CLS row has no place in the frame to compare"
            )

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        return Selection.keep_only(
            *pack_right(self.changed(view, view.dominant), max(plan.dominant for plan in view.plans))
        )

    def changed(self, view: EncoderView, count: Tensor) -> Tensor:
        """Mask [B, N] of ``count`` [B] tokens of each span: the first step, then the tokens that changed most."""
        if view.modality != "video":
            return spaced_picks(view.valid, count)
        parts = view.require_parts()
        first = view.valid & (parts <= 0)
        size = first.sum(1)
        score = novelty(view.require(Input.FEATURES), view.valid, parts, size)
        return spaced_picks(first, torch.minimum(count, size)) | top(
            score, view.valid & ~first, (count - size).clamp(min=0)
        )


def novelty(features: Tensor, valid: Tensor, parts: Tensor, size: Tensor) -> Tensor:
    """Compute 1 - cosine of each token with the one at the same place a step before.

    Half the squared distance of unit rows is used, which is exactly 0 where nothing changed. Only values of later steps
    have a meaning.

    Parameters
    ----------
    features : Tensor
        [B, N, C].
    valid : Tensor
        [B, N] bool.
    parts : Tensor
        [B, N] long, time step of each token.
    size : Tensor
        [B] long, tokens per step.

    Returns
    -------
    Tensor
        [B, N] float32.
    """
    # by step, then by place
    order = parts.masked_fill(~valid, torch.iinfo(parts.dtype).max).argsort(dim=1, stable=True)
    before = order.gather(1, (ranks(order) - size[:, None]).clamp(min=0))
    unit = unit_rows(features)
    return gather_rows(unit, before).sub_(unit).square_().sum(-1) / 2  # in place: videos are long
