"""Keep everything: the model as it is, measured by the same instruments."""

from __future__ import annotations

from dataclasses import dataclass

from duet_vlm.budget import Budget, SpanPlan, check_budget
from duet_vlm.reducer import Reducer, whole
from duet_vlm.registry import register


@register("none")
@dataclass(frozen=True)
class NoReduction(Reducer):
    """The baseline: no token is merged or dropped, and outputs are bit-equal to the untouched model. A budget is accepted and ignored,
    so that comparisons can loop over methods."""

    paper = "-"
    summary = "keep every token (baseline)"

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget(budget)
        return whole(tokens, depth)
