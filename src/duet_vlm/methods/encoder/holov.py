"""HoloV: divide a budget among segments of an image by attention and variety, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.greedy import cosine
from duet_vlm.ops.groups import proportional_shares, segment_numbers, sums_of_groups, top_of_groups
from duet_vlm.ops.select import ranking, ranks
from duet_vlm.planning.budget import Keep
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer
from duet_vlm.utils.field_types import check_choice

TINY = torch.finfo(torch.float32).tiny
BOUND = 1e30  # what a CLS row that must come first is given for attention


@register("holov")
@dataclass(frozen=True)
class HoloV(ScoreReducer):
    """HoloV (NeurIPS 2025): a holistic choice, so that tokens do not all come from the few places that attract
    attention.

    The tokens of a picture, in raster order, are cut into ``num_crops`` stretches. A token scores by its attention and
    by how much its likeness to the other tokens of its stretch varies (variance of cosines, brought to the mean
    attention of the stretch, times ``beta``). A stretch gets tokens in proportion to its mean score, and keeps its
    best. Nothing is merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them. A budget of n keeps n.
    num_crops : int
        Stretches of a picture.
    beta : float
        Weight of variety.
    within : str
        What chooses within a stretch: the "score", or "attention" alone (released code).
    split : str
        "even": largest remainders, and what a full stretch leaves goes to the others; "floor": whole numbers, then one
        more for the best stretches (released code, which loses what does not fit).

    Cost: one row of attention (CLS) or blocked column sums of one vision layer, the projector on every token, an N x N
    table of cosines; 4 N^2 bytes. Needs: vision attention. Usable in training (the choice carries no gradient).

    From the paper and a reading of the released code (obananas/HoloV); no recordings. Differences: exact counts, any
    batch, kept positions, raster order. ``official`` restores choice and split; its rows stand in raster order, the
    released ones stretch by stretch by falling attention.
    """

    paper = "HoloV, NeurIPS 2025, arXiv 2510.02912"
    summary = "share the budget among stretches of the picture by attention and variety, and keep the best of each, before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.PROJECTED_FEATURES})

    num_crops: int = 16
    beta: float = 0.09
    within: str = "score"
    split: str = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_crops < 1:
            raise ValueError(f"num_crops={self.num_crops}: stretches that a picture is cut into, at least 1")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta}: the weight of variety, at least 0")
        check_choice("within", self.within, ("score", "attention"))
        check_choice("split", self.split, ("even", "floor"))

    @classmethod
    def official(cls, keep: Keep = 64, **fields: Any) -> HoloV:
        """Return the settings of the released LLaVA code: ranking by attention within a segment, whole shares, compact
        positions.
        """
        options = TokenOptions(positions="compact", crops="joint", protect_predicting_tokens=False, signal_queries=None)
        return cls.from_preset(options, fields, keep=keep, within="attention", split="floor")

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        stretch = segment_numbers(view.valid, self.num_crops)
        size = sums_of_groups(view.valid, stretch, view.valid, self.num_crops)
        mean = sums_of_groups(scores, stretch, view.valid, self.num_crops) / size.clamp(min=1)
        by = scores if self.within == "score" else view.require(Input.IMPORTANCE)
        return top_of_groups(by, stretch, view.valid, self.quota(mean, size, view.dominant), view.dominant)

    def score(self, view: EncoderView) -> Tensor:
        """Score of each token, attention plus weighted variety: [B, N]; in a segment of one token the variety is 0."""
        importance, stretch = view.require(Input.IMPORTANCE), segment_numbers(view.valid, self.num_crops)
        others = (stretch[:, :, None] == stretch[:, None]) & view.valid[:, None]
        table = cosine(view.require(Input.FEATURES), view.valid) * others
        table.diagonal(dim1=1, dim2=2).zero_()
        count = others.sum(2)
        mean = table.sum(2) / (count - 1).clamp(min=1)
        # a token's likeness to itself counts as 0
        variety = ((table - mean[..., None]).square() * others).sum(2) / (count - 1).clamp(min=1)
        variety = torch.where(count > 1, variety, 0.0)
        fed = importance >= BOUND  # a CLS row counts as the most attended token
        attention = importance.masked_fill(fed, 0.0)
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
