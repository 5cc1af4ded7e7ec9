"""What one call runs by: a method, its budget, and the plans that follow. Never changed: other settings are other rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from duet_vlm.budget import Budget, SpanPlan
from duet_vlm.flow.verify import checked_plan
from duet_vlm.parts import plan_span
from duet_vlm.reducer import Reducer, plan_within
from duet_vlm.tower import TowerReducer


@dataclass(frozen=True, eq=False)
class Rules:
    """A method with its budget on a decoder of ``depth`` layers."""

    reducer: Reducer
    budget: Budget | None
    depth: int
    _plans: dict[tuple[int, int | None], SpanPlan] = field(default_factory=dict, repr=False)

    @property
    def tower(self) -> TowerReducer | None:
        """What reduces in the tower."""
        return getattr(self.reducer, "tower", None)

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold in the tower says how many tokens are left, which is known when the tower has begun."""
        tower = self.tower
        return tower is not None and tower.by_threshold and (self.budget is None or tower is not self.reducer)

    def plan(self, tokens: int, left: int | None = None) -> SpanPlan:
        """The plan of a span of ``tokens`` visual tokens, solved once; ``left``: how many of them a threshold in the tower left."""
        if (tokens, left) not in self._plans:
            plan = plan_within(self.reducer, tokens, self.depth, self.budget, left)
            self._plans[tokens, left] = checked_plan(self.reducer, plan, tokens, self.depth)
        return self._plans[tokens, left]

    def span(self, sizes: Sequence[int], structure: int, each: bool, left: Sequence[int] | None = None) -> SpanPlan:
        """The plan of a span with parts of ``sizes`` tokens and ``structure`` rows beside them; ``each``: parts are reduced one by one;
        ``left``: how many tokens of each a threshold in the tower left."""
        keep_structure = getattr(self.reducer, "newline", "drop") == "keep"
        return plan_span(self.plan, self.budget, sizes, structure, each, keep_structure, left)
