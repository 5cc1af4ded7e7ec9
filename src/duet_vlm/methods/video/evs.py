"""EVS: keep the tokens of a video that changed since the step before, with the counts of the released code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm.methods.video.frames import Frames
from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.planning.solve import plan_fixed_count
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register


@register("evs")
@dataclass(frozen=True)
class EVS(Frames):
    """EVS (Efficient Video Sampling, NVIDIA, arXiv 2510.14624): ``frames`` on projected tokens, as in vLLM.

    Settings and rule are those of ``frames``, applied after a point-wise projector instead of before it. A fraction of
    the tokens is the truncated float product of the released code (400 tokens at 1 - 0.9 are 39).

    Cost: the projector on every token, and one cosine per token. Needs: frames; no attention and no text.

    Differences from the released code (vllm-project/vllm, multimodal/evs.py): a budget below one step is met by tokens
    evenly spaced over the first step (released: at least the whole first step); images are thinned (released: kept
    whole); text after the video keeps its positions (released: it follows the first position of the video at a distance
    of the grid's width).
    """

    paper = "EVS (Efficient Video Sampling, NVIDIA), arXiv 2510.14624"
    summary = "keep the tokens of a clip that changed since the frame before, as the decoder gets them; images are thinned evenly"
    requires = frozenset({Input.PROJECTED_FEATURES})

    @classmethod
    def official(cls, pruned: float = 0.5, **fields: Any) -> EVS:
        """Return the settings of the released rule for a share ``pruned`` of the tokens, in [0, 1); choose one that
        keeps the first step.
        """
        if not 0 <= pruned < 1:
            raise ValueError(f"pruned={pruned}: the share of tokens that leave, in [0, 1)")
        return cls.from_preset(TokenOptions(protect_predicting_tokens=False), fields, keep=1.0 - pruned)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget, "int")
