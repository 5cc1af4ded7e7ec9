"""No reduction: the unmodified model under the same instruments."""

from __future__ import annotations

from dataclasses import dataclass

from duet_vlm.planning.budget import Budget, SpanPlan, check_budget
from duet_vlm.planning.solve import plan_keep_all
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.registry import register


@register("none")
@dataclass(frozen=True)
class NoReduction(Reducer):
    """Baseline without reduction: every token is kept, and outputs are bit-equal to the untouched model.

    A budget is accepted and ignored, so that comparisons can loop over methods.

    Cost: none. Needs: no input of the vision tower and no text.
    """

    paper = "-"
    summary = "keep every token (baseline)"

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget(budget)
        return plan_keep_all(tokens, depth)
