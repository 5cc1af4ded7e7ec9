"""PyramidDrop: drop visual tokens in stages inside the decoder, ranked by the attention of the last instruction token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duet_vlm.budget import (
    Budget,
    Schedule,
    SpanPlan,
    check_schedule,
    infeasible,
    largest_share,
    layer_counts,
    target_mean,
    within,
)
from duet_vlm.ops.select import top
from duet_vlm.reducer import ROUNDINGS, DecoderReducer, TextView, check_budget_or_fields, check_choice, whole
from duet_vlm.registry import register

LATE, EARLY = (8, 16, 24), (2, 8, 16)  # of 32 layers: the paper's stages, and the authors' answer for small budgets


def pyramid(depth: int, layers: tuple[int, ...], share: float) -> Schedule:
    """Stages at ``layers``/32 of the depth (never before layer 1), keeping share, share^2, share^3."""
    stages: dict[int, float] = {}
    for power, layer in enumerate(layers, start=1):
        stages[max(1, layer * depth // 32)] = share**power
    return tuple(stages.items())


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(DecoderReducer):
    """PyramidDrop (CVPR 2025, arXiv 2410.17247).

    After each of a few decoder layers keep a falling share of the visual tokens, ranked by the attention that the last instruction
    token pays to them (with the queries and keys of the next layer).

    Parameters
    ----------
    schedule : ((layer, keep), ...), optional
        Drops before ``layer``; keeps are relative to the entering tokens. The paper: [8, 16, 24] of 32 layers, halving each time.
        With a budget, the share kept per stage is solved, at [8, 16, 24]/32 of the depth or, if that cannot reach it, at [2, 8, 16]/32.
    rounding : str
        "floor" (exact product) or "int" (truncated float product, released code).

    Cost: one key projection and one query row per stage; the first stage's layers run at full width, which is the floor.
    Needs: text after the image. Usable in training.

    Differences from the authors' code (Cooperx521/PyramidDrop): kept instead of renumbered positions, every image and batch row, in
    training the token before the first answer only. ``PyramidDrop.official`` restores the released behaviour.
    """

    paper = "PyramidDrop, CVPR 2025, arXiv 2410.17247"
    summary = "drop in stages inside the decoder by the last instruction token's attention"

    text_query: str = "last"
    schedule: Schedule | None = None
    rounding: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule))
        check_choice("rounding", self.rounding, ROUNDINGS)

    @classmethod
    def official(cls, schedule: Schedule = ((8, 0.5), (16, 0.25), (24, 0.125)), **fields: Any) -> PyramidDrop:
        """The released code: compact positions, truncated float products, the tokens before all answers in training."""
        preset: dict[str, Any] = {"positions": "compact", "rounding": "int", "training_turns": "all", "skip_unanswered": True}
        preset["keep_predicting"] = False
        return cls(**{"schedule": schedule} | preset | fields)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.schedule is not None, "schedule=")
        if budget is None:
            assert self.schedule is not None
            return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, self.schedule, self.rounding))
        target = target_mean(budget, tokens)
        if target >= tokens:
            return whole(tokens, depth)
        for layers in (LATE, EARLY):
            if within(layer_counts(tokens, depth, pyramid(depth, layers, 0.0)), target):
                return self._solved(tokens, depth, layers, target)
        first = pyramid(depth, EARLY, 0.0)[0][0]
        raise infeasible(self.name, target, tokens * first / depth, tokens, f"its first {first} of {depth} layers run at full width")

    def _solved(self, tokens: int, depth: int, layers: tuple[int, ...], target: float) -> SpanPlan:
        share = largest_share(lambda s: within(layer_counts(tokens, depth, pyramid(depth, layers, s)), target))
        return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, pyramid(depth, layers, share)))

    def t2v(self, view: TextView) -> Tensor:
        assert view.scores is not None  # promised by ``uses_text``
        return top(view.scores, view.valid, view.keep)
