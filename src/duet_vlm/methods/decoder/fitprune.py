"""FitPrune: drop a few tokens after every decoder layer, with counts from a table fitted to the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from duet_vlm.methods.decoder.fitprune_table import DELETED, TOKENS, Curve, released, stretched
from duet_vlm.ops.fitting import fitted
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import (
    Budget,
    Schedule,
    SpanPlan,
    count_of,
    infeasible_budget,
    largest_fraction,
    mean_within,
    target_mean,
)
from duet_vlm.planning.solve import check_budget_or_fields, plan_keep_all
from duet_vlm.reducers.calibration import Calibration, read
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.observer import Observer
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.reducers.scoring import ScoringRules
from duet_vlm.utils.field_types import FILE, check_choice

USUAL = 60
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of the tokens, per layer: the lines of a table that is fitted


@register("fitprune")
@dataclass(frozen=True)
class FitPrune(ScheduledReducer):
    """FitPrune (AAAI 2025, arXiv 2409.10197): per-layer counts fitted so that attention changes least.

    A token's score is the attention that it receives from text times the attention that it receives from visual tokens,
    both the largest over heads, in the layer before. The number of tokens dropped after each layer comes from a table;
    each line of the table is a curve of tokens per layer. A budget interpolates between two lines; beyond the ends of
    the table the curves are the full model and a decoder whose first layer alone has visual tokens.

    Parameters beyond ``ScheduledReducer``
    ----------
    table : str or None
        Path of a file that ``duet-vlm calibrate fitprune`` made for this model. None: the released table of
        LLaVA-1.5-7B, stretched to the decoder's depth.

    Cost: after every layer with drops, queries and keys of all tokens, and attention from text and visual tokens: much
    in early layers. Needs: text after the image. Usable in training (the choice carries no gradient).

    Differences from the authors' code (ywh187/FitPrune): any position, number and size of images, batch and depth;
    lines of the table are interpolated; the fit targets tokens, not FLOPs. ``FitPrune.official`` has the released
    numbers.
    """

    paper = "FitPrune, AAAI 2025, arXiv 2409.10197"
    summary = "drop a few tokens after every layer, as many as a table fitted to the model says"
    paper_schedule: ClassVar[Schedule] = ()
    score_layer_offset = 1
    requires = frozenset({Input.SCORES, Input.VISUAL_SELF_ATTENTION})

    table: str | None = field(default=None, metadata=FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table is not None and self.schedule is not None:
            raise ValueError(
                f"table={self.table!r} beside schedule=: a schedule says itself what stays, give one of them"
            )
        self.calibration()

    @classmethod
    def official(cls, reduction: int = USUAL, depth: int = 32, **fields: Any) -> FitPrune:
        """Return the released counts that save ``reduction`` % of the FLOPs, for 576 tokens; a shallower decoder
        (``depth`` below 32 layers) gets the first ones (as released).
        """
        check_choice("reduction", str(reduction), tuple(map(str, DELETED)))
        left = [TOKENS - sum(DELETED[reduction][:layer]) for layer in range(1, min(depth, 32))]
        options = TokenOptions(protect_predicting_tokens=False)
        return cls.from_preset(options, fields, schedule=tuple(enumerate(left, 1)))

    @classmethod
    def observer(cls) -> Observer:
        return AttentionObserver()

    def calibration(self) -> Calibration | None:
        return None if self.table is None else read(self.table, "fitprune", "table")

    def schedule_at_depth(self, depth: int) -> Schedule:
        lines = self._lines(depth)
        return tuple(enumerate(lines[len(lines) // 2][1:], 1))

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        check_budget_or_fields(self, budget, self.schedule is not None, "schedule=")
        if budget is None:
            return super().plan(tokens, depth, None)
        lines, target = self._lines(depth), target_mean(budget, tokens)
        if target >= tokens:
            return plan_keep_all(tokens, depth)

        def counts(share: float) -> tuple[int, ...]:
            position = (1 - share) * (len(lines) - 1)
            number = min(int(position), len(lines) - 2)
            between = (a + (b - a) * (position - number) for a, b in zip(lines[number], lines[number + 1], strict=True))
            return tuple(count_of(max(0.0, min(1.0, x)), tokens) for x in between)

        if not mean_within(counts(0.0), target):
            raise infeasible_budget(self.name, target, tokens / depth, tokens, "its first layer runs at full width")
        return SpanPlan(tokens, tokens, 0, counts(largest_fraction(lambda x: mean_within(counts(x), target))))

    def _lines(self, depth: int) -> list[Curve]:
        """Curves of tokens per layer, from the full model to a decoder whose first layer alone has visual tokens."""
        stored = self.calibration()
        if stored is None:
            lines = [stretched(released(reduction), depth) for reduction in DELETED]
        else:
            lines = [tuple(line) for line in stored.data["curves"]]
            if len(lines[0]) != depth:
                raise ValueError(
                    f"table={self.table!r} was made for a decoder of {len(lines[0])} layers, this one has {depth}: {stored.advice}"
                )
        return [(1.0,) * depth, *lines, (1.0, *(0.0,) * (depth - 1))]

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(score_heads="max")

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return top(view.require(Input.SCORES) * view.require(Input.VISUAL_SELF_ATTENTION), view.valid, view.num_keep)


@dataclass(frozen=True)
class AttentionObserver(Observer):
    """Record the attention that every token receives in every layer, and fit a curve to each share of the tokens (arXiv
    2409.10197, section 3).
    """

    score_layer_offset = 1
    requires = frozenset({Input.SCORES, Input.VISUAL_SELF_ATTENTION})

    def scoring_rules(self) -> ScoringRules:
        return ScoringRules(score_heads="max")

    def extra_stages(self, depth: int) -> frozenset[int]:
        return frozenset(range(1, depth))

    def observe(self, view: DecoderView) -> list[Tensor]:
        both = torch.stack([view.require(Input.SCORES), view.require(Input.VISUAL_SELF_ATTENTION)], 1).float().cpu()
        return [row[:, :there] for row, (there, _) in zip(both, view.host_counts, strict=True)]

    def result(self, depth: int) -> dict[str, Any]:
        notes = self.observations.entries
        calls = (zip(*notes[first : first + depth - 1], strict=True) for first in range(0, len(notes), depth - 1))
        pictures = [tuple(torch.stack(layers, 1)) for call in calls for layers in call if layers[0].shape[1]]
        lines = [fitted(pictures, share) for share in SHARES]
        return {
            "shares": SHARES,
            "curves": [[min(above) for above in zip(*lines[: n + 1], strict=True)] for n in range(len(lines))],
        }
