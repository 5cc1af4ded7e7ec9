"""Keep everything: the model as it is, measured by the same instruments."""

from __future__ import annotations

from dataclasses import dataclass

from duet_vlm.planning.budget import Budget, SpanPlan, check_budget
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.plans import plan_keep_all
from duet_vlm.reducers.registry import register


@register("none")
@dataclass(frozen=True)
class NoReduction(Reducer):
    """The baseline: no token is merged or dropped, and outputs are bit-equal to the untouched model. A budget is accepted and ignored,
    so that comparisons can loop over methods."""

    paper = "-"
    summary = "keep every token (baseline)"

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget(budget)
        return plan_keep_all(tokens, depth)
