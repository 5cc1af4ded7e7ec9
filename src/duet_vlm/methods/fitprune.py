"""FitPrune: inside the decoder, a few tokens leave after every layer, as many as a table fitted to the model says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from duet_vlm.budget import Budget, Schedule, SpanPlan, count_of, infeasible, largest_share, target_mean, within
from duet_vlm.calibration import Calibration, read
from duet_vlm.ops.select import top
from duet_vlm.reducer import TextView, check_budget_or_fields, check_choice, whole
from duet_vlm.registry import register
from duet_vlm.stages import StagedReducer

TOKENS = 576
DELETED = {  # of 576 tokens of LLaVA-1.5-7B, after the attention of each of its 32 layers; by the share of FLOPs that is saved
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1, 0, 0),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4, 0, 0, 0),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
}
USUAL = 60
Curve = tuple[float, ...]  # share of the tokens that each layer reads


@register("fitprune")
@dataclass(frozen=True)
class FitPrune(StagedReducer):
    """FitPrune (AAAI 2025, arXiv 2409.10197): each layer loses the tokens that matter least to the text and to the picture itself.

    A token's score is the attention that it receives from text times that from visual tokens, both the largest of all heads, in the layer before.
    How many leave after each layer is fitted so that attention changes least: a table, of which each line is a curve of what the layers read. A
    budget takes the curve that it allows between two lines, or between the ends and those curves that keep all, or none behind the first layer.

    Parameters beyond ``StagedReducer``
    ----------
    table : str or None
        A file that ``duet-vlm calibrate fitprune`` made for this model. None: the released table of LLaVA-1.5-7B, stretched to the decoder's depth.

    Cost: in every layer that something leaves after, queries and keys of all rows and attention from text and visual rows: much in early layers.
    Needs text after the image. Usable in training (the choice carries no gradient).

    Differences from the authors' code (ywh187/FitPrune): any place, number and size of images, batch and depth; lines of the table are
    interpolated; fitting aims at tokens, not at FLOPs. ``FitPrune.official`` has the released numbers.
    """

    paper = "FitPrune, AAAI 2025, arXiv 2409.10197"
    summary = "drop a few tokens after every layer, as many as a table fitted to the model says"
    stages: ClassVar[Schedule] = ()
    score_before = 1
    score_heads = "max"
    needs = frozenset({"among"})

    table: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table is not None and self.schedule is not None:
            raise ValueError(f"table={self.table!r} beside schedule=: a schedule says itself what stays, give one of them")
        self.calibration()

    @classmethod
    def official(cls, reduction: int = USUAL, depth: int = 32, **fields: Any) -> FitPrune:
        """The released numbers that save ``reduction`` % of the FLOPs, for 576 tokens; of ``depth`` layers the first ones' (as released)."""
        check_choice("reduction", reduction, tuple(DELETED))
        left = [TOKENS - sum(DELETED[reduction][:layer]) for layer in range(1, min(depth, 32))]
        return cls(**{"schedule": tuple(enumerate(left, 1)), "keep_predicting": False} | fields)

    def calibration(self) -> Calibration | None:
        return None if self.table is None else read(self.table, "fitprune", "table")

    def at_depth(self, depth: int) -> Schedule:
        line = _stretched(_released(USUAL), depth)
        return tuple(enumerate(line[1:], 1))

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.schedule is not None, "schedule=")
        if budget is None:
            return super().plan(tokens, depth, None)
        lines, target = self._lines(depth), target_mean(budget, tokens)
        if target >= tokens:
            return whole(tokens, depth)

        def counts(share: float) -> tuple[int, ...]:
            place = (1 - share) * (len(lines) - 1)
            number = min(int(place), len(lines) - 2)
            between = (a + (b - a) * (place - number) for a, b in zip(lines[number], lines[number + 1], strict=True))
            return tuple(count_of(max(0.0, min(1.0, x)), tokens) for x in between)

        if not within(counts(0.0), target):
            raise infeasible(self.name, target, tokens / depth, tokens, "its first layer runs at full width")
        return SpanPlan(tokens, tokens, 0, counts(largest_share(lambda x: within(counts(x), target))))

    def _lines(self, depth: int) -> list[Curve]:
        """From all tokens in every layer to none behind the first one."""
        stored = self.calibration()
        if stored is None:
            lines = [_stretched(_released(reduction), depth) for reduction in DELETED]
        else:
            lines = [tuple(line) for line in stored.data["curves"]]
            if len(lines[0]) != depth:
                raise ValueError(f"table={self.table!r} was made for a decoder of {len(lines[0])} layers, this one has {depth}: {stored.advice}")
        return [(1.0,) * depth, *lines, (1.0, *(0.0,) * (depth - 1))]

    def t2v(self, view: TextView) -> Tensor:
        assert view.scores is not None and view.among is not None  # promised by ``uses_text`` and ``needs``
        return top(view.scores * view.among, view.valid, view.keep)


@lru_cache(maxsize=16)
def _released(reduction: int) -> Curve:
    deleted = DELETED[reduction]
    return tuple((TOKENS - sum(deleted[:layer])) / TOKENS for layer in range(32))


def _stretched(curve: Curve, depth: int) -> Curve:
    """The curve of 32 layers at as many places of another depth, straight between two layers."""
    places = [layer * 32 / depth for layer in range(depth)]
    ends = [(int(x), min(int(x) + 1, 31), x - int(x)) for x in places]
    return tuple(curve[a] + (curve[b] - curve[a]) * part for a, b, part in ends)
