"""EVS: the tokens of a clip that changed since the step before, counted as its released code counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from duet_vlm.methods.frames import Frames
from duet_vlm.planning.budget import Budget, SpanPlan
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.plans import plan_fixed_count
from duet_vlm.reducers.registry import register


@register("evs")
@dataclass(frozen=True)
class EVS(Frames):
    """EVS (Efficient Video Sampling, NVIDIA, arXiv 2510.14624), as vLLM has it: ``frames`` on the rows that the decoder gets.

    Settings, rule and cost are those of ``frames``; behind a point-wise projector instead of in front of it. A fraction of the tokens is the
    truncated float product of the released code (400 tokens at 1 - 0.9 are 39).

    Differences from the released code (vllm-project/vllm, multimodal/evs.py): a budget below one step is met, by tokens spread over the first one
    (released: the whole first step at least); images are thinned (released: left whole); text behind the clip keeps its positions (released: it
    follows the first position of the clip at a distance of the grid's width).
    """

    paper = "EVS (Efficient Video Sampling, NVIDIA), arXiv 2510.14624"
    summary = "keep the tokens of a clip that changed since the frame before, as the decoder gets them; images are thinned evenly"
    requires = frozenset({Input.PROJECTED_FEATURES})

    @classmethod
    def official(cls, pruned: float = 0.5, **fields: Any) -> EVS:
        """The released rule for a share ``pruned`` of the tokens, in [0, 1); give one that leaves the first step."""
        if not 0 <= pruned < 1:
            raise ValueError(f"pruned={pruned}: the share of tokens that leave, in [0, 1)")
        return cls(**{"keep": 1.0 - pruned, "protect_predicting_tokens": False} | fields)

    def plan(self, tokens: int, depth: int, budget: Budget | None) -> SpanPlan:
        return plan_fixed_count(self, self.keep, tokens, depth, budget, "int")
