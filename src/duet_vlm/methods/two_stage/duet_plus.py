"""DUET+: salient, mutually dissimilar vision tokens, close ones merged, then drops inside the decoder by text
attention.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duet_vlm.ops.greedy import conditional_kernel, cosine, greedy_dpp_map
from duet_vlm.ops.merge_targets import merge_if_similar
from duet_vlm.ops.ragged import pack_right, upload
from duet_vlm.ops.saliency import of_largest
from duet_vlm.ops.schedules import awake_schedule, tapered_schedule
from duet_vlm.ops.select import ranking, top
from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    BudgetError,
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
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scoring import ScoringRules

# of a token's own entry in the kernel that no other token explains: where all are explained the most salient are next
FLOOR = 0.05


@register("duet_plus")
@dataclass(frozen=True)
class DuetPlus(EncoderReducer, DecoderReducer):
    """DUET+ (ours): DUET-VLM (arXiv 2602.18846) with a first stage after CDPruner (arXiv 2506.10967) and drops by
    budget.

    V2V picks tokens one after the other by the largest determinant of w_i cos(i, j) w_j, where w is saliency to the
    power ``alpha`` and the cosine is that of the features before the decoder: salient tokens that are unlike each
    other. Of the other tokens only the most salient are merged, each into the chosen token most similar to it, and only
    where the two are close. T2V drops between decoder layers by text attention as DUET-VLM does, where the budget is
    too small to keep the whole entry.

    With ``options.reentry="layer"`` tokens are not dropped but sleep: the first layers read all that entered, and in
    front of each later one those wake which any head of any text token attends to most there.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction of the span's tokens. Left out with ``schedule``
        given: no V2V.
    alpha : float
        Exponent of saliency, at least 0: 0 chooses by dissimilarity alone.
    pool : float
        Number of unchosen tokens that may merge, per chosen token, at least 0; the most salient ones. 0 merges nothing.
    tau : float
        Least cosine, in [-1, 1], between a token and the one that it merges into.
    schedule : ((layer, keep), ...), optional
        T2V drops, as in ``Duet``; default ``tapered_schedule``, or ``awake_schedule`` with re-entry. With a budget:
        fractions, and the largest entry that the budget allows.

    Cost: as ``Duet``, and an N x N table of cosines and per chosen token one pass over the tokens chosen so far; 8 N^2
    bytes. Needs: vision attention, text after the image; no CLS token. Usable in training (the choice carries no
    gradient, merged tokens do).
    """

    paper = "ours, after CDPruner and DUET-VLM"
    summary = "keep salient vision tokens that are unlike each other, merge close ones (V2V); drop by text attention inside the decoder (T2V)"
    requires = frozenset({Input.IMPORTANCE, Input.FEATURES, Input.SCORES})

    keep: Keep | None = None
    alpha: float = 0.5
    pool: float = 0.5
    tau: float = 0.6
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        for name in ("alpha", "pool"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of at least 0")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}: a cosine, give a number in [-1, 1] (pool=0 turns merging off)")
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule, self.reenters))

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(
            self, budget, self.keep is not None or (budget is None and self.schedule is not None), "keep=, schedule="
        )
        if budget is None:
            schedule = self._usual_schedule(depth) if self.schedule is None else self.schedule
            entry = tokens if self.keep is None else count_of(self.keep, tokens)
            return SpanPlan(tokens, entry, 0, layer_counts(entry, depth, schedule, may_grow=self.reenters))
        check_shares(self.schedule)
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        if self.schedule is not None:
            return plan_with_schedule(self, self.schedule, tokens, depth, target)
        with contextlib.suppress(BudgetError):
            return plan_with_schedule(self, self._usual_schedule(depth, target / tokens), tokens, depth, target)
        # at a small budget one token can still enter
        return plan_with_schedule(self, self._usual_schedule(depth, 0.0), tokens, depth, target)

    @property
    def _wakes(self) -> bool:
        return self.options.reentry == "layer"

    def _usual_schedule(self, depth: int, share: float | None = None) -> Schedule:
        return (awake_schedule if self._wakes else tapered_schedule)(depth, share)

    def with_paper_schedule(self, depth: int, share: float | None = None) -> DuetPlus:
        return self if self.schedule is not None else replace(self, schedule=self._usual_schedule(depth, share))

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(score_heads="most" if self._wakes else "mean")

    def select_tokens(self, view: EncoderView) -> Selection:
        importance = view.require(Input.IMPORTANCE)
        steps = max(plan.dominant for plan in view.plans)
        similarity, weight = (
            cosine(view.require(Input.FEATURES), view.valid),
            of_largest(importance, view.valid, self.alpha),
        )
        chosen = greedy_dpp_map(conditional_kernel(similarity, weight, FLOOR), view.valid, view.dominant, steps)
        index, valid = pack_right(chosen, steps)
        rest = view.valid & ~chosen
        pools = [math.floor(self.pool * plan.dominant + EPSILON) for plan in view.plans]
        members = ranking(importance, rest)[:, : max(pools)]
        offered = torch.minimum(upload(pools, rest.device), rest.sum(1))
        return merge_if_similar(index, valid, members, offered, similarity, self.tau)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
