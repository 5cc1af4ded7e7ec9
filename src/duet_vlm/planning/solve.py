"""Solve a budget: plans that several methods share (all tokens, a fixed count, a schedule under a budget), and the floor
of small images."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral
from typing import ClassVar, Protocol

from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    BudgetError,
    Keep,
    NoBudget,
    Schedule,
    SpanPlan,
    check_budget,
    count_of,
    infeasible_budget,
    largest_int,
    layer_counts,
    mean_within,
    target_mean,
)


class PlanningOptions(Protocol):
    """The options of a method that planning reads."""

    @property
    def small_image_tokens(self) -> int:
        """Tokens of a span below which the method's floor stands for a budget that cannot be met."""


class Planner(Protocol):
    """A method as planning sees it."""

    name: ClassVar[str]

    @property
    def options(self) -> PlanningOptions:
        """Options of the method."""

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """Exact counts for a span of ``tokens`` in a decoder of ``depth`` layers."""

    def plan_after_tower(self, tokens: int, depth: int, budget: Budget | None, left: int) -> SpanPlan:
        """``plan`` of a span of which a threshold in the tower left ``left`` tokens."""


def check_budget_or_fields(method: Planner, budget: Budget | None, given: bool, example: str) -> None:
    """A method is set either by a budget or by its own fields, not by both and not by neither."""
    check_budget(budget)
    if budget is not None and given:
        raise ValueError(f"{method.name}: give either budget= or the method's own settings ({example}), not both")
    if budget is None and not given:
        raise NoBudget(
            f"{method.name} needs a budget (budget=64 tokens, budget=0.22 of the tokens) or its own settings ({example})",
            example,
        )


def check_shares(schedule: Schedule | None) -> None:
    """Refuse counts in a schedule beside a budget, which says how many tokens there are: a schedule is then a shape."""
    if any(isinstance(kept, int) for _, kept in schedule or ()):
        raise ValueError(
            f"schedule={schedule}: with a budget give fractions (0.0 to 1.0) of the entering tokens, not counts"
        )


def plan_or_clamp(
    reducer: Planner, tokens: int, depth: int, budget: Budget | None, left: int | None = None
) -> SpanPlan:
    """``reducer.plan``, but a small span that a fractional budget cannot be met on gets the method's floor
    (``TokenOptions.small_image_tokens``).

    ``left``: of the span, how many tokens a threshold in the tower left.

    A floor of one token is more than 5 % of ten tokens and less than 5 % of a hundred: an error there would end a whole
    batch for its smallest image. A floor that grows with the span (layers that run at full width) stays an error, as no
    image could meet the budget.

    Raises
    ------
    BudgetError
        As ``reducer.plan``, where the span is not small or a span on which the budget means ``small_image_tokens``
        tokens is refused as well.
    """

    def solve(budget: Budget | None) -> SpanPlan:
        return (
            reducer.plan(tokens, depth, budget)
            if left is None
            else reducer.plan_after_tower(tokens, depth, budget, left)
        )

    try:
        return solve(budget)
    except BudgetError as error:
        if (
            budget is None
            or isinstance(budget, Integral)
            or error.floor is None
            or tokens >= reducer.options.small_image_tokens
        ):
            raise
        try:
            reducer.plan(math.ceil(reducer.options.small_image_tokens / budget), depth, budget)
        except BudgetError:
            raise error from None
        return replace(solve(error.floor / tokens), floored=True)


def plan_keep_all(tokens: int, depth: int) -> SpanPlan:
    """The plan that keeps every token."""
    return SpanPlan(tokens, tokens, 0, (tokens,) * depth)


def plan_fixed_count(
    method: Planner, keep: Keep | None, tokens: int, depth: int, budget: Budget | None, rounding: str = "floor"
) -> SpanPlan:
    """The plan of a method that enters ``keep`` tokens of a span (a fraction rounded as ``count_of`` says), or as many
    as ``budget`` allows, and drops none later."""
    check_budget_or_fields(method, budget, keep is not None, "keep=")
    if budget is None:
        assert keep is not None  # just checked
        count = count_of(keep, tokens, rounding)
    else:
        target = target_mean(budget, tokens)
        count = math.floor(target + EPSILON)
        if count < 1:
            raise infeasible_budget(method.name, target, 1, tokens, "at least one token enters the decoder")
    return SpanPlan(tokens, count, 0, (count,) * depth)


def plan_with_schedule(method: Planner, schedule: Schedule, tokens: int, depth: int, target: float) -> SpanPlan:
    """The largest entry whose mean under ``schedule`` (fractions) is within ``target``; every entering token counts as
    dominant.

    When even all tokens leave budget over, each stage keeps more: first the fractions of a larger number than there is,
    at last the stages that drop everything.
    """

    keeps = [keep for _, keep in schedule]
    grows = keeps != sorted(keeps, reverse=True)  # of a method with re-entry

    def counts(entry: int, end: int) -> tuple[int, ...]:
        kept = ((layer, min(count_of(keep, entry), tokens) if keep else end) for layer, keep in schedule)
        return layer_counts(min(entry, tokens), depth, tuple(kept), may_grow=grows)

    smallest = min((float(keep) for _, keep in schedule if keep), default=1.0)
    entry = largest_int(math.ceil(tokens / smallest), lambda n: mean_within(counts(n, 0), target))
    if entry < 1:
        floor = sum(counts(1, 0)) / depth
        raise infeasible_budget(method.name, target, floor, tokens, "at least one token enters the decoder")
    end = largest_int(tokens, lambda n: mean_within(counts(entry, n), target)) if entry >= tokens else 0
    entering = min(entry, tokens)
    return SpanPlan(tokens, entering, 0, counts(entry, end))
