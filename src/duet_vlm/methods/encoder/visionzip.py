"""VisionZip: keep dominant vision tokens, merge all others into contextual ones, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm.ops.merge_targets import merge_around_anchors, visionzip_contextual_count
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep, count_of, infeasible_budget, target_mean
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.planning.tokens import MERGES, Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_choice


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(EncoderReducer):
    """VisionZip (CVPR 2025, arXiv 2412.04467).

    Keeps the ``dominant`` tokens that the vision encoder attends to most; every other token joins the most similar
    (cosine of mean keys) of ``contextual`` anchors, evenly spaced over the others in raster order. Text plays no part,
    and nothing happens in the decoder.

    Parameters
    ----------
    dominant, contextual : int or float, optional
        Rows per span or fractions of its tokens. A budget of n solves to round(10 n / 64) contextual rows (the paper's
        54 + 10 at 64).
    merge : str
        "mean" of anchor and members, or "anchor_plus_mean" (released code).
    anchor_step : str
        "spread": floor(i * M / K); "floor": every (M // K)-th of the M others (released code).
    signal_segments : bool
        Keep the tower's own attention segments (images, frames, windows) when summing attention. False sums over
        everything in the call, as the released Qwen2.5-VL code does under sdpa.

    Cost: one row of attention (CLS) or blocked column sums of one vision layer. Needs: vision attention and keys.
    Usable in training.

    Differences from the authors' code (dvlab-research/VisionZip): no CLS row as token, a mean instead of a sum of two,
    evenly spaced anchors, kept positions in raster order. ``VisionZip.official`` restores the released behaviour.
    """

    paper = "VisionZip, CVPR 2025, arXiv 2412.04467"
    summary = "keep dominant vision tokens, merge all others into contextual ones before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.KEYS})

    dominant: Keep | None = None
    contextual: Keep | None = None
    merge: str = "mean"
    anchor_step: str = "spread"
    signal_segments: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dominant", "contextual"):
            if getattr(self, name) is not None:
                check_keep(name, getattr(self, name))
        if self.contextual is not None and self.dominant is None:
            raise ValueError(f"contextual={self.contextual} needs dominant= too")
        check_choice("merge", self.merge, MERGES)
        check_choice("anchor_step", self.anchor_step, ("spread", "floor"))

    @classmethod
    def official(cls, dominant: int = 54, contextual: int = 10, **fields: Any) -> VisionZip:
        """Return the settings of the released LLaVA code: CLS counts as a dominant token, anchor + mean, [CLS,
        dominant, contextual] at compact positions.
        """
        options = TokenOptions(
            cls_token=True, positions="compact", protect_predicting_tokens=False, signal_queries=None
        )
        settings: dict[str, Any] = {"dominant": dominant, "contextual": contextual}
        return cls.from_preset(options, fields, **settings, merge="anchor_plus_mean", anchor_step="floor")

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(signal_segments=self.signal_segments)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.dominant is not None, "dominant=, contextual=")
        available = tokens + self.options.cls_token
        if budget is None:
            assert self.dominant is not None
            dominant = count_of(self.dominant, available)
            contextual = min(count_of(self.contextual or 0, available), available - dominant)
        else:
            target = target_mean(budget, tokens)
            if target >= tokens:
                return plan_keep_all(tokens, depth)
            entry = int(target + 1e-9)
            if entry < 1:
                raise infeasible_budget(self.name, target, 1, tokens, "at least one token enters the decoder")
            contextual = visionzip_contextual_count(entry)
            dominant = entry - contextual
        if dominant + contextual > tokens:
            raise ValueError(
                f"dominant={dominant} + contextual={contextual} rows (CLS too) do not fit the image's {tokens} placeholders"
            )
        return SpanPlan(tokens, dominant, contextual, (dominant + contextual,) * depth)

    def select_tokens(self, view: EncoderView) -> Selection:
        is_dominant = top(view.require(Input.IMPORTANCE), view.valid, view.dominant)
        dominant, dominant_valid = pack_right(is_dominant, max(plan.dominant for plan in view.plans))
        width = max(plan.contextual for plan in view.plans)
        others = view.valid.sum(1) - view.dominant
        rest, _ = pack_right(view.valid & ~is_dominant, view.valid.shape[1])
        spread = self.anchor_step == "spread"
        return merge_around_anchors(
            dominant, dominant_valid, rest, others, view.contextual, width, view.require(Input.KEYS), self.merge, spread
        )
