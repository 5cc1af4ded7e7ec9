"""HoloV: divide a budget among segments of an image by attention and variety, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.greedy import cosine
from duet_vlm.ops.groups import proportional_shares, segment_numbers, sums_of_groups, top_of_groups
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import ranking, ranks
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import EncoderReducer, EncoderView, check_choice, plan_fixed_count
from duet_vlm.reducers.registry import register

TINY = torch.finfo(torch.float32).tiny
BOUND = 1e30  # attention above this marks a CLS token, which must rank first


@register("holov")
@dataclass(frozen=True)
class HoloV(EncoderReducer):
    """HoloV (NeurIPS 2025): holistic choice, spread over the image instead of a few places that attract attention.

    The tokens of an image, in raster order, are cut into ``num_crops`` segments. A token's score is its attention plus
    ``beta`` times its variety: the variance of its cosines with the other tokens of its segment, scaled to the mean
    attention of the segment. A segment gets tokens in proportion to its mean score and keeps its best ones. Nothing is
    merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.
    num_crops : int
        Segments per image, at least 1.
    beta : float
        Weight of variety, at least 0.
    within : str
        Ranking within a segment: by "score", or by "attention" alone (released code).
    split : str
        "even": largest remainders, and the excess of a full segment goes to the others; "floor": whole numbers, then
        one more for the best segments (released code, which loses the excess).

    Cost: one query row of attention (CLS) or blocked column sums of one vision layer, the projector on every token, an
    N x N table of cosines; 4 N^2 bytes. Needs: vision attention. Usable in training (the choice carries no gradient).

    From the paper and a reading of the released code (obananas/HoloV); no recordings. Differences: exact counts, any
    batch, kept positions, raster order. ``official`` restores choice and split; its tokens are in raster order, the
    released ones segment by segment by falling attention.
    """

    paper = "HoloV, NeurIPS 2025"
    summary = "share the budget among stretches of the picture by attention and variety, and keep the best of each, before the decoder"
    signals = frozenset({"importance"})
    reads_projected = True

    keep: Keep | None = None
    num_crops: int = 16
    beta: float = 0.09
    within: str = "score"
    split: str = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.num_crops < 1:
            raise ValueError(f"crops={self.num_crops}: stretches that a picture is cut into, at least 1")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta}: the weight of variety, at least 0")
        check_choice("within", self.within, ("score", "attention"))
        check_choice("split", self.split, ("even", "floor"))

    @classmethod
    def official(cls, keep: Keep = 64, **fields: Any) -> HoloV:
        """Return the settings of the released LLaVA code: ranking by attention within a segment, whole shares, compact
        positions.
        """
        released: dict[str, Any] = {"within": "attention", "split": "floor", "positions": "compact", "protect_predicting_tokens": False}
        return cls(**{"keep": keep, "crops": "joint", "signal_queries": None} | released | fields)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        assert view.importance is not None  # promised by ``signals``
        stretch = segment_numbers(view.valid, self.num_crops)
        score = self.score(view, stretch)
        size = sums_of_groups(view.valid, stretch, view.valid, self.num_crops)
        mean = sums_of_groups(score, stretch, view.valid, self.num_crops) / size.clamp(min=1)
        by = score if self.within == "score" else view.importance
        chosen = top_of_groups(by, stretch, view.valid, self.quota(mean, size, view.dominant), view.dominant)
        return Selection.keep_only(*pack_right(chosen, max(plan.dominant for plan in view.plans)))

    def score(self, view: EncoderView, stretch: Tensor) -> Tensor:
        """Score of each token, attention plus weighted variety: [B, N]; in a segment of one token the variety is 0."""
        assert view.importance is not None and view.features is not None  # promised by ``signals``
        others = (stretch[:, :, None] == stretch[:, None]) & view.valid[:, None]
        table = cosine(view.features, view.valid) * others
        table.diagonal(dim1=1, dim2=2).zero_()
        count = others.sum(2)
        mean = table.sum(2) / (count - 1).clamp(min=1)
        # a token's cosine with itself counts as 0
        variety = ((table - mean[..., None]).square() * others).sum(2) / (count - 1).clamp(min=1)
        variety = torch.where(count > 1, variety, 0.0)
        fed = view.importance >= BOUND  # the CLS token counts as the most attended token
        attention = view.importance.masked_fill(fed, 0.0)
        attention = torch.where(fed, attention.amax(1, keepdim=True), attention)
        both = (sums_of_groups(x, stretch, view.valid, self.num_crops).gather(1, stretch) for x in (attention, variety))
        level, varies = both
        return attention + self.beta * variety * level / varies.clamp(min=TINY)

    def quota(self, mean: Tensor, size: Tensor, total: Tensor) -> Tensor:
        """Tokens kept of each segment [B, num_crops], from its mean score and its size."""
        if self.split == "even":
            return proportional_shares(mean, size, total)
        part = (mean / mean.sum(1, keepdim=True).clamp(min=TINY) * total[:, None]).floor().long()
        order = ranks(ranking(mean, torch.ones_like(mean, dtype=torch.bool)))
        return part + (order < (total - part.sum(1))[:, None])

