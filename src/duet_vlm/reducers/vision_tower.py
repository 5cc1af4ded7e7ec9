"""The contract of methods that reduce inside the vision tower, and what they may look at.

A *tower reducer* says which units of each picture go through the tower's blocks, or through the rest of them. A unit is
what later becomes one token: a patch, or a cell of patches that a merger joins. Rows that leave are gone for whatever
follows; a method behind the tower chooses among those that are left.

Where units leave is counted in blocks whose attention has run: 0 is in front of the first block, k behind the attention
of the k-th block and in front of its MLP, so that scores of that attention cost no MLP of rows that leave.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    Keep,
    SpanPlan,
    check_keep,
    count_of,
    infeasible_budget,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import TOWER_INPUTS, Input, required

Grid = tuple[int, int]


FIELDS = {  # the field that an input fills
    Input.PATCH_CONTRAST: ("contrast",),
    Input.PIXELS: ("pixels",),
    Input.BLOCK_KEYS: ("keys",),
    Input.KEY_NORM: ("key_norm",),
    Input.BLOCK_ATTENTION: ("attention",),
}


@dataclass(frozen=True)
class TowerView:
    """Inputs of a method inside the vision tower, for P pictures of up to U units.

    A picture is what the tower processes by itself: an image, a crop or a frame. A unit is what enters or leaves
    together: a patch, or the patches that a merger joins. Signals are float32 means over the patches of a unit, and
    None unless the method requires them.

    Attributes
    ----------
    valid : Tensor
        [P, U] bool, units that may be chosen.
    num_keep : Tensor
        [P] long, units to keep of each picture.
    host_num_keep : tuple of int
        ``num_keep`` on the host; empty where a threshold decides.
    grids : tuple of (int, int)
        Rows and columns of units of each picture; before the first block they stand line by line.
    contrast : Tensor or None
        [P, U] distance of a unit's patch embeddings, without position, from the picture's mean. Needs
        ``Input.PATCH_CONTRAST``.
    pixels : Tensor or None
        [P, U, T, m] pixels of a unit as the processor made them, of each of the T frames that it shows. Needs
        ``Input.PIXELS``.
    previous_picture : tuple of int
        Number of the picture one step of time earlier; -1 where there is none.
    after : int
        Number of blocks whose attention has run.
    unit_index : Tensor or None
        [P, U] long, number of each unit in its picture.
    num_cls : int
        Rows (CLS) before the units.
    keys : Tensor or None
        [P, U, d] means over heads, of the block that has run. Needs ``Input.BLOCK_KEYS``.
    key_norm : Tensor or None
        [P, U] mean length of a head's keys. Needs ``Input.KEY_NORM``.
    attention : Tensor or None
        [P, U] attention of the CLS row, or attention received where there is none. Needs ``Input.BLOCK_ATTENTION``.
    size : Tensor or None
        [P, U] number of units that each stands for.
    method : str
        Name of the method, for errors.
    """

    valid: Tensor
    num_keep: Tensor
    host_num_keep: tuple[int, ...]
    grids: tuple[Grid, ...]
    contrast: Tensor | None = None
    pixels: Tensor | None = None
    previous_picture: tuple[int, ...] = ()
    after: int = 0
    unit_index: Tensor | None = None
    num_cls: int = 0
    keys: Tensor | None = None
    key_norm: Tensor | None = None
    attention: Tensor | None = None
    size: Tensor | None = None
    method: str = ""

    def require(self, needed: Input) -> Tensor:
        """The field of an input that the method has declared; a ValueError that names the method and the input if it
        has not."""
        value: Tensor = required(self, needed, FIELDS)
        return value


@dataclass(frozen=True)
class MergePairs:
    """Units that join others instead of being dropped.

    Attributes
    ----------
    target : Tensor
        [P, U] long, place in the view of the unit that each one joins; its own for a unit that stays.
    order : Tensor or None
        [P, U] long, places of the view in the order in which the next view shows the units that stay.
    """

    target: Tensor
    order: Tensor | None = None


@dataclass(frozen=True)
class TowerReducer(EncoderReducer):
    """A method that reduces inside the vision tower.

    Alone, all that the tower leaves enters the decoder, and a budget says how much that is. Before other methods
    (``"contrast+duet_plus"``) the budget is theirs, over the unreduced tokens, and ``keep`` belongs to the tower.

    Attributes
    ----------
    keep : int or float or None
        Tokens of a span that the tower leaves: a count, or a fraction.
    """

    available = TOWER_INPUTS
    reduces_in_tower: ClassVar[bool] = True
    by_threshold: ClassVar[bool] = False  # how many stay is what ``stay`` says

    option_names = frozenset({"proportional_attention", "pooled_context_tokens"})

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
            if self.keep == 0:
                raise ValueError("keep=0: at least one token of a picture goes through the tower")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """As ``Reducer.plan``: what is left behind the tower enters the decoder and stays."""
        check_budget_or_fields(self, budget, self.keep is not None, "keep=")
        if budget is None:
            assert self.keep is not None  # just checked
            left = max(1, count_of(self.keep, tokens))
        else:
            left = math.floor(target_mean(budget, tokens) + EPSILON)
            if left < 1:
                raise infeasible_budget(
                    self.name, target_mean(budget, tokens), 1, tokens, "at least one token enters the decoder"
                )
        return plan_survivors(tokens, left, depth)

    def plan_after_tower(self, tokens: int, depth: int, budget: Budget | None, left: int) -> SpanPlan:
        """The plan of a span of which the tower has left ``left`` tokens, as a threshold or rounding had it."""
        return plan_survivors(tokens, left, depth)

    def select_tokens(self, view: EncoderView) -> Selection:
        """All that the tower left."""
        return Selection.keep_only(*pack_right(view.valid, max(plan.entry for plan in view.plans)))

    @property
    def tower_reducer(self) -> TowerReducer:
        """The method itself."""
        return self

    def boundaries(self, depth: int) -> Sequence[int]:
        """After the attention of how many of ``depth`` blocks units leave: ascending; 0 is in front of all."""
        return (0,)

    @property
    def least(self) -> int:
        """Units of a picture that are left at least, where it has so many."""
        return 1

    @property
    def prunes_inside(self) -> bool:
        """True if units leave after some block."""
        return any(self.boundaries(1 << 10))

    def stage_counts(self, units: int, left: int, depth: int) -> Sequence[int]:
        """Number of units of a picture that each boundary leaves: equal shares of what reaches it, the last one
        ``left``."""
        several = len(self.boundaries(depth))
        return [max(left, math.ceil(units * (left / units) ** (k / several) - EPSILON)) for k in range(1, several)] + [
            left
        ]

    @abstractmethod
    def keep_patches(self, view: TowerView) -> Tensor | MergePairs:
        """Mask [P, U] of the units that stay, exactly ``view.num_keep`` of each picture's ``view.valid``; or who joins
        whom."""

    def merge_pairs(self, units: int, left: int) -> int:
        """Number of pairwise similarities that a boundary computes that leaves ``left`` of ``units``."""
        return units * left if self.options.proportional_attention and not self.options.pooled_context_tokens else 0

    def pooled_features(self, units: int, left: int) -> int:
        """Number of units that stand for the dropped ones of a picture of ``units`` of which ``left`` stay: each for
        two or more."""
        return min(self.options.pooled_context_tokens, (units - left) // 2)


def tower_of(reducer: Reducer) -> TowerReducer | None:
    """The part of a method that reduces inside the vision tower."""
    tower = reducer.tower_reducer
    return tower if isinstance(tower, TowerReducer) else None


def check_after(name: str, after: Sequence[int]) -> None:
    """Refuse what are no numbers of blocks behind whose attention units can leave, one after the other."""
    if any(n < 1 for n in after) or list(after) != sorted(set(after)):
        raise ValueError(f"{name}={after}: after the attention of how many blocks units leave, 1 or more, ascending")


def check_threshold(threshold: float) -> None:
    """Refuse what no difference can be compared with."""
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold}: give a finite difference of pixel values, 0 or more")


def plan_survivors(tokens: int, left: int, depth: int) -> SpanPlan:
    """The plan of a span of which the tower leaves ``left`` tokens, and all of them enter."""
    return plan_keep_all(tokens, depth) if left >= tokens else SpanPlan(tokens, left, 0, (left,) * depth, tower=left)


@dataclass(frozen=True)
class ThresholdReducer(TowerReducer):
    """A tower reducer that keeps what passes a threshold, however many that are; with ``keep``, or alone with a budget,
    the highest of them.

    What is left is known when the tower has begun. A budget for the decoder is planned then: no more enters than is
    left. Of a picture of which nothing passes, the unit with the highest score stays.
    """

    @property
    def by_threshold(self) -> bool:  # type: ignore[override]
        return self.keep is None

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Everything, until the tower has begun, where only the threshold decides; else as ``TowerReducer``."""
        if self.keep is None and budget is None:
            return plan_keep_all(tokens, depth)  # until the tower has begun
        return super().plan(tokens, depth, budget)

    def keep_patches(self, view: TowerView) -> Tensor:
        """[P, U] bool: what passes; or the highest ``view.num_keep`` scores, where a number is wanted."""
        scores = self.scores(view)
        if view.host_num_keep:
            return top(scores, view.valid, view.num_keep)
        return view.valid & (scores > 0) | top(scores, view.valid, torch.ones_like(view.num_keep))

    @abstractmethod
    def scores(self, view: TowerView) -> Tensor:
        """[P, U] float32; above 0 is what passes."""
