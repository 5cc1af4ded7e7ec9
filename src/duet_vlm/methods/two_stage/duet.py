"""DUET-VLM: keep and merge vision tokens before the decoder (V2V), then drop by text attention inside it (T2V)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.merge_targets import duet_contextual_count, merge_around_anchors
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.schedules import duet_schedule
from duet_vlm.ops.select import ranking, ranks, top
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
from duet_vlm.planning.solve import check_budget_or_fields, check_shares, plan_keep_all, plan_with_schedule
from duet_vlm.planning.tokens import MERGES, Selection
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_choice

RELEASED: dict[str, Any] = {
    "merge": "anchor_plus_mean",
    "anchor_step": "floor",
    "rounding": "int",
}  # both released codes
RELEASED_OPTIONS = TokenOptions(protect_predicting_tokens=False, signal_queries=None)


@register("duet")
@dataclass(frozen=True)
class Duet(EncoderReducer, DecoderReducer):
    """DUET-VLM (CVPR 2026, arXiv 2602.18846).

    V2V keeps the ``dominant`` tokens that the vision encoder attends to most and merges a small pool, the next
    ``cluster_width * contextual`` tokens by importance, into ``contextual`` rows around anchors evenly spaced in
    importance rank; the rest is dropped. T2V then drops visual tokens between decoder layers, ranked by the attention
    that text pays to them.

    Parameters
    ----------
    dominant, contextual : int or float, optional
        Rows per span (int) or fractions of its tokens (float). Left out with ``schedule`` given: no V2V.
    cluster_width : int
        Size of the merged pool per contextual row, at least 1 (0 with ``anchor_step="floor"``: one contextual row,
        nothing merged).
    schedule : ((layer, keep), ...), optional
        T2V drops: before ``layer`` keep that many (int) or that fraction (float) of the entering tokens. Default: half
        of the tokens from half of the depth on, none from three quarters on. ``()`` turns T2V off. With a budget:
        fractions, and the largest entry that the budget allows.
    merge : str
        "mean" (size-weighted mean of anchor and members) or "anchor_plus_mean" (released code).
    anchor_step : str
        "spread": anchors at pool ranks floor(i * P / K); "floor": every (P // K)-th, which bunches them (released
        code).
    rounding : str
        How fractions of the schedule become counts: "floor" (exact product) or "int" (truncated float product, released
        code).
    signal_segments : bool
        Keep the tower's own attention segments (images, frames, windows) when summing attention. False sums over
        everything in the call, as the released Qwen2.5-VL code does under sdpa.
    score_mask : str
        "causal": a query sees what precedes it; "none": every token (released Qwen2.5-VL code).

    Cost: one row of attention (CLS) or blocked column sums of one vision layer; per T2V stage one key projection of all
    rows plus queries of the text rows. Needs: vision attention, vision keys, text after the image. Usable in training.

    Differences from the authors' code (AMD-AGI/DUET-VLM): no CLS row as token, a mean instead of anchor + mean, evenly
    spaced anchors, K = 0 gives no row, exact floors, kept positions, all images and all batch rows. ``official_llava``
    and ``official_qwen25`` restore the released behaviour. Where the released Qwen code overwrites its token count
    after the first stage, this class does what is meant.
    """

    paper = "DUET-VLM, CVPR 2026, arXiv 2602.18846"
    summary = "keep dominant, merge contextual vision tokens (V2V); drop by text attention inside the decoder (T2V)"
    requires = frozenset({Input.IMPORTANCE, Input.KEYS, Input.SCORES})

    dominant: Keep | None = None
    contextual: Keep | None = None
    cluster_width: int = 4
    schedule: Schedule | None = None
    merge: str = "mean"
    anchor_step: str = "spread"
    rounding: str = "floor"
    signal_segments: bool = True
    score_mask: str = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dominant", "contextual"):
            if getattr(self, name) is not None:
                check_keep(name, getattr(self, name))
        if self.contextual is not None and self.dominant is None:
            raise ValueError(f"contextual={self.contextual} needs dominant= too")
        lowest = 0 if self.anchor_step == "floor" else 1
        if self.cluster_width < lowest:
            raise ValueError(f"cluster_width={self.cluster_width}: must be at least {lowest}")
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule, self.reenters))
        check_choice("merge", self.merge, MERGES)
        check_choice("anchor_step", self.anchor_step, ("spread", "floor"))
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("score_mask", self.score_mask, ("causal", "none"))

    @classmethod
    def official_llava(cls, dominant: int = 300, contextual: int = 7, cluster_width: int = 4, **fields: Any) -> Duet:
        """Return the settings of the released LLaVA code: CLS counts as a dominant token, compact positions, anchor +
        mean, all turns in training.
        """
        counts = {"dominant": dominant, "contextual": contextual, "cluster_width": cluster_width}
        options = RELEASED_OPTIONS.overlaid(
            TokenOptions(cls_token=True, positions="compact", training_turns="all", skip_unanswered=True)
        )
        return cls.from_preset(options, fields, **RELEASED, **counts)

    @classmethod
    def official_qwen25(
        cls, dominant: Keep = 170, contextual: Keep = 35, cluster_width: int = 4, **fields: Any
    ) -> Duet:
        """Return the settings of the released Qwen2.5-VL code: last vision block, kept positions, ranking softmax
        without a causal mask.
        """
        counts = {"dominant": dominant, "contextual": contextual, "cluster_width": cluster_width}
        options = RELEASED_OPTIONS.overlaid(TokenOptions(signal_layer=-1))
        return cls.from_preset(options, fields, **RELEASED, **counts, score_mask="none")

    # ---- how many

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(signal_segments=self.signal_segments, score_mask=self.score_mask)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        given = self.dominant is not None or (budget is None and self.schedule is not None)
        check_budget_or_fields(self, budget, given, "dominant=, contextual=, schedule=")
        if budget is None:
            return self._planned(tokens, depth)
        check_shares(self.schedule)
        return self._solved(tokens, depth, target_mean(budget, tokens))

    def _planned(self, tokens: int, depth: int) -> SpanPlan:
        available = tokens + self.options.cls_token
        dominant, contextual = tokens, 0
        if self.dominant is not None:
            dominant = min(count_of(self.dominant, available, self.rounding), available)
            contextual = min(count_of(self.contextual or 0, available, self.rounding), available - dominant)
            # the released code emits one contextual row even for K = 0, and only one for w = 0
            if self.anchor_step == "floor":
                contextual = max(contextual if self.cluster_width else 0, min(1, available - dominant))
            if dominant + contextual > tokens:
                if self.options.cls_token:
                    raise ValueError(
                        f"dominant={dominant} (CLS included) + contextual={contextual} rows do not fit the image's {tokens} placeholders"
                    )
                contextual = tokens - dominant
        schedule = duet_schedule(depth) if self.schedule is None else self.schedule
        return SpanPlan(
            tokens,
            dominant,
            contextual,
            layer_counts(dominant + contextual, depth, schedule, self.rounding, self.reenters),
        )

    def _solved(self, tokens: int, depth: int, target: float) -> SpanPlan:
        """Plan the largest entry under the schedule, the paper's where none is given; if even all tokens do not use up
        the budget, later stages keep more.
        """
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        schedule = duet_schedule(depth) if self.schedule is None else self.schedule
        plan = plan_with_schedule(self, schedule, tokens, depth, target)
        if not plan.reduces_entry:
            return plan
        entry = plan.dominant
        contextual = duet_contextual_count(entry, tokens)
        return replace(plan, dominant=entry - contextual, contextual=contextual)

    def with_paper_schedule(self, depth: int, share: float | None = None) -> Duet:
        return self if self.schedule is not None else replace(self, schedule=duet_schedule(depth))

    # ---- which

    def select_tokens(self, view: EncoderView) -> Selection:
        order = ranking(view.require(Input.IMPORTANCE), view.valid)
        dominant, dominant_valid = pack_right(
            (ranks(order) < view.dominant[:, None]) & view.valid, max(plan.dominant for plan in view.plans)
        )
        width = max(plan.contextual for plan in view.plans)
        wanted = view.contextual * (self.cluster_width if self._merges else 0)
        pool = torch.minimum(wanted.clamp(min=1), view.valid.sum(1) - view.dominant)
        rank = torch.arange(min(max(1, self.cluster_width * width), order.shape[1]), device=order.device)
        rest = order.gather(1, (view.dominant[:, None] + rank).clamp(max=order.shape[1] - 1))
        spread = self.anchor_step == "spread"
        return merge_around_anchors(
            dominant, dominant_valid, rest, pool, view.contextual, width, view.require(Input.KEYS), self.merge, spread
        )

    @property
    def _merges(self) -> bool:
        """False where the settings have no contextual token (K = 0): the one of the released code then merges nothing."""
        return self.dominant is None or isinstance(self.contextual, float) or bool(self.contextual)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
