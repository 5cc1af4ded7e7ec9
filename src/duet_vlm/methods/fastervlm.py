"""FasterVLM: keep the vision tokens that the vision tower attends to most, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm.ops.ragged import pack_right
from duet_vlm.ops.select import top
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import EncoderReducer, EncoderView, plan_fixed_count
from duet_vlm.reducers.registry import register


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(EncoderReducer):
    """FasterVLM (arXiv 2412.01818): pruning by CLS attention before the decoder.

    The tokens with the largest attention from the CLS token enter the decoder, all others are dropped.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.

    Cost: one query row of attention (CLS) or blocked column sums of one vision layer. Needs: vision attention. Usable
    in training (the choice carries no gradient).

    Differences from the authors' code (Theia-4869/FasterVLM): kept positions (``official``: as released, compact), any
    batch, ties by index. In towers without a CLS token tokens are ranked by the attention that they receive.
    """

    paper = "FasterVLM, arXiv 2412.01818"
    summary = "keep the vision tokens that the vision encoder attends to most, before the decoder"
    signals = frozenset({"importance"})
    reads_features = False

    keep: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)

    @classmethod
    def official(cls, keep: Keep = 144, **fields: Any) -> FasterVLM:
        """Return the settings of the released LLaVA code: compact positions; ``keep`` patches of each crop."""
        return cls(**{"keep": keep, "positions": "compact", "crops": "per_crop", "protect_predicting_tokens": False, "signal_queries": None} | fields)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        assert view.importance is not None  # promised by ``signals``
        return Selection.keep_only(*pack_right(top(view.importance, view.valid, view.dominant), max(plan.dominant for plan in view.plans)))
