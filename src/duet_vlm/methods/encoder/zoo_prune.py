"""ZOO-Prune: keep dissimilar vision tokens that the projector is sensitive to, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from duet_vlm.ops.greedy import cosine, pairwise_distance
from duet_vlm.ops.saliency import DIRECTIONS, STEP, min_max_scaled, sensitivity
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer


@register("zoo_prune")
@dataclass(frozen=True)
class ZooPrune(ScoreReducer):
    """ZOO-Prune (CVPR 2026, arXiv 2509.24837): zeroth-order sensitivity of the projector, and diversity.

    The sensitivity of a token is the change of its projected features when its vision features move by ``step`` along a
    random direction and back, mean over ``directions``. It is scaled to [0, 1] over an image; then tokens are picked
    one after the other by sensitivity times 1 - the largest cosine to the picked ones (projected features). No
    attention, no text, no merging.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.
    directions : int
        Number of random directions, at least 1, the same for every token.
    step : float
        Length of a step, above 0.
    seed : int
        Seed of the directions; nothing else is random.

    Cost: the projector runs 2 ``directions`` times more on every token, in float32 (1.6 TFLOP for 576 tokens of
    LLaVA-1.5-7B: a fifth of its full prefill; fewer directions cost less), an N x N table of cosines, and per kept
    token one row of it; 4 N^2 bytes. Needs: a projector that can be called again. Usable in training (the choice
    carries no gradient).

    From the paper: no code was available. Chosen here: the same directions for all tokens, cosines of projected
    features, the first token by sensitivity alone. A token that a merger makes of several patches moves with all of
    them.
    """

    paper = "ZOO-Prune, CVPR 2026, arXiv 2509.24837"
    summary = "keep vision tokens that the projector is sensitive to and that are unlike each other, before the decoder"
    requires = frozenset({Input.PROJECTED_FEATURES, Input.PROJECTOR})

    directions: int = DIRECTIONS
    step: float = STEP
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions < 1:
            raise ValueError(f"directions={self.directions}: random directions, at least 1")
        if not 0 < self.step < float("inf"):
            raise ValueError(f"step={self.step}: the length of a move, above 0")

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        steps = max(plan.dominant for plan in view.plans)
        return pairwise_distance(
            cosine(view.require(Input.FEATURES), view.valid), scores, view.valid, view.dominant, steps
        )

    def score(self, view: EncoderView) -> Tensor:
        """Sensitivity scaled to [0, 1] over the tokens of each span, 0 for padding: [B, N]."""
        return min_max_scaled(self.sensitivity(view), view.valid)

    def sensitivity(self, view: EncoderView) -> Tensor:
        """Mean distance of the two perturbed projections over directions, per unit of step length: [B, N]."""
        return sensitivity(view.require(Input.PROJECTOR), self.directions, self.step, self.seed)
