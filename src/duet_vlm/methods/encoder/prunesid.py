"""PruneSID: group vision tokens by principal directions and keep dissimilar ones of every group, before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duet_vlm.ops.greedy import cosine
from duet_vlm.ops.groups import principal, proportional_shares, sums_of_groups, survivors, top_of_groups
from duet_vlm.ops.ragged import upload
from duet_vlm.ops.select import ranking, ranks
from duet_vlm.planning.budget import Keep
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer

PER_GROUP = 4  # tokens to keep for each group
SCALE = 32  # tokens to keep at which the threshold is the mean likeness of the picture
ROUNDS = 5  # tokens that a group gives at most before others come back, for every 64 to keep
MOST = 0.999  # of the threshold: only exact duplicates are more alike


@register("prunesid")
@dataclass(frozen=True)
class PruneSID(ScoreReducer):
    """PruneSID (ICLR 2026): synergistic importance and diversity, by semantic groups of tokens.

    An image of which T tokens are kept has T / 4 groups: principal directions are computed from the sigmoid of the
    features over channels, and a token belongs to the direction with its largest component. Within a group the most
    attended token is taken and all tokens that resemble it more than a threshold are suppressed, repeatedly; the
    threshold is the image's mean cosine times T / 32. Every group keeps one token, and the other T minus that many are
    divided among groups in proportion to the tokens taken there. Nothing is merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.

    Cost: one query row of attention (CLS) or blocked column sums of one vision layer, five products of N x C x T / 4
    numbers, an N x N table of cosines, and 5 T / 64 steps over it; 4 N^2 bytes. Needs: vision attention. Usable in
    training (the choice carries no gradient).

    From the paper and a reading of the released code (ZhengyaoFang/PruneSID); no recordings. Differences: principal
    directions from a fixed start (released: random), no CLS token among the tokens, shares by largest remainders
    (released: rounded running sums), exact counts, any batch, kept positions. ``official``: compact positions, crop by
    crop.
    """

    paper = "PruneSID, ICLR 2026, arXiv 2603.09480"
    summary = "group vision tokens by principal directions, and keep attended ones that are unlike each other in every group, before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.FEATURES})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.options.cls_token:
            raise ValueError(f"cls_token=True cannot work with {self.name}: the CLS row is no token to group")

    @classmethod
    def official(cls, keep: Keep = 64, **fields: Any) -> PruneSID:
        """Return the settings of the released LLaVA code, except for the differences listed in the class: compact
        positions; ``keep`` patches of each crop.
        """
        options = TokenOptions(
            positions="compact", crops="per_crop", protect_predicting_tokens=False, signal_queries=None
        )
        return cls.from_preset(options, fields, keep=keep)

    def score(self, view: EncoderView) -> Tensor:
        return view.require(Input.IMPORTANCE)

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        group, groups = self.groups(view)
        likeness = cosine(view.require(Input.FEATURES), view.valid)
        limits = [ROUNDS * math.ceil(plan.dominant / 64) for plan in view.plans]
        step = survivors(likeness, scores, group, view.valid, self.threshold(view, likeness), groups, max(limits))
        taken = step < upload(limits, step.device)[:, None]
        apart, size = (sums_of_groups(mask, group, view.valid, groups) for mask in (taken, view.valid))
        one = (size > 0).long()
        more = proportional_shares(apart - one, (apart - one).clamp(min=0), view.dominant - one.sum(1))
        worse = ranks(ranking(scores, view.valid))
        first = -(worse + ~taken * worse.shape[1]).float()  # by attention, who was taken in front of who left
        return top_of_groups(first, group, view.valid, one + more, view.dominant)

    def groups(self, view: EncoderView) -> tuple[Tensor, int]:
        """Group of each token [B, N], and the largest number of groups."""
        counts = [min(max(1, plan.dominant // PER_GROUP), max(1, plan.tokens)) for plan in view.plans]
        wanted = upload(counts, view.valid.device)
        parts = principal(view.require(Input.FEATURES).float().sigmoid(), view.valid, wanted, max(counts))
        return parts.abs().argmax(-1), max(counts)

    def threshold(self, view: EncoderView, likeness: Tensor) -> Tensor:
        """Cosine above which two tokens of a group are duplicates: [B]."""
        count = view.valid.sum(1).clamp(min=2)
        mean = (likeness.sum((1, 2)) - view.valid.sum(1)) / (count * (count - 1))
        return (mean * view.dominant / SCALE).clamp(max=MOST)
