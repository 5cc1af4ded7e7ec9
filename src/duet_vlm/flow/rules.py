"""What one call runs by: a method, its budget, and the plans that follow. Never changed: other settings are other rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from duet_vlm.budget import Budget, SpanPlan
from duet_vlm.flow.verify import checked_plan
from duet_vlm.parts import plan_span
from duet_vlm.reducer import Reducer, plan_within


@dataclass(frozen=True, eq=False)
class Rules:
    """A method with its budget on a decoder of ``depth`` layers."""

    reducer: Reducer
    budget: Budget | None
    depth: int
    _plans: dict[int, SpanPlan] = field(default_factory=dict, repr=False)

    def plan(self, tokens: int) -> SpanPlan:
        """The plan of a span of ``tokens`` visual tokens, solved once."""
        if tokens not in self._plans:
            plan = plan_within(self.reducer, tokens, self.depth, self.budget)
            self._plans[tokens] = checked_plan(self.reducer, plan, tokens, self.depth)
        return self._plans[tokens]

    def span(self, sizes: Sequence[int], structure: int, each: bool) -> SpanPlan:
        """The plan of a span with parts of ``sizes`` tokens and ``structure`` rows beside them; ``each``: parts are reduced one by one."""
        keep_structure = getattr(self.reducer, "newline", "drop") == "keep"
        return plan_span(self.plan, self.budget, sizes, structure, each, keep_structure)
