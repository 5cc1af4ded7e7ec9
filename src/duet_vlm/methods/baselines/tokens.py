"""Random baselines of every comparison: random and uniform choice, with a constant count, a schedule or another
method's counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from duet_vlm.methods.lookup import get_method
from duet_vlm.ops.ragged import upload
from duet_vlm.ops.select import spaced_picks, top
from duet_vlm.planning.budget import (
    EPSILON,
    Budget,
    Keep,
    Schedule,
    SpanPlan,
    check_keep,
    check_schedule,
    count_of,
    infeasible_budget,
    layer_counts,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register


@dataclass(frozen=True)
class Baseline(DecoderReducer):
    """Base of both random baselines: counts without a score.

    ``entry`` tokens are kept from the first decoder layer on, and ``schedule`` drops more later (default: nothing).
    With ``follow`` every layer gets as many tokens as that method gives it at the same budget: the counts of the method
    without its choice of tokens.

    Parameters
    ----------
    entry : int or float, optional
        Tokens of a span that enter the decoder: a count, or a fraction.
    schedule : ((layer, keep), ...)
        Drops before ``layer``: numbers of tokens, or fractions of those that entered.
    follow : str, optional
        Name of the method whose number of tokens per layer is taken.
    """

    entry: Keep | None = None
    schedule: Schedule = ()
    follow: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entry is not None:
            check_keep("entry", self.entry)
        object.__setattr__(self, "schedule", check_schedule(self.schedule, self.reenters))
        if self.follow is not None:
            if not isinstance(self.follow, str):
                raise TypeError(f"follow={self.follow!r}: give the name of a method")
            if self.entry is not None or self.schedule:
                raise ValueError(
                    f"follow={self.follow!r} takes the counts of that method: leave out entry= and schedule="
                )
            if issubclass(get_method(self.follow), Baseline):
                raise ValueError(
                    f"follow={self.follow!r}: name a method other than the random baselines (random, uniform)"
                )

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        if self.follow is not None:
            return SpanPlan(tokens, tokens, 0, get_method(self.follow)().plan(tokens, depth, budget).counts)
        given = self.entry is not None or bool(self.schedule)
        check_budget_or_fields(self, budget, given, "entry=, schedule=")
        if budget is None:
            entry = tokens if self.entry is None else count_of(self.entry, tokens)
        else:
            target = target_mean(budget, tokens)
            if target >= tokens:
                return plan_keep_all(tokens, depth)
            entry = math.floor(target + EPSILON)
            if entry < 1:
                raise infeasible_budget(self.name, target, 1, tokens, "at least one token stays")
        return SpanPlan(tokens, tokens, 0, layer_counts(entry, depth, self.schedule, may_grow=self.reenters))


@register("random")
@dataclass(frozen=True)
class RandomTokens(Baseline):
    """Random choice of visual tokens: the baseline that every method must beat.

    The choice depends only on (``seed``, number of the image in its sample, its token count), never on batch order or
    device, and later stages keep a subset of earlier ones.

    Parameters
    ----------
    seed : int
        Seed of the choice.

    Cost: none. Needs: no input of the vision tower and no text.
    """

    paper = "baseline"
    summary = "a random choice of tokens (baseline)"

    requires = frozenset({Input.TOKENS})

    seed: int = 0

    def prune_tokens(self, view: DecoderView) -> Tensor:
        table = upload(priorities(self.seed, view.spans), view.valid.device)
        return top(table[view.require(Input.TOKENS)], view.valid, view.num_keep)


@register("uniform")
@dataclass(frozen=True)
class UniformTokens(Baseline):
    """Visual tokens evenly spaced in raster order: the baseline without randomness.

    Each stage keeps tokens evenly spaced over the survivors of the stage before.

    Cost: none. Needs: no input of the vision tower and no text.
    """

    paper = "baseline"
    summary = "evenly spaced tokens in raster order (baseline)"

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return spaced_picks(view.valid, view.num_keep)


@lru_cache(maxsize=256)
def priorities(seed: int, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """Draw one random number per token on the CPU from (seed, span number, token count).

    Parameters
    ----------
    seed : int
        Seed of the choice.
    spans : tuple of (int, int)
        Number in its sample and token count of each span.

    Returns
    -------
    Tensor
        [spans, max tokens] float32 in [0, 1); 0 beyond a span's count.
    """
    table = torch.zeros(len(spans), max(count for _, count in spans), device="cpu")
    for row, (number, count) in enumerate(spans):
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + number) * 1_000_003 + count) % 2**63)
        table[row, :count] = torch.rand(count, generator=generator, device="cpu")
    return table
