"""VScan: local tokens of a shallow and global tokens of a deep vision layer, all others merged into them; then one drop
by text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.groups import top_with_limit, window_numbers
from duet_vlm.ops.merge_targets import merge_into_nearest
from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.schedules import halfway
from duet_vlm.ops.select import top
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
from duet_vlm.reducers.encoder_view import Layer
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


@register("vscan")
@dataclass(frozen=True)
class VScan(EncoderReducer, DecoderReducer):
    """VScan (TMLR 2026, arXiv 2505.22654): two scans of the image before the decoder, and one drop inside it.

    Half of the tokens are local: all tokens are visited by falling attention in a shallow vision layer, and each window
    of ``window`` x ``window`` contributes at most its share. The others are global: the most attended of the rest in a
    deep layer. Every other token is merged into the kept one that it resembles most (cosine of projected tokens), as a
    plain mean. In the middle of the decoder the tokens with the most attention from the last text token are kept.

    Parameters
    ----------
    keep : int or float, optional
        Tokens that enter the decoder per span: a count, or a fraction of the span's tokens; an odd one is global.
    window : int
        Rows and columns of a window, at least 1; incomplete ones belong to the last window. The authors': 6, and 4 for
        Qwen2.5-VL.
    shallow : int or float
        Vision layer of the local tokens: its number, or a share of the depth (the first layer from there on that
        attends globally).
    local : str
        Tokens per window. "limit": at most an equal share, rounded up; "equal": exactly the same number, so that fewer
        than ``keep`` enter where the windows do not divide half of it (released LLaVA code, square images).
    merge_others : bool
        Merge the tokens that are not kept; False drops them.
    schedule : ((layer, keep), ...), optional
        Drops inside the decoder: before ``layer`` keep that many tokens (int) or that fraction of the entering ones
        (float). With a budget: fractions, and the largest entry that it allows; left out, a third is kept from the
        middle on. Without a budget and left out: none.

    Cost: one query row of attention (CLS) or blocked column sums of two vision layers, the projector on every token,
    kept tokens times all others; one key projection and one query row at the drop. Needs: vision attention, the grid,
    text after the image. Usable in training.

    Differences from the authors' code (Tencent/SelfEvolvingAgent, VScan): any grid and any count, kept positions,
    grouped key heads, any batch. ``official`` and ``official_qwen25`` restore the released rules.
    """

    paper = "VScan, TMLR 2026, arXiv 2505.22654"
    summary = "keep local and global vision tokens of two vision layers, merge all others into them; drop once by the last text row"
    requires = frozenset({Input.IMPORTANCE, Input.PROJECTED_FEATURES, Input.GRID, Input.SCORES})

    default_options = TokenOptions(text_query="last")
    keep: Keep | None = None
    window: int = 6
    shallow: Layer = 0.25
    local: str = "limit"
    merge_others: bool = True
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if self.window < 1:
            raise ValueError(f"window={self.window}: rows and columns of a window, at least 1")
        check_choice("local", self.local, ("limit", "equal"))
        if self.schedule is not None:
            object.__setattr__(self, "schedule", check_schedule(self.schedule, self.reenters))

    @classmethod
    def official(cls, keep: int | None = 96, schedule: Schedule | None = ((16, 32),), **fields: Any) -> VScan:
        """Return the settings of the released LLaVA code: equally many tokens of each window, compact positions.

        ``keep`` is the count of each crop, and the schedule has counts.
        """
        options = TokenOptions(positions="compact", crops="per_crop", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, schedule=schedule, local="equal", shallow=5)

    @classmethod
    def official_qwen25(
        cls, keep: Keep | None = 0.25, schedule: Schedule | None = ((14, 1 / 3),), **fields: Any
    ) -> VScan:
        """Return the settings of the released Qwen2.5-VL code: windows of 4, attention from all patches of an image."""
        options = TokenOptions(signal_queries=None, protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, schedule=schedule, window=4)

    @property
    def signal_layers(self) -> tuple[Layer, ...]:
        return (self.options.signal_layer, self.shallow)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(
            self, budget, self.keep is not None or (budget is None and self.schedule is not None), "keep=, schedule="
        )
        if budget is None:
            entry = tokens if self.keep is None else self._entering(count_of(self.keep, tokens, "int"), tokens)
            return SpanPlan(tokens, entry, 0, layer_counts(entry, depth, self.schedule or (), may_grow=self.reenters))
        schedule = halfway(depth) if self.schedule is None else self.schedule
        if self.local == "equal" or any(isinstance(kept, int) for _, kept in schedule):
            raise ValueError(
                f"{self.name}: with a budget give fractions in schedule= (0.0 to 1.0) and local='limit', got {schedule}, {self.local!r}"
            )
        target = target_mean(budget, tokens)
        return (
            plan_keep_all(tokens, depth)
            if target >= tokens
            else plan_with_schedule(self, schedule, tokens, depth, target)
        )

    def _entering(self, keep: int, tokens: int) -> int:
        """Number of tokens that enter where ``keep`` are requested."""
        if self.local == "limit" or keep >= tokens:
            return keep
        each = max(1, math.isqrt(tokens) // self.window) ** 2
        if keep // 2 < each:
            raise ValueError(
                f"{self.name}: keep={keep} has {keep // 2} local tokens for {each} windows: give at least {2 * each}"
            )
        return keep // 2 // each * each + keep - keep // 2

    def with_paper_schedule(self, depth: int, share: float | None = None) -> VScan:
        return self if self.schedule is not None else replace(self, schedule=halfway(depth))

    def select_tokens(self, view: EncoderView) -> Selection:
        local = self.locals_of(view)
        chosen = local | top(view.require(Input.IMPORTANCE), view.valid & ~local, view.dominant - local.sum(1))
        index, valid = pack_right(chosen, max(plan.dominant for plan in view.plans))
        if not self.merge_others:
            return Selection.keep_only(index, valid)
        return merge_into_nearest(
            index,
            valid,
            view.valid & ~chosen,
            max(plan.tokens - plan.dominant for plan in view.plans),
            view.require(Input.FEATURES),
        )

    def locals_of(self, view: EncoderView) -> Tensor:
        """Mask [B, N] of the local tokens."""
        shallow, parts = view.require(Input.IMPORTANCE, layer=1), torch.where(view.valid, view.require_parts(), -1)
        coords, size, _ = view.require(Input.GRID)
        window, count = window_numbers(coords, size, parts, self.window, view.valid.shape[1])
        half = view.dominant // 2
        limit = half // count if self.local == "equal" else (half + count - 1) // count
        return top_with_limit(shallow, window, view.valid, limit, torch.minimum(half, limit * count))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
