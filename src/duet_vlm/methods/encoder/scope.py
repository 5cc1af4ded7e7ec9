"""SCOPE: keep the vision tokens with the best attention-weighted coverage of all others, before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from duet_vlm.ops.greedy import cosine, greedy_coverage
from duet_vlm.reducers.base import check_picks
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer
from duet_vlm.utils.field_types import check_choice


@register("scope")
@dataclass(frozen=True)
class Scope(ScoreReducer):
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

    paper = "SCOPE, NeurIPS 2025, arXiv 2510.24214"
    summary = "keep vision tokens by saliency times gain in coverage, one after the other, before the decoder"
    requires = frozenset({Input.IMPORTANCE, Input.FEATURES})

    alpha: float = 1.0
    combined: str = "multiply"
    picks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be a number of at least 0 (0: coverage alone)")
        check_choice("combined", self.combined, ("multiply", "add"))
        check_picks(self.picks)

    def score(self, view: EncoderView) -> Tensor:
        return view.require(Input.IMPORTANCE) ** self.alpha

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        steps, similarity = max(plan.dominant for plan in view.plans), cosine(view.require(Input.FEATURES), view.valid)
        return greedy_coverage(similarity, scores, view.valid, view.dominant, steps, self.picks, self.combined == "add")
