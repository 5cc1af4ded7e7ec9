"""Methods that drop at a few layers inside the decoder: their schedule, and what a budget makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from duet_vlm.planning.budget import (
    Budget,
    Schedule,
    SpanPlan,
    check_schedule,
    count_of,
    infeasible_budget,
    largest_fraction,
    largest_int,
    mean_within,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.decoder import DecoderReducer
from duet_vlm.utils.field_types import check_choice

RELATIVE = ("entry", "current")
Self = TypeVar("Self", bound="ScheduledReducer")


@dataclass(frozen=True)
class ScheduledReducer(DecoderReducer):
    """A method that drops at a few layers; a subclass says what stays (`prune_tokens`), and at which layers its paper
    drops (``paper_schedule``).

    With a budget every token enters, and each stage of the paper keeps the same multiple of the share that it keeps
    there, never more than all: the largest that the budget allows. What rounding leaves over goes to the last stage.
    The layers before the first stage run at full width, which is the floor.

    Parameters
    ----------
    schedule : ((layer, keep), ...), optional
        Drops before ``layer``: numbers of tokens, or fractions of those that entered.
    relative : str
        What fractions are fractions of: "entry", or "current", the tokens that are still there.
    rounding : str
        "floor" (exact product), "int" (truncated float product) or "round".
    min_tokens : int
        A stage keeps at least so many tokens of a prompt that has them.
    """

    paper_schedule: ClassVar[Schedule]  # of the paper: (layer of 32, share of the entering tokens), falling
    min_layer: ClassVar[int] = 1  # no drop before this layer, which reads what earlier ones made

    schedule: Schedule | None = None
    relative: str = "entry"
    rounding: str = "floor"
    min_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None:
            by_entry = self.relative == "entry"
            checked = check_schedule(self.schedule, self.reenters) if by_entry else _each_checked(self.schedule)
            object.__setattr__(self, "schedule", checked)
        early = [layer for layer, _ in self.schedule or () if layer < self.min_layer]
        if early:
            why = f"what it decides by is made by earlier layers, so drop before layer {self.min_layer} or later"
            raise ValueError(f"{self.name}: schedule drops before layer {early[0]}, but {why}")
        check_choice("relative", self.relative, RELATIVE)
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens}: a number of tokens, at least 0")

    def schedule_at_depth(self, depth: int) -> Schedule:
        """The paper's stages in a decoder of ``depth`` layers; where two meet, the later one."""
        return tuple({max(self.min_layer, layer * depth // 32): keep for layer, keep in self.paper_schedule}.items())

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        """All tokens up to the first drop; behind each, as many as the schedule says, or the budget allows.
        ``BudgetError`` below the floor."""
        check_budget_or_fields(self, budget, self.schedule is not None, "schedule=")
        if budget is None:
            assert self.schedule is not None  # just checked
            return SpanPlan(tokens, tokens, 0, self._counts(tokens, depth, self.schedule))
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        stages = self.schedule_at_depth(depth)
        first = stages[0][0]
        floor = self._counts(tokens, depth, tuple((layer, 0) for layer, _ in stages))
        if not mean_within(floor, target):
            why = f"its first {first} of {depth} layers run at full width"
            raise infeasible_budget(self.name, target, sum(floor) / depth, tokens, why)
        smallest = min(keep for _, keep in stages if keep)

        def counts(share: float, end: int = 0) -> tuple[int, ...]:
            return self._counts(
                tokens,
                depth,
                tuple((layer, min(1.0, share * keep / smallest) if keep else end) for layer, keep in stages),
            )

        share = largest_fraction(lambda x: mean_within(counts(x), target))
        solved = counts(
            share, largest_int(tokens, lambda n: mean_within(counts(share, n), target)) if share == 1 else 0
        )
        last = stages[-1][0]
        rest = largest_int(solved[last - 1], lambda n: mean_within(solved[:last] + (n,) * (depth - last), target))
        return SpanPlan(tokens, tokens, 0, solved[:last] + (max(rest, solved[last]),) * (depth - last))

    def _counts(self, tokens: int, depth: int, schedule: Schedule) -> tuple[int, ...]:
        counts = [tokens] * depth
        for layer, keep in schedule:
            if layer >= depth:
                raise ValueError(f"schedule drops before layer {layer}, but this decoder has layers 0..{depth - 1}")
            there = counts[layer]
            kept = count_of(keep, tokens if self.relative == "entry" else there, self.rounding)
            most = tokens if self.reenters else there
            counts[layer:] = [min(max(kept, self.min_tokens), most)] * (depth - layer)
        return tuple(counts)

    def with_paper_schedule(self: Self, depth: int, share: float | None = None) -> Self:
        """The same method with the paper's stages as its schedule, unless it has one."""
        return self if self.schedule is not None else replace(self, schedule=self.schedule_at_depth(depth))


def _each_checked(schedule: Schedule) -> Schedule:
    """A schedule whose keeps are of what is there: each by itself, since they need not fall."""
    for stage in schedule:
        check_schedule((stage,))
    layers = [layer for layer, _ in schedule]
    if layers != sorted(set(layers)):
        raise ValueError(f"schedule={schedule!r}: layers must be strictly increasing")
    return tuple((layer, keep) for layer, keep in schedule)
