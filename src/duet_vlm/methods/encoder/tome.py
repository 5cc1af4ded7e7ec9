"""ToMe: merge similar vision tokens pair by pair, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.merge import matched
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


@register("tome")
@dataclass(frozen=True)
class ToMe(EncoderReducer):
    """Token Merging (ICLR 2023, arXiv 2210.09461), applied to the output of the vision tower.

    Bipartite soft matching: tokens are split alternately into sources and targets, each source is matched with the
    target that it resembles most (cosine of mean keys), and the most similar pairs are merged. This is repeated with
    the remaining tokens, a quarter of them at a time, until the count is reached. A merged token is the mean of all its
    members, and so is its key. No attention, no text, and nothing happens inside the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction. A budget of n keeps n.
    order : str
        Order of the tokens that is split in the next round: "raster", or that of the released code ("released":
        unmerged sources, most similar first, then targets).
    pace : int
        In each round one of this many tokens is merged, at least 2. With 2, the limit of a matching, every source is
        merged, however dissimilar.

    Cost: per round a quarter of a table of all remaining pairs, in float32; 8 rounds from 576 to 64 tokens. Needs:
    vision keys. Usable in training (the choice carries no gradient, merged tokens do).

    Differences from the authors' code (facebookresearch/ToMe): it merges within the blocks of a tower, some tokens in
    each, and the next block computes new keys of merged tokens (see ``tome_tower``); here nothing in the tower changes,
    keys are merged like the features, and attention is not weighted by sizes. Kept positions: a merged token has the
    position of its last target. ``ToMe.official``: order of the released code, up to half of the tokens in one round,
    compact positions.
    """

    paper = "ToMe, ICLR 2023, arXiv 2210.09461"
    summary = "merge vision tokens that resemble each other, pair by pair, before the decoder"
    requires = frozenset({Input.KEYS})

    keep: Keep | None = None
    order: str = "raster"
    pace: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        check_choice("order", self.order, ("raster", "released"))
        if self.pace < 2:
            raise ValueError(f"pace={self.pace}: at most every second token can leave in a round, give 2 or more")
        if self.options.cls_token:
            raise ValueError("cls_token=True cannot work with tome: the CLS row would be merged like any other")

    @classmethod
    def official(cls, keep: Keep = 0.25, **fields: Any) -> ToMe:
        """Return the settings of the released code's matching, in its order, at compact positions; ``keep`` tokens of
        each crop.
        """
        options = TokenOptions(positions="compact", crops="per_crop", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, order="released", pace=2)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        sums, home = (
            view.require(Input.KEYS).float(),
            torch.arange(view.valid.shape[1], device=view.valid.device).expand(view.valid.shape),
        )
        joined = home  # the token at whose place each one is
        left, wanted = view.valid.sum(1), view.dominant.clamp(min=1)
        # of each span on the host, and wanted
        most = [(min(plan.tokens, home.shape[1]), max(1, plan.dominant)) for plan in view.plans]
        rows, real = pack_right(view.valid, max(n for n, _ in most))
        while any(n > k for n, k in most):
            most = [(max(k, n - max(1, n // self.pace)), k) for n, k in most]
            leaving = torch.minimum((left - wanted).clamp(min=0), (left // self.pace).clamp(min=1))
            left = left - leaving
            source, target = matched(gather_rows(sums, rows), real)
            leaves = torch.arange(source.shape[1], device=rows.device) < leaving[:, None]
            moved, onto = rows.gather(1, source), rows.gather(1, target)
            amount = gather_rows(sums, moved) * leaves[..., None]
            sums = sums.scatter_add(1, onto[..., None].expand_as(amount), amount)
            joined = home.scatter(1, moved, torch.where(leaves, onto, moved)).gather(1, joined)
            rows, real = self._next(rows, real, source, leaves, max(n for n, _ in most))
        number = torch.arange(rows.shape[1], device=rows.device)
        valid = real & (number < view.dominant[:, None])
        into = torch.full_like(home, -1).scatter_(1, rows, torch.where(valid, number, -1)).gather(1, joined)
        return Selection(rows, valid, home, into.masked_fill((joined == home) | ~view.valid, -1))

    def _next(self, rows: Tensor, real: Tensor, source: Tensor, leaves: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of the next round [B, width], and a mask of the valid ones."""
        stays = real.scatter(1, source, real.gather(1, source) & ~leaves)
        order = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape)
        if self.order == "released":  # a finished span does not change
            order = torch.where(leaves.any(1, keepdim=True), torch.cat([source, order[:, 1::2]], 1), order)
        position, there = pack_right(stays.gather(1, order), width)
        return rows.gather(1, order.gather(1, position)), there
