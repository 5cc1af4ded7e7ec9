"""Custom: a scorer, a selector, a merger and a schedule by name as one method."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.planning.budget import (
    Budget,
    BudgetError,
    Keep,
    Schedule,
    SpanPlan,
    check_keep,
    count_of,
    layer_counts,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all, plan_with_schedule
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.decoder import DecoderReducer, DecoderView
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice
from duet_vlm_lab.methods.building_blocks import CHOICES, SCHEDULES, Blocks, checked_schedule

ANY, COSINE = (0, math.inf), (-1, 1)
RANGES = {
    "alpha": ANY,
    "ridge": ANY,
    "pool": ANY,
    "window": (1, math.inf),
    "alike": COSINE,
    "tau": COSINE,
    "important": (0, 1),
}


@register("custom")
@dataclass(frozen=True)
class Custom(EncoderReducer, DecoderReducer):
    """Building blocks of the other methods, put together by name: what scores tokens, what selects among them, what
    becomes of the rest, and when those that entered leave inside the decoder, ranked by text attention. Only what the
    blocks look at is made.

    Scorers: "importance" (attention of the CLS row, or what a token receives), "uniform", "relevance" (to the question;
    CDPruner), "sensitivity" (of the projector; ZOO-Prune), "key_norm" (short keys first), "feature_norm", "contrast"
    (distance to the picture's mean), "density" (peaks; DPC-KNN).

    Selectors: "top", "even" (raster order), "windows", "stretches" (by mean score; HoloV), "nms" (PIO-FVLM), "graph"
    (independent set; D2Pruner), "distinct" (VisPruner), "max_min" (DivPrune), "apart" (ZOO-Prune), "determinantal"
    (CDPruner), "coverage" (SCOPE), "discount" (SIEVE). "even" and "max_min" look at no scores.

    Mergers: "none"; into chosen rows "nearest" (VScan), "weighted" (by score), "close" (DUET+), "neighbours"
    (PruMerge); into rows of their own "local" (DUET), "spaced" (VisionZip), "peaks" (DPC-KNN). Schedules: "none",
    "duet", "pyramid", "halfway" (VScan), "tapered" (DUET+).

    Parameters
    ----------
    keep : int or float, optional
        Rows per span that enter the decoder, or the fraction of its tokens. Left out with ``schedule`` given and no
        budget: all.
    scorer, selector, merger : str
        Their names.
    schedule : str or ((layer, keep), ...)
        Its name, or drops as in ``Duet``; with a budget fractions, and as many rows enter as it allows.
    compare : str
        Whose cosines count: "features" (the rows that are reduced; projected ones if the scorer reads those),
        "projected", or "keys" of the tower.
    scale : str, optional
        What a score weighs: "none" (as it is), "largest" (over the largest of the picture), "range" (from 0 to 1). Left
        out: as its method has it.
    alpha : float
        The power of that weight: 0 makes all equal.
    alike, important, ridge, window : float
        "nms": the least cosine of doubles; "graph": likeness, from 0 to 1 over the picture, above which tokens are
        joined. "graph", "distinct": share of the tokens that the score alone chooses. "determinantal": what no other
        token explains of one (DUET+: 0.05). "windows": rows and columns.
    pool, tau : float
        The next tokens by score that may merge: per row of its own in "local" (default 4), per chosen token in "close"
        (default 0.5). "close": the least cosine.

    Cost: that of its blocks: an N x N table of cosines where any compares, a step per chosen token in selectors that
    compare. Needs: what its scorer names, keys to compare keys, the grid for windows. Usable in training (the choice
    carries no gradient, merged rows do).
    """

    paper = "no paper; a composition"
    summary = "a scorer, a selector, a merger and a schedule by name, put together"

    keep: Keep | None = None
    scorer: str = "importance"
    selector: str = "top"
    merger: str = "none"
    schedule: Schedule | str = ()
    compare: str = "features"
    scale: str | None = None
    alpha: float = 1.0
    alike: float = 0.8
    important: float = 0.5
    ridge: float = 0.0
    window: int = 4
    pool: float | None = None
    tau: float = 0.6

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            check_choice(name, getattr(self, name), known)
        super().__post_init__()
        if self.scale not in (None, "range") and self.blocks.scorer.scale == "range":
            raise ValueError(
                f"scale={self.scale!r}: scores by {self.scorer} may be negative, leave scale out or give 'range'"
            )
        object.__setattr__(self, "schedule", checked_schedule(self.schedule))
        if self.keep is not None:
            check_keep("keep", self.keep)
        for name, (low, high) in RANGES.items():
            if (value := getattr(self, name)) is not None and not (low <= value <= high and abs(value) < math.inf):
                raise ValueError(
                    f"{name}={value}: must be a number {f'of at least {low}' if high == math.inf else f'in [{low}, {high}]'}"
                )
        if self.merger == "local" and self.pool is not None and self.pool < 1:
            raise ValueError(f"pool={self.pool}: with merger='local' at least 1, each row has a token")
        if self.options.cls_token:
            raise ValueError(
                f"cls_token=True cannot work with {self.name}: it chooses among patches, and the CLS row is none"
            )

    @property
    def blocks(self) -> Blocks:
        """The blocks that the settings name."""
        return Blocks.named(self.scorer, self.selector, self.merger, self.compare, self.scale)

    @property
    def requires(self) -> frozenset[Input]:  # type: ignore[override]
        return self.blocks.requires | {Input.SCORES}

    def drops(self, depth: int, share: float | None = None) -> Schedule:
        """The schedule in a decoder of ``depth`` layers; ``share``: of its tokens, that a budget leaves a picture."""
        return SCHEDULES[self.schedule](depth, share) if isinstance(self.schedule, str) else self.schedule

    def with_paper_schedule(self, depth: int, share: float | None = None) -> Custom:
        return replace(self, keep=1.0 if self.keep is None else self.keep, schedule=self.drops(depth, share))

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(
            self, budget, self.keep is not None or (budget is None and bool(self.schedule)), "keep=, schedule="
        )
        if budget is None:
            entry = tokens if self.keep is None else count_of(self.keep, tokens)
            return self._divided(SpanPlan(tokens, entry, 0, layer_counts(entry, depth, self.drops(depth))))
        target = target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)
        if any(isinstance(kept, int) for _, kept in self.drops(depth)):
            raise ValueError(
                f"schedule={self.schedule}: with a budget give fractions (0.0 to 1.0) of the entering tokens, not counts"
            )
        with contextlib.suppress(BudgetError):
            return self._divided(plan_with_schedule(self, self.drops(depth, target / tokens), tokens, depth, target))
        # of a few tokens one can still enter
        return self._divided(plan_with_schedule(self, self.drops(depth, 0.0), tokens, depth, target))

    def _divided(self, plan: SpanPlan) -> SpanPlan:
        own = self.blocks.merger.own(plan.entry, plan.tokens) if plan.reduces_entry else 0
        return replace(plan, dominant=plan.entry - own, contextual=own)

    def select_tokens(self, view: EncoderView) -> Selection:
        return self.blocks.selection(view, self)

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES), view.valid, view.num_keep)
