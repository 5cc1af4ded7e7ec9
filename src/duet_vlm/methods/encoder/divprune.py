"""DivPrune: keep the most diverse vision tokens, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm.ops.greedy import cosine, max_min_diversity
from duet_vlm.ops.ragged import pack_right
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import ROUNDINGS
from duet_vlm.reducers.encoder import EncoderReducer, EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.utils.field_types import check_choice


@register("divprune")
@dataclass(frozen=True)
class DivPrune(EncoderReducer):
    """DivPrune (CVPR 2025): max-min diversity over the projected tokens.

    The first token is the one whose nearest neighbour is farthest (distance 1 - cosine); then the token that is
    farthest from its nearest chosen token is picked, one after the other. No attention, no text, no merging, and
    nothing happens inside the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction (the authors' default is 0.098). A budget of n keeps n.
    rounding : str
        Rounding of a fraction to a count: "floor" or "round" (released code: halves to the even number).

    Cost: the projector runs on every token (other methods here project the survivors only), an N x N table of
    similarities, and per kept token one row of it; 4 N^2 bytes. Needs: no input of the vision tower beyond features.
    Usable in training (the choice carries no gradient).

    Differences from the authors' code (vbdi/divprune): kept positions, any batch, each image separately, ties by index,
    no token is chosen twice. ``official``: rounded counts, compact positions.
    """

    paper = "DivPrune, CVPR 2025, arXiv 2503.02175"
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
        """Return the settings of the released LLaVA code: rounded counts, compact positions."""
        options = TokenOptions(positions="compact", protect_predicting_tokens=False)
        return cls.from_preset(options, fields, keep=keep, rounding="round")

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget, self.rounding)

    def select_tokens(self, view: EncoderView) -> Selection:
        steps = max(plan.dominant for plan in view.plans)
        chosen = max_min_diversity(cosine(view.require(Input.FEATURES), view.valid), view.valid, view.dominant, steps)
        return Selection.keep_only(*pack_right(chosen, steps))
