"""DUET+: cover the image with salient vision tokens, merge the most salient of the rest, then drop inside the decoder by text attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duet_vlm.budget import (
    EPSILON,
    Budget,
    Keep,
    Schedule,
    SpanPlan,
    check_keep,
    check_schedule,
    count_of,
    layer_counts,
    target_mean,
)
from duet_vlm.ops.greedy import cosine, cover
from duet_vlm.ops.ragged import pack_right, take
from duet_vlm.ops.select import ranking, top
from duet_vlm.reducer import DecoderReducer, EncoderReducer, TextView, VisionView, check_budget_or_fields, check_picks, scheduled, whole
from duet_vlm.registry import register
from duet_vlm.tokens import Selection


def deep_schedule(depth: int) -> Schedule:
    """Four drops instead of DUET's two, the first of them earlier ([8, 14, 22, 28] of 32 layers): 2.2 times the budget enters, not 1.6.

    Chosen on validation questions of the embedded generator, for its decoder of 12 layers; other depths take the same fractions.
    """
    return tuple({max(1, depth // 4): 0.6, max(1, 7 * depth // 16): 0.3, max(1, 11 * depth // 16): 0.1, 7 * depth // 8: 0.0}.items())


@register("duet_plus")
@dataclass(frozen=True)
class DuetPlus(EncoderReducer, DecoderReducer):
    """DUET-VLM with another first stage and more, earlier drops (ours; after SCOPE, NeurIPS 2025, and DUET-VLM, arXiv 2602.18846).

    V2V picks one token after the other by gain in coverage (how much more similar every token becomes to its most similar chosen one,
    cosine of mean keys) times saliency to the power ``alpha``. Of the others only the most salient are merged, each into the chosen token
    most like it, and only where the two are close. T2V drops between decoder layers by text attention as DUET-VLM does; dropping more at
    several layers lets more tokens enter at the same mean.

    Parameters
    ----------
    keep : int or float, optional
        Rows per span that enter the decoder, or the fraction of its tokens. Left out with ``schedule`` given: no V2V.
    alpha : float
        Weight of saliency in the choice: 0 is pure coverage.
    pool : float
        How many of the tokens that were not chosen may merge, per chosen token; the most salient ones. 0 merges nothing.
    tau : float
        Least cosine of mean keys between a token and the one it merges into.
    picks : int
        Tokens chosen per step (``ops.greedy.cover``): fewer, hardly larger steps where launching kernels is what costs.
    schedule : ((layer, keep), ...), optional
        T2V drops, as in ``Duet``; default ``deep_schedule``. With a budget: fractions, and as many tokens enter as it allows.

    Cost: as ``Duet``, and an N x N table of similarities and per chosen token one pass over it; 8 N^2 bytes. Needs: vision attention,
    vision keys, text after the image; no CLS row. Usable in training (the choice carries no gradient, merged rows do).
    """

    paper = "ours, after SCOPE and DUET-VLM"
    summary = "cover the image with salient vision tokens, merge close ones (V2V); drop by text attention inside the decoder (T2V)"
    signals = frozenset({"importance", "keys"})

    keep: Keep | None = None
    alpha: float = 2.0
    pool: float = 0.5
    tau: float = 0.6
    picks: int = 1
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        for name in ("alpha", "pool"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of at least 0")
        if not -1 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau}: a cosine, give a number in [-1, 1] (pool=0 turns merging off)")
        check_picks(self.picks)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule))

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.keep is not None or (budget is None and self.schedule is not None), "keep=, schedule=")
        schedule = deep_schedule(depth) if self.schedule is None else self.schedule
        if budget is None:
            entry = tokens if self.keep is None else count_of(self.keep, tokens)
            return SpanPlan(tokens, entry, 0, layer_counts(entry, depth, schedule))
        if any(isinstance(kept, int) for _, kept in schedule):
            raise ValueError(f"schedule={schedule}: with a budget give fractions (0.0 to 1.0) of the entering tokens, not counts")
        target = target_mean(budget, tokens)
        return whole(tokens, depth) if target >= tokens else scheduled(self, schedule, tokens, depth, target)

    def with_drops(self, depth: int) -> DuetPlus:
        return self if self.schedule is not None else replace(self, schedule=deep_schedule(depth))

    def v2v(self, view: VisionView) -> Selection:
        assert view.importance is not None and view.keys is not None  # promised by ``signals``
        steps = max(plan.dominant for plan in view.plans)
        similarity = cosine(view.keys, view.valid)
        chosen = cover(similarity, view.importance**self.alpha, view.valid, view.dominant, steps, self.picks)
        index, valid = pack_right(chosen, steps)
        rest = view.valid & ~chosen
        pools = [math.floor(self.pool * plan.dominant + EPSILON) for plan in view.plans]
        members = ranking(view.importance, rest)[:, : max(pools)]
        if min(members.shape[1], steps) == 0:
            return Selection.pick(index, valid)
        likeness = take(similarity, members).gather(2, index[:, None].expand(-1, members.shape[1], -1))
        nearest, into = likeness.masked_fill(~valid[:, None], -math.inf).max(2)
        offered = torch.minimum(torch.tensor(pools, device=into.device), rest.sum(1))
        joins = (torch.arange(members.shape[1], device=into.device) < offered[:, None]) & (nearest > self.tau)
        return Selection(index, valid, members, into.masked_fill(~joins, -1))

    def t2v(self, view: TextView) -> Tensor:
        assert view.scores is not None  # promised by ``uses_text``
        return top(view.scores, view.valid, view.keep)
