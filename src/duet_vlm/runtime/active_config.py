"""The configuration of a call: a method, its budget, and the plans that follow.

Immutable: other settings make another one.
"""

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
        """The method that drops patches inside the vision tower, if there is one."""
        return tower_of(self.reducer)

    @property
    def by_threshold(self) -> bool:
        """True if a threshold in the tower decides how many tokens are kept.

        The count is known once the tower has begun.
        """
        tower = self.tower_reducer
        return tower is not None and tower.by_threshold and (self.budget is None or tower is not self.reducer)

    def plan(self, tokens: int, num_survivors: int | None = None) -> SpanPlan:
        """The plan of a span of ``tokens`` visual tokens, solved once.

        ``num_survivors``: how many of them a threshold in the tower kept.
        """
        if (tokens, num_survivors) not in self._plans:
            plan = plan_or_clamp(self.reducer, tokens, self.depth, self.budget, num_survivors)
            self._plans[tokens, num_survivors] = check_plan(self.reducer, plan, tokens, self.depth)
        return self._plans[tokens, num_survivors]

    def plan_span(
        self,
        sizes: Sequence[int],
        structure: int,
        per_crop: bool,
        num_survivors: Sequence[int] | None = None,
        num_cls: int = 0,
    ) -> SpanPlan:
        """The plan of a span of several parts (crops or frames).

        Parameters
        ----------
        sizes : sequence of int
            Tokens of each part.
        structure : int
            Rows between the parts (separators, newlines).
        per_crop : bool
            Parts are reduced one by one.
        num_survivors : sequence of int, optional
            Tokens of each part that a threshold in the tower kept.
        num_cls : int
            Rows of each part that are no patches (CLS) and are always kept.

        Raises
        ------
        BudgetError
            As ``plan``, and where a method that works in the tower only has less than one token for a part. With a
            fraction, parts of fewer tokens than ``small_image_tokens`` get the smallest possible count instead.
        """
        tower, keep_structure = self.tower_reducer, self.reducer.options.newline_tokens == "keep"
        solve = functools.partial(
            plan_span, self.plan, self.budget, sizes, structure, per_crop, keep_structure, num_survivors
        )
        if tower is None or tower is not self.reducer or num_survivors is not None:
            return solve()
        least = [min(size, tower.least + num_cls) for size in sizes]
        kept = structure if keep_structure else 0
        floor, tokens = sum(least) + kept, sum(sizes) + structure
        try:
            plan = solve()
        except BudgetError as error:
            if error.floor is None or error.floor >= floor:
                raise
            plan = SpanPlan(
                tokens,
                kept,
                0,
                (kept,) * self.depth,
                structure=kept,
                parts=((0, 0),) * (len(sizes) * per_crop),
                tower=0,
            )
        if not plan.merges or plan.entry - plan.structure >= sum(least) or self.budget is None:
            return of_each_part(plan, sizes, least)
        if isinstance(self.budget, Integral) or max(sizes) >= tower.options.small_image_tokens:
            each_of = f"each of its {len(sizes)} crops or frames" if len(sizes) > 1 else "it"
            what = f"of {each_of} no fewer than {min(max(sizes), tower.least + num_cls)} tokens enter the decoder"
            raise infeasible_budget(tower.name, target_mean(self.budget, tokens), floor, tokens, what)
        return replace(of_each_part(plan, sizes, least), floored=True)
