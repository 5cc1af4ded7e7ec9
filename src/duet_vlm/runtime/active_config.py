"""What one call runs by: a method, its budget, and the plans that follow. Never changed: other settings are other rules."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

from duet_vlm.planning.budget import Budget, BudgetError, SpanPlan, infeasible_budget, target_mean
from duet_vlm.planning.spans import of_each_part, plan_span
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.plans import plan_or_clamp
from duet_vlm.reducers.vision_tower import TowerReducer, tower_of
from duet_vlm.runtime.validation import check_plan


@dataclass(frozen=True, eq=False)
class ActiveConfig:
    """A method with its budget on a decoder of ``depth`` layers."""

    reducer: Reducer
    budget: Budget | None
    depth: int
    _plans: dict[tuple[int, int | None], SpanPlan] = field(default_factory=dict, repr=False)

    @property
    def tower_reducer(self) -> TowerReducer | None:
        """What reduces in the tower."""
        return tower_of(self.reducer)

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold in the tower says how many tokens are left, which is known when the tower has begun."""
        tower = self.tower_reducer
        return tower is not None and tower.by_threshold and (self.budget is None or tower is not self.reducer)

    def plan(self, tokens: int, left: int | None = None) -> SpanPlan:
        """The plan of a span of ``tokens`` visual tokens, solved once; ``left``: how many of them a threshold in the tower left."""
        if (tokens, left) not in self._plans:
            plan = plan_or_clamp(self.reducer, tokens, self.depth, self.budget, left)
            self._plans[tokens, left] = check_plan(self.reducer, plan, tokens, self.depth)
        return self._plans[tokens, left]

    def plan_span(self, sizes: Sequence[int], structure: int, each: bool, left: Sequence[int] | None = None, fed: int = 0) -> SpanPlan:
        """The plan of a span with parts of ``sizes`` tokens and ``structure`` rows beside them; ``each``: parts are reduced one by one;
        ``left``: how many tokens of each a threshold in the tower left; ``fed``: rows of each that are no patches (CLS) and never leave.

        Raises
        ------
        BudgetError
            As ``plan``, and where a method in the tower, alone, has less than one token for a part. A fraction of parts of fewer tokens than
            ``small_image_tokens`` gives them the floor instead.
        """
        tower, keep_structure = self.tower_reducer, self.reducer.newline_tokens == "keep"
        solve = functools.partial(plan_span, self.plan, self.budget, sizes, structure, each, keep_structure, left)
        if tower is None or tower is not self.reducer or left is not None:
            return solve()
        least = [min(size, tower.least + fed) for size in sizes]
        kept = structure if keep_structure else 0
        floor, tokens = sum(least) + kept, sum(sizes) + structure
        try:
            plan = solve()
        except BudgetError as error:
            if error.floor is None or error.floor >= floor:
                raise
            plan = SpanPlan(tokens, kept, 0, (kept,) * self.depth, structure=kept, parts=((0, 0),) * (len(sizes) * each), tower=0)
        if not plan.merges or plan.entry - plan.structure >= sum(least) or self.budget is None:
            return of_each_part(plan, sizes, least)
        if isinstance(self.budget, Integral) or max(sizes) >= tower.small_image_tokens:
            each_of = f"each of its {len(sizes)} crops or frames" if len(sizes) > 1 else "it"
            what = f"of {each_of} no fewer than {min(max(sizes), tower.least + fed)} tokens enter the decoder"
            raise infeasible_budget(tower.name, target_mean(self.budget, tokens), floor, tokens, what)
        return replace(of_each_part(plan, sizes, least), floored=True)
