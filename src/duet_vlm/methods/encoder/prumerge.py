"""LLaVA-PruMerge: keep the most attended vision tokens and merge similar ones into them, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.neighbor_merge import merge_with_neighbours
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import ranking, top
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
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import check_choice


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(EncoderReducer):
    """LLaVA-PruMerge (ICCV 2025, arXiv 2403.15388).

    Keeps the tokens that the vision encoder attends to most. Each takes in the ``neighbours`` tokens that resemble it
    most (cosine of mean keys, kept ones and others), each weighted by its share of the attention; one more row takes in
    all tokens that were not kept. Text plays no part, and nothing happens in the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span that are kept, or the fraction of them; one more row enters. A budget of n keeps n - 1.
    neighbours : int
        Tokens that each kept one takes in.
    merge : str
        "mean": of the token, with weight 1, and what it takes in, with their shares of the attention; "sum": token +
        sum (released code).
    order : str
        Order of the rows, which matters for ``positions="compact"``: "raster", or by falling "attention" (released
        code).
    rounding : str
        How a fraction becomes a count: "floor" or "int" (released code).
    signal_heads : str
        "each": the attention of every head, added up, and keys as means over heads. "one": all heads side by side as a
        single wide one (released code).

    Cost: one row of attention (CLS) or blocked column sums of one vision layer; per kept token a look at all others,
    which are sorted; the product of a table of rows x tokens with the features, 4 K N bytes. Needs: vision attention
    and keys. Usable in training (the choice and its weights carry no gradient, the rows do).

    Differences from the authors' code (42Shawn/LLaVA-PruMerge): the number of rows is what the budget says, not the
    number of outliers of the attention (quartiles; ``ops.select.outliers`` finds them), so images of a batch do not
    depend on each other; means instead of sums, attention of all heads instead of all heads as one, of the layer of the
    features instead of the last one; kept positions. The last row stands where its most attended token was.
    ``PruMerge.official`` restores the released rule at a count that is given.
    """

    paper = "LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388"
    summary = "keep the most attended vision tokens, each with what resembles it, and all others in one row, before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.KEYS})

    keep: Keep | None = None
    neighbours: int = 32
    merge: str = "mean"
    order: str = "raster"
    rounding: str = "floor"
    signal_heads: str = "each"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours}: how many tokens each kept one takes in, at least 0")
        check_choice("merge", self.merge, ("mean", "sum"))
        check_choice("order", self.order, ("raster", "attention"))
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("signal_heads", self.signal_heads, ("each", "one"))
        if self.options.cls_token:
            raise ValueError(
                f"cls_token=True cannot work with {self.name}: the CLS row has no attention of its own to weigh it by"
            )

    @classmethod
    def official(cls, keep: Keep = 0.125, **fields: Any) -> PruMerge:
        """Return the settings of the released rule with ``keep`` of each crop (released: 1/8 in training, else the
        share of outliers).

        Sums, the last vision layer, compact positions.
        """
        options = TokenOptions(
            positions="compact", crops="per_crop", protect_predicting_tokens=False, signal_queries=None, signal_layer=-1
        )
        return cls.from_preset(
            options, fields, keep=keep, merge="sum", order="attention", rounding="int", signal_heads="one"
        )

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(signal_heads=self.signal_heads)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.keep is not None, "keep=")
        if budget is None:
            kept, others = self.kept_of(tokens), 1
        else:
            target = target_mean(budget, tokens)
            entry = int(target + EPSILON)
            if entry < 1:
                raise infeasible_budget(self.name, target, 1, tokens, "at least one token enters the decoder")
            others = int(entry > 1)
            kept = entry - others
        if kept + others >= tokens:
            return plan_keep_all(tokens, depth)
        return SpanPlan(tokens, kept, others, (kept + others,) * depth)

    def kept_of(self, tokens: int) -> int:
        """Number of ``tokens`` that are kept by ``keep``."""
        assert self.keep is not None
        return count_of(self.keep, tokens, self.rounding)

    def select_tokens(self, view: EncoderView) -> Selection:
        tokens, real = self.chosen(view)
        return self.around(view, tokens, tokens, real)

    def chosen(self, view: EncoderView) -> tuple[Tensor, Tensor]:
        """Kept tokens [B, K] in output order, and a mask of the valid ones [B, K]."""
        importance = view.require(Input.IMPORTANCE)
        width = max(plan.dominant for plan in view.plans)
        if self.order == "raster":
            return pack_right(top(importance, view.valid, view.dominant), width)
        position = torch.arange(width, device=view.valid.device)
        return ranking(importance, view.valid)[:, :width], position < view.dominant[:, None]

    def around(self, view: EncoderView, tokens: Tensor, places: Tensor, real: Tensor) -> Selection:
        """Merge the neighbours of kept tokens into them, and all other tokens into one last row.

        A token that is kept twice counts twice as a neighbour. A token whose position in ``places`` is taken but that
        is not kept is lost: it joins no row.

        Parameters
        ----------
        view : EncoderView
            Inputs of the vision tower.
        tokens : Tensor
            [B, K] long, kept tokens.
        places : Tensor
            [B, K] long, tokens whose positions they take.
        real : Tensor
            [B, K] bool, False for padding.
        """
        return merge_with_neighbours(
            tokens,
            places,
            real,
            view.valid,
            view.contextual,
            view.require(Input.IMPORTANCE),
            view.require(Input.KEYS),
            self.neighbours,
            self.merge == "mean",
        )
