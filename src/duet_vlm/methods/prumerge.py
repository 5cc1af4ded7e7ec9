"""LLaVA-PruMerge: keep the most attended vision tokens and merge similar ones into them, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.neighbor_merge import merge_with_neighbours
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import ranking, top
from duet_vlm.planning.budget import EPSILON, Budget, Keep, SpanPlan, check_keep, count_of, infeasible_budget, target_mean
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import ROUNDINGS, EncoderReducer, EncoderView, check_budget_or_fields, check_choice, plan_keep_all
from duet_vlm.reducers.registry import register


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(EncoderReducer):
    """LLaVA-PruMerge (ICCV 2025, arXiv 2403.15388): keep attended tokens, merge their neighbours into them.

    The tokens that the vision tower attends to most are kept. Into each, the ``neighbours`` tokens that resemble it
    most (cosine of mean keys, kept ones and others) are merged, weighted by their shares of the attention; one more row
    averages all tokens that were not kept. Text plays no part, and nothing happens inside the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction; one more row enters the decoder. A budget of n keeps n - 1.
    neighbours : int
        Tokens merged into each kept one, at least 0.
    merge : str
        "mean": of the token, with weight 1, and its neighbours, with their shares of the attention; "sum": token + sum
        (released code).
    order : str
        Order of the kept tokens, which matters for ``positions="compact"``: "raster", or by falling "attention"
        (released code).
    rounding : str
        Rounding of a fraction to a count: "floor" or "int" (released code).

    Cost: one query row of attention (CLS) or blocked column sums of one vision layer; per kept token one sort of all
    others; the product of a table of kept x all tokens with the features, 4 K N bytes. Needs: vision attention and
    keys. Usable in training (the choice and its weights carry no gradient, merged tokens do).

    Differences from the authors' code (42Shawn/LLaVA-PruMerge): the number of tokens follows from the budget, not from
    the number of outliers of the attention (quartiles; see ``ops.select.outliers``), so images of a batch do not depend
    on each other; means instead of sums, attention per head instead of all heads as one, of the layer of the features
    instead of the last one; kept positions. The last row has the position of its most attended token.
    ``PruMerge.official`` restores the released rule at a given count.
    """

    paper = "LLaVA-PruMerge, ICCV 2025, arXiv 2403.15388"
    summary = "keep the most attended vision tokens, each with what resembles it, and all others in one row, before the decoder"
    signals = frozenset({"importance", "keys"})
    reads_features = False

    keep: Keep | None = None
    neighbours: int = 32
    merge: str = "mean"
    order: str = "raster"
    rounding: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours}: how many tokens each kept one takes in, at least 0")
        check_choice("merge", self.merge, ("mean", "sum"))
        check_choice("order", self.order, ("raster", "attention"))
        check_choice("rounding", self.rounding, ROUNDINGS)
        if self.cls_token:
            raise ValueError(f"cls_token=True cannot work with {self.name}: the CLS row has no attention of its own to weigh it by")

    @classmethod
    def official(cls, keep: Keep = 0.125, **fields: Any) -> PruMerge:
        """Return the settings of the released rule with ``keep`` of each crop (released: 1/8 in training, else the
        share of outliers).

        Sums, the last vision layer, compact positions.
        """
        released: dict[str, Any] = {"merge": "sum", "order": "attention", "rounding": "int", "signal_heads": "one", "signal_layer": -1}
        released |= {"positions": "compact", "crops": "per_crop", "protect_predicting_tokens": False, "signal_queries": None}
        return cls(**{"keep": keep} | released | fields)

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
        assert view.importance is not None  # promised by ``signals``
        width = max(plan.dominant for plan in view.plans)
        if self.order == "raster":
            return pack_right(top(view.importance, view.valid, view.dominant), width)
        place = torch.arange(width, device=view.valid.device)
        return ranking(view.importance, view.valid)[:, :width], place < view.dominant[:, None]

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
        assert view.importance is not None and view.keys is not None  # promised by ``signals``
        return merge_with_neighbours(tokens, places, real, view.valid, view.contextual, view.importance, view.keys, self.neighbours, self.merge == "mean")
