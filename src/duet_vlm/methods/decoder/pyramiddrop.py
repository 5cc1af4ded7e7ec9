"""PyramidDrop: drop visual tokens in stages inside the decoder, by the attention of the last instruction token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from duet_vlm.ops.schedules import EARLY, EARLY_SHARE, LATE, LATE_SHARE, pyramid
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    Schedule,
    SpanPlan,
    check_schedule,
    infeasible_budget,
    largest_fraction,
    layer_counts,
    mean_within,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


def between(early: Schedule, late: Schedule, weight: float) -> Schedule:
    """Mix two schedules of fractions layer by layer.

    Parameters
    ----------
    early, late : schedule
        Schedules of (layer, fraction kept).
    weight : float
        0 gives ``early``, 1 gives ``late``.
    """

    def kept(schedule: Schedule, layer: int) -> float:
        return ([1.0] + [keep for at, keep in schedule if at <= layer])[-1]

    layers = sorted({layer for layer, _ in early + late})
    return tuple((layer, (1 - weight) * kept(early, layer) + weight * kept(late, layer)) for layer in layers)


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(DecoderReducer):
    """PyramidDrop (CVPR 2025, arXiv 2410.17247).

    After each of a few decoder layers keep a falling share of the visual tokens, ranked by the attention that the last
    instruction token pays to them (with the queries and keys of the next layer).

    Parameters
    ----------
    schedule : ((layer, keep), ...), optional
        Drops before ``layer``; keeps are relative to the entering tokens. The paper: [8, 16, 24] of 32 layers, halving
        each time. With a budget the schedule is solved, see below.
    rounding : str
        "floor" (exact product) or "int" (truncated float product, released code).

    A budget moves along one path of schedules, without a jump. From the floor up, the share kept per stage grows at the
    stages that the authors give for small budgets, [2, 8, 16]/32 of the depth, until it is 0.56. Then every layer keeps
    a mix of that schedule and the paper's (half per stage at [8, 16, 24]/32), ever more of the paper's. From the
    paper's on the share grows at the paper's stages, until nothing is dropped. For LLaVA-1.5-7B this passes through
    every setting in ``presets``: shares of 0.19, 0.42 and 0.56 at the early stages (means of 63, 127 and 192 tokens)
    and the paper's (270).

    Cost: one key projection and one query row per stage; the first stage's layers run at full width, which is the
    floor. Needs: text after the image. Usable in training.

    Differences from the authors' code (Cooperx521/PyramidDrop): kept instead of renumbered positions, every image and
    batch row, in training the token before the first answer only. ``PyramidDrop.official`` restores the released
    behaviour.
    """

    paper = "PyramidDrop, CVPR 2025, arXiv 2410.17247"
    summary = "drop in stages inside the decoder by the last instruction token's attention"
    requires = frozenset({Input.SCORES})

    default_options = TokenOptions(text_query="last")
    schedule: Schedule | None = None
    rounding: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule, self.reenters))
        check_choice("rounding", self.rounding, ROUNDINGS)

    @classmethod
    def official(cls, schedule: Schedule = ((8, 0.5), (16, 0.25), (24, 0.125)), **fields: Any) -> PyramidDrop:
        """Return the settings of the released code: compact positions, truncated float products, the tokens before all
        answers in training.
        """
        options = TokenOptions(
            positions="compact", training_turns="all", skip_unanswered=True, protect_predicting_tokens=False
        )
        return cls.from_preset(options, fields, schedule=schedule, rounding="int")

    @classmethod
    def official_reroute(
        cls, schedule: Schedule = ((2, 0.4502), (7, 0.4502), (15, 0.2251), (23, 0.1126)), **fields: Any
    ) -> PyramidDrop:
        """Return the settings of Reroute (arXiv 2606.12412, elmma/mllm-reroute): what a stage leaves out sleeps until
        the next one. By default its schedule of a mean of 192 of 576 tokens in 32 layers.
        """
        options = TokenOptions(reentry="stage", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, schedule=schedule, rounding="int")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.schedule is not None, "schedule=")
        if budget is None:
            assert self.schedule is not None
            return SpanPlan(tokens, tokens, 0, layer_counts(tokens, depth, self.schedule, self.rounding, self.reenters))
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        early, late = pyramid(depth, EARLY, EARLY_SHARE), pyramid(depth, LATE, LATE_SHARE)
        first = early[0][0]
        if tokens * first > target * depth + EPSILON:
            raise infeasible_budget(
                self.name,
                target,
                tokens * first / depth,
                tokens,
                f"its first {first} of {depth} layers run at full width",
            )

        def counts(schedule: Schedule) -> tuple[int, ...]:
            return layer_counts(tokens, depth, schedule)

        def largest_of(path: Callable[[float], Schedule]) -> SpanPlan:
            share = largest_fraction(lambda s: mean_within(counts(path(s)), target))
            return SpanPlan(tokens, tokens, 0, counts(path(share)))

        if mean_within(counts(late), target):
            return largest_of(lambda share: pyramid(depth, LATE, share))
        if mean_within(counts(early), target):
            return largest_of(lambda weight: between(early, late, weight))
        return largest_of(lambda share: pyramid(depth, EARLY, share))

    def with_paper_schedule(self, depth: int, share: float | None = None) -> PyramidDrop:
        return self if self.schedule is not None else replace(self, schedule=pyramid(depth))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
