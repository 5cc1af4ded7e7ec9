"""VisPruner: keep the most attended vision tokens, and the least duplicated of the others, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duet_vlm.ops.duplicates import remove_duplicates
from duet_vlm.ops.greedy import cosine
from duet_vlm.planning.budget import Keep
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(ScoreReducer):
    """VisPruner (ICCV 2025, arXiv 2412.01818 v2): important tokens by CLS attention, then diverse ones by removing
    duplicates.

    A share of the budget goes to the tokens with the largest attention. The others are sorted by falling attention and
    split alternately into two halves (places 0, 2, 4, ... and 1, 3, 5, ...). The ``ROUND`` tokens of the first half
    that resemble a token of the second most (cosine of vision features) are dropped; the rest of the first half, most
    similar first, then the second half, make the next list, until the count is reached. Nothing is merged.

    Parameters
    ----------
    keep : int or float, optional
        Tokens kept per span: a count, or a fraction. A budget of n keeps n.
    important : float
        Share of the kept tokens that is chosen by attention, in [0, 1].

    Cost: one query row of attention (CLS) or blocked column sums of one vision layer, an N x N table of cosines, and
    per ``ROUND`` dropped tokens one pass over a quarter of the remaining table; 8 N^2 bytes. Needs: vision attention.
    Usable in training (the choice carries no gradient).

    Differences from the authors' code (Theia-4869/VisPruner): lists of odd length and last rounds with few tokens work
    (the released code stops with an error), kept positions (``official``: compact), any batch, ties by index. Their
    SigLIP tower ranks by the last layer (``signal_layer=-1``); in towers without a CLS token tokens are ranked by the
    attention that they receive.
    """

    paper = "VisPruner, ICCV 2025, arXiv 2412.01818"
    summary = (
        "keep the most attended vision tokens and, of the others, those that no other resembles, before the decoder"
    )
    requires = frozenset({Input.IMPORTANCE, Input.FEATURES})

    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important={self.important}: a share of the tokens that are kept, in [0, 1]")

    @classmethod
    def official(cls, keep: Keep = 128, important: float = 0.5, **fields: Any) -> VisPruner:
        """Return the settings of the released LLaVA code: compact positions; ``keep`` patches of each crop."""
        options = TokenOptions(
            positions="compact", crops="per_crop", protect_predicting_tokens=False, signal_queries=None
        )
        return cls.from_preset(options, fields, keep=keep, important=important)

    def score(self, view: EncoderView) -> Tensor:
        return view.require(Input.IMPORTANCE)

    def choose(self, scores: Tensor, view: EncoderView) -> Tensor:
        sizes = [(plan.tokens, plan.dominant) for plan in view.plans]
        return remove_duplicates(
            cosine(view.require(Input.FEATURES), view.valid), scores, view.valid, sizes, self.important
        )
