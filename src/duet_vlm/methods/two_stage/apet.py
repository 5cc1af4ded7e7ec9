"""ApET: keep the visual tokens that a few basis tokens approximate worst, before the decoder and once inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from duet_vlm.ops.greedy import farthest_points
from duet_vlm.ops.information import residual
from duet_vlm.ops.merge import nearest_anchor, row_numbers, shares
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.ops.select import ranking, ranks
from duet_vlm.planning.budget import (
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
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all, plan_with_schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice

SLOTS = ("own", "released", "behind")


@register("apet")
@dataclass(frozen=True)
class ApET(EncoderReducer, DecoderReducer):
    """ApET (CVPR 2026, arXiv 2602.19870): drop the tokens that a few basis tokens approximate well.

    ``basis`` tokens are taken by farthest point sampling. The others are approximated by linear combinations of them
    (least squares). The tokens with the largest error are kept beside the basis; every other one is averaged into the
    kept token that it resembles most (cosine). This is done to the vision features, and again to the hidden states
    inside the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span, basis included: a count, or a fraction of the span's tokens. Left out
        with ``schedule`` given: all.
    schedule : ((layer, keep), ...), optional
        Drops inside the decoder: before ``layer`` keep that many tokens (int) or that fraction of the entering ones
        (float). Default: a third from half of the depth on. ``()``: none.
    basis : int
        Basis tokens, at least 1; always fewer than are kept.
    ridge : float
        Weight of the squared coefficients in the approximation, above 0.
    slots : str
        Position of the basis tokens. "own": at their own positions, unmerged. "released": in place of the ``basis``
        tokens that rank last by error (in raster order before the decoder, by falling error inside), and averaged into
        others like every dropped token. "behind": after the others, which are ordered by falling error, and averaged as
        well (released Video-LLaVA code).
    own_share : float
        With "released": weight of the token that a basis token replaces in the merged row, in [0, 1).
    start : int, optional
        Index of the first basis token (released: a random one); left out, the token of largest norm.

    Cost: ``basis`` passes over the tokens, and cosines of all tokens with the kept ones. Needs: features before the
    decoder, hidden states inside it; no attention and no text. Usable in training (the choice carries no gradient).

    Differences from the authors' code (MaQianKun0/ApET): the defaults of ``slots``, ``own_share`` and ``start``; any
    batch, position and size of images; no rounding to half precision on the way.
    """

    paper = "ApET, CVPR 2026, arXiv 2602.19870"
    summary = "keep what a few basis tokens approximate worst and merge the rest, before the decoder and once inside it"
    requires = frozenset({Input.FEATURES, Input.HIDDEN_STATES})
    merges = True

    keep: Keep | None = None
    schedule: Schedule | None = None
    basis: int = 10
    ridge: float = 1e-5
    slots: str = "own"
    own_share: float = 0.0
    start: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("slots", self.slots, SLOTS)
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule))
        if self.basis < 1 or self.ridge <= 0 or (self.start or 0) < 0 or not 0 <= self.own_share < 1:
            given = f"basis={self.basis}, ridge={self.ridge}, start={self.start}, own_share={self.own_share}"
            raise ValueError(
                f"{given}: at least 1 basis token, a ridge above 0, no negative start, and a share in [0, 1)"
            )
        if self.options.cls_token:
            raise ValueError("cls_token=True cannot work with apet: the CLS row would be approximated like any other")

    @classmethod
    def official(cls, keep: Keep = 192, inside: int = 64, layer: int = 16, **fields: Any) -> ApET:
        """Return the settings of the released LLaVA code: ``keep`` tokens enter, ``inside`` of them are kept before
        ``layer``; compact positions.
        """
        options = TokenOptions(positions="compact", crops="per_crop", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, schedule=((layer, inside),), slots="released")

    @classmethod
    def official_qwen(cls, keep: Keep = 0.3, **fields: Any) -> ApET:
        """Return the settings of the released Qwen2.5-VL code, whose drop inside the decoder (``ridge=0.1``) is defined
        but never called.
        """
        options = TokenOptions(protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, schedule=(), slots="released", own_share=0.5)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.keep is not None or self.schedule is not None, "keep=, schedule=")
        stages: Schedule = ((depth // 2, 1 / 3),)
        if budget is None:
            rounding = "floor" if self.slots == "own" else "int"  # 50 * 0.58 is 28 in the released code
            entry = tokens if self.keep is None else min(max(1, count_of(self.keep, tokens, rounding)), tokens)
            return SpanPlan(
                tokens, entry, 0, layer_counts(entry, depth, stages if self.schedule is None else self.schedule)
            )
        target = target_mean(budget, tokens)
        return (
            plan_keep_all(tokens, depth)
            if target >= tokens
            else plan_with_schedule(self, stages, tokens, depth, target)
        )

    def select_tokens(self, view: EncoderView) -> Selection:
        return self._reduced(
            view.require(Input.FEATURES),
            view.valid,
            view.dominant,
            max(plan.dominant for plan in view.plans),
            in_order=True,
        )

    def prune_tokens(self, view: DecoderView) -> Selection:
        return self._reduced(
            view.require(Input.HIDDEN_STATES),
            view.valid,
            view.num_keep,
            max(stay for _, stay in view.host_counts),
            in_order=False,
        )

    def errors(self, rows: Tensor, valid: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Approximate all tokens by a few basis tokens.

        Parameters
        ----------
        rows : Tensor
            [B, N, C] features or hidden states.
        valid : Tensor
            [B, N] bool, False for padding.
        count : Tensor
            [B] long, tokens to keep.
        most : int
            Largest of ``count``, known on the host.

        Returns
        -------
        basis : Tensor
            [B, M] long, basis tokens in the order of sampling.
        real : Tensor
            [B, M] bool, basis tokens that are used.
        error : Tensor
            [B, N] float32, norm of each token's approximation error.
        """
        rows, alive = rows.float(), valid.sum(1)
        start = (
            rows.norm(dim=-1).masked_fill(~valid, -1).argmax(1)
            if self.start is None
            else (alive - 1).clamp(0, self.start)
        )
        basis = farthest_points(rows, valid, min(self.basis, max(most - 1, 0)), start)
        used = torch.where(count < alive, (count - 1).clamp(0, self.basis), 0)
        real = torch.arange(basis.shape[1], device=basis.device) < used[:, None]
        return basis, real, residual(rows, gather_rows(rows, basis) * real[..., None], self.ridge).norm(dim=-1)

    def _reduced(self, rows: Tensor, valid: Tensor, count: Tensor, most: int, in_order: bool) -> Selection:
        basis, real, error = self.errors(rows, valid, count, most)
        chosen = torch.zeros_like(valid).scatter_reduce(1, basis, real, "amax")
        order = ranking(error, valid & ~chosen if self.slots == "own" else valid)
        rank, first = ranks(order), (count - real.sum(1))[:, None]  # kept for their error
        main = valid & (rank < first)
        # positions of the basis tokens
        others = valid & (rank < count[:, None]) & ~main if self.slots == "released" else chosen
        index, stands = pack_right(main | others, most)
        if self.slots == "behind":
            turn = torch.arange(most, device=order.device).expand_as(index)
            index = torch.where(
                turn < first, order[:, :most], pad(basis, (0, 1)).gather(1, (turn - first).clamp(0, basis.shape[1]))
            )
        number = row_numbers(index, stands, valid.shape[1])
        anchors, alive = pack_right(main, most)
        tokens = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        nearest = number.gather(1, anchors.gather(1, nearest_anchor(rows, tokens, anchors, alive)))
        stays = main if self.slots == "behind" else main | others
        into = nearest.masked_fill(~valid | stays | ~alive.any(1, keepdim=True), -1)
        if self.slots == "own":
            return Selection(index, stands, tokens, into)
        into = torch.where(main, number, into)
        share = shares(into, most)
        if self.slots == "behind":
            return Selection(index, stands, tokens, into, weights=share)
        spare = valid.shape[1] - 1
        slot = order.gather(1, (first + torch.arange(basis.shape[1], device=order.device)).clamp(max=spare))
        slot = slot.masked_fill(~real, spare + 1).sort(dim=1).values.clamp(max=spare) if in_order else slot
        row = number.gather(1, slot).masked_fill(~real, -1)
        taken, left = (torch.full_like(row, x, dtype=share.dtype) for x in (1 - self.own_share, self.own_share))
        members, into = torch.cat([tokens, basis, slot], 1), torch.cat([into, row, row], 1)
        return Selection(index, stands, members, into, weights=torch.cat([share, taken, left], 1))
