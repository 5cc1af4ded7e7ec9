"""DivPrune: keep vision tokens that are as unlike each other as can be, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm.ops.greedy import cosine, max_min_diversity
from duet_vlm.ops.ragged import pack_right
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import ROUNDINGS, check_choice
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.plans import plan_fixed_count
from duet_vlm.reducers.registry import register


@register("divprune")
@dataclass(frozen=True)
class DivPrune(EncoderReducer):
    """DivPrune (CVPR 2025).

    Max-min diversity over the projected tokens (distance 1 - cosine): first the token whose nearest neighbour is farthest, then again and
    again the one that is farthest from the nearest chosen token. No attention, no text, no merging, and nothing happens in the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens per span or the fraction of them (the authors' default is 0.098). A budget of n keeps n.
    rounding : str
        How a fraction becomes a count: "floor" or "round" (the released code's: halves to the even number).

    Cost: the projector runs on every token (other methods here project the survivors only), an N x N table of similarities, and per kept
    token one row of it; 4 N^2 bytes. Needs nothing of the vision tower. Usable in training (the choice carries no gradient).

    Differences from the authors' code (vbdi/divprune): kept positions, any batch, several images each on its own, ties by index, a token is never
    named twice. ``official``: rounded counts, compact positions.
    """

    paper = "DivPrune, CVPR 2025"
    summary = "keep projected vision tokens that are least alike (max-min distance) before the decoder"
    requires = frozenset({Input.PROJECTED_FEATURES})

    keep: Keep | None = None
    rounding: str = "floor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        check_choice("rounding", self.rounding, ROUNDINGS)

    @classmethod
    def official(cls, keep: Keep = 0.098, **fields: Any) -> DivPrune:
        """The released LLaVA code: rounded counts, compact positions."""
        return cls(**{"keep": keep, "rounding": "round", "positions": "compact", "protect_predicting_tokens": False} | fields)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget, self.rounding)

    def select_tokens(self, view: EncoderView) -> Selection:
        steps = max(plan.dominant for plan in view.plans)
        chosen = max_min_diversity(cosine(view.require(Input.FEATURES), view.valid), view.valid, view.dominant, steps)
        return Selection.keep_only(*pack_right(chosen, steps))
