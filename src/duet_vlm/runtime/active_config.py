"""The configuration of a call: a method, its budget, and the plans that follow.

Immutable: other settings make another one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.planning.solve import plan_or_clamp
from duet_vlm.planning.spans import TowerFloors, plan_parts, plan_parts_of_tower
from duet_vlm.reducers.base import Reducer
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
        tower, keeps_structure = self.tower_reducer, self.reducer.options.newline_tokens == "keep"
        solve = functools.partial(
            plan_parts, self.plan, self.budget, sizes, structure, per_crop, keeps_structure, num_survivors
        )
        if tower is None or tower is not self.reducer or num_survivors is not None:
            return solve()
        floors = TowerFloors(
            tower.name,
            least=tower.least + num_cls,
            small=tower.options.small_image_tokens,
            kept_structure=structure if keeps_structure else 0,
            depth=self.depth,
            each=per_crop,
        )
        return plan_parts_of_tower(solve, self.budget, sizes, structure, floors)
