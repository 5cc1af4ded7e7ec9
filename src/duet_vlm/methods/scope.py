"""SCOPE: keep the vision tokens with the best attention-weighted coverage of all others, before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from duet_vlm.ops.greedy import cosine, greedy_coverage
from duet_vlm.ops.ragged import pack_right
from duet_vlm.planning.budget import Budget, Keep, SpanPlan, check_keep
from duet_vlm.planning.tokens import Selection
from duet_vlm.reducers.base import EncoderReducer, EncoderView, check_choice, check_picks, plan_fixed_count
from duet_vlm.reducers.registry import register


@register("scope")
@dataclass(frozen=True)
class Scope(EncoderReducer):
    """SCOPE (NeurIPS 2025, "Saliency-Coverage Oriented Token Pruning"): greedy coverage weighted by saliency.

    Tokens are picked one after the other: the one whose gain in coverage (how much more similar every token becomes to
    its most similar chosen one, cosine of vision features) times its saliency (attention of the vision tower) to the
    power ``alpha`` is largest. Nothing is merged, text plays no part, and nothing happens inside the decoder.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.
    alpha : float
        Exponent of saliency, at least 0: 0 is pure coverage, 1 the released setting.
    combined : str
        "multiply" (the paper's) or "add" gain and saliency.
    picks : int
        Tokens chosen per step (``ops.greedy.greedy_coverage``), at least 1; the paper's rule is 1.

    Cost: one query row of attention (CLS) or blocked column sums of one vision layer, an N x N table of similarities,
    and per kept token one pass over it; 8 N^2 bytes. Needs: vision attention. Usable in training (the choice carries no
    gradient).

    Differences from the authors' code (kinredon/SCOPE): kept positions, any batch, ties by index. In towers without a
    CLS token saliency is the attention that a token receives, summed over the queries of its vision block.
    """

    paper = "SCOPE, NeurIPS 2025"
    summary = "keep vision tokens by saliency times gain in coverage, one after the other, before the decoder"
    signals = frozenset({"importance"})

    keep: Keep | None = None
    alpha: float = 1.0
    combined: str = "multiply"
    picks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            check_keep("keep", self.keep)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be a number of at least 0 (0: coverage alone)")
        check_choice("combined", self.combined, ("multiply", "add"))
        check_picks(self.picks)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget)

    def select_tokens(self, view: EncoderView) -> Selection:
        assert view.importance is not None and view.features is not None  # promised by ``signals``
        steps = max(plan.dominant for plan in view.plans)
        similarity = cosine(view.features, view.valid)
        chosen = greedy_coverage(similarity, view.importance**self.alpha, view.valid, view.dominant, steps, self.picks, self.combined == "add")
        return Selection.keep_only(*pack_right(chosen, steps))
