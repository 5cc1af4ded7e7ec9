"""ADSC: strided drops inside the decoder, for a model that is trained with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from duet_vlm.ops.select import spaced_picks
from duet_vlm.planning.budget import Schedule
from duet_vlm.reducers.decoder import DecoderView
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.scheduled import ScheduledReducer


@register("adsc")
@dataclass(frozen=True)
class Adsc(ScheduledReducer):
    """ADSC (arXiv 2602.12618), from its abstract: no code is public. No score at all: at a few layers of the decoder every second token goes on.

    The last token of each stride stays: under causal attention it has seen the others, and a decoder that is trained with the drops learns to move
    what it needs there. Without training it is the uniform baseline along a schedule.

    Parameters as ``ScheduledReducer``: halved before layers 8, 16 and 24 of 32.

    Cost: nothing. Needs nothing of the tower or of the text. For training: ``anneal_from`` in the trainer's settings falls from easy to hard budgets
    (the paper's curriculum over ratios is not published).

    Chosen here: the layers and the share, strides in raster order (a stride of images side by side where ``share`` is "joint"), kept positions.
    """

    paper = "ADSC, arXiv 2602.12618"
    summary = "strided drops in stages inside the decoder, for training with them (untrained: the uniform baseline along a schedule)"
    paper_schedule: ClassVar[Schedule] = ((8, 0.5), (16, 0.25), (24, 0.125))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return spaced_picks(view.valid, view.num_keep)
