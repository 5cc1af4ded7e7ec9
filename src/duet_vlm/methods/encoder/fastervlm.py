"""FasterVLM: keep the vision tokens that the vision tower attends to most, before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from duet_vlm.planning.budget import Keep
from duet_vlm.reducers.encoder import EncoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.score import ScoreReducer


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(ScoreReducer):
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
    requires = frozenset({Input.IMPORTANCE})

    @classmethod
    def official(cls, keep: Keep = 144, **fields: Any) -> FasterVLM:
        """Return the settings of the released LLaVA code: compact positions; ``keep`` patches of each crop."""
        options = TokenOptions(
            positions="compact", crops="per_crop", protect_predicting_tokens=False, signal_queries=None
        )
        return cls.from_preset(options, fields, keep=keep)

    def score(self, view: EncoderView) -> Tensor:
        return view.require(Input.IMPORTANCE)
