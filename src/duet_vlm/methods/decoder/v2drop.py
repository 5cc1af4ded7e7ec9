"""V2Drop: drop the visual tokens that the last decoder layer changed least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer
from duet_vlm.utils.field_types import check_choice


@register("v2drop")
@dataclass(frozen=True)
class V2Drop(ScheduledReducer):
    """V2Drop (CVPR 2026): a visual token whose hidden state hardly changes contributes little more.

    At each stage the tokens whose hidden states the last layer changed most (L2 distance of its input and output) are
    kept.

    Parameters: those of ``ScheduledReducer``. Its stages are before layers 3, 17 and 22 of 32, and keep 1/2, 1/4 and
    one token (``min_tokens``).

    Cost: three numbers per token and channel, no attention; one copy of the visual tokens' hidden states is kept for a
    layer. Needs: no text. Usable in training (the choice carries no gradient).

    Differences from the authors' code (xuyang-liu16/V2Drop): any image position, batch and depth; text-only prompts of
    any length are not reduced. ``V2Drop.official`` has its counts.
    """

    paper = "V2Drop, CVPR 2026, arXiv 2509.01552"
    summary = "drop in stages inside the decoder what the last layer changed least"
    paper_schedule: ClassVar[Schedule] = ((3, 0.5), (17, 0.25), (22, 0.0))
    requires = frozenset({Input.HIDDEN_STATES, Input.PREVIOUS_HIDDEN_STATES})

    min_tokens: int = 1

    @classmethod
    def official(cls, model: str = "llava", **fields: Any) -> V2Drop:
        """Return the released counts, relative to the current tokens at each stage: "llava" or "qwen2_vl"."""
        check_choice("model", model, ("llava", "qwen2_vl"))
        schedule = ((3, 0.5), (17, 0.5), (22, 0.0)) if model == "llava" else ((3, 0.25), (16, 0.05), (22, 0.0))
        options = TokenOptions(protect_predicting_tokens=False)
        return cls.from_preset(options, fields, schedule=schedule, relative="current", rounding="int")

    def prune_tokens(self, view: DecoderView) -> Tensor:
        moved = (view.require(Input.HIDDEN_STATES).float() - view.require(Input.PREVIOUS_HIDDEN_STATES).float()).norm(
            dim=-1
        )
        return top(moved, view.valid, view.num_keep)
