"""The contract of methods that reduce in front of the vision tower's blocks, and what they may look at.

A *tower reducer* says which units of each picture go through the tower at all. A unit is what later becomes one token: a patch, or a cell of
patches that a merger joins. Rows that leave are gone for whatever follows; a method behind the tower chooses among those that are left.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from duet_vlm.budget import EPSILON, Budget, Keep, SpanPlan, check_keep, count_of, infeasible, target_mean
from duet_vlm.ops.ragged import pack_right
from duet_vlm.reducer import EncoderReducer, VisionView, check_budget_or_fields, whole
from duet_vlm.tokens import Selection

Grid = tuple[int, int]


@dataclass(frozen=True)
class TowerView:
    """What a tower reducer may look at; P pictures (images, crops or frames: whatever the tower looks at by itself) of U units.

    ``valid`` [P, U] bool: units that may be chosen; ``keep`` [P] how many of them stay, ``keeps`` the same on the host. ``grids``: (rows,
    columns) of each picture's units, which stand line by line. ``contrast`` [P, U] float32: how far a unit's patch embeddings, without
    position, lie from the picture's mean (length of the difference, mean over the unit's patches); None unless the method names it in
    ``tower_signals``.
    """

    valid: Tensor
    keep: Tensor
    keeps: tuple[int, ...]
    grids: tuple[Grid, ...]
    contrast: Tensor | None = None


@dataclass(frozen=True)
class TowerReducer(EncoderReducer):
    """A method that reduces before the tower's first block.

    Alone, all that is left of a picture enters the decoder, and a budget says how much that is. In front of other methods
    (``"contrast+duet_plus"``) the budget is theirs, over the unreduced tokens, and ``keep`` belongs to the tower.

    Attributes
    ----------
    keep : int or float or None
        Tokens of a span that go through the tower: a count, or a fraction.
    mass : bool
        A unit that leaves is counted with the one that is most like it (cosine of patch embeddings): in the tower's attention, and where
        tokens are ranked by it, the survivor weighs as many rows as it stands for. Kernels that take no bias (flash attention) go without.
    """

    tower_signals: ClassVar[frozenset[str]] = frozenset()
    reads_features: ClassVar[bool] = False
    reduces_in_tower: ClassVar[bool] = True

    keep: Keep | None = None
    mass: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
            if self.keep == 0:
                raise ValueError("keep=0: at least one token of a picture goes through the tower")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.keep is not None, "keep=")
        if budget is None:
            assert self.keep is not None  # just checked
            left = max(1, count_of(self.keep, tokens))
        else:
            left = math.floor(target_mean(budget, tokens) + EPSILON)
            if left < 1:
                raise infeasible(self.name, target_mean(budget, tokens), 1, tokens, "at least one token enters the decoder")
        return whole(tokens, depth) if left >= tokens else SpanPlan(tokens, left, 0, (left,) * depth, tower=left)

    def v2v(self, view: VisionView) -> Selection:
        """All that the tower left."""
        return Selection.pick(*pack_right(view.valid, max(plan.entry for plan in view.plans)))

    @property
    def tower(self) -> TowerReducer:  # type: ignore[override]  # of a composition it is the first stage
        return self

    @abstractmethod
    def stay(self, view: TowerView) -> Tensor:
        """Mask [P, U] of the units that stay; exactly ``view.keep`` of each picture's ``view.valid``."""
