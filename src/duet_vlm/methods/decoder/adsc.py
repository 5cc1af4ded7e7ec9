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
    """ADSC (arXiv 2602.12618): strided drops inside the decoder, without any score.

    At a few decoder layers every second visual token is kept. The last token of each stride is the one kept: under
    causal attention it has attended to the others of its stride, and a decoder trained with these drops learns to
    collect there the information that it needs. Without training the method is the uniform baseline along a schedule.

    Parameters: those of ``ScheduledReducer``. By default half of the tokens are dropped before each of layers 8, 16 and
    24 of 32.

    Cost: none beyond the gathers. Needs: no input of the vision tower and no text. For training: ``anneal_from`` in the
    trainer's settings falls from easy to hard budgets (the paper's curriculum over ratios is not published).

    From the paper's abstract: no code is public. Chosen here: the layers and the share, strides in raster order (a
    stride may cover two adjacent images where ``multi_image`` is "joint"), kept positions.
    """

    paper = "ADSC, arXiv 2602.12618"
    summary = "strided drops in stages inside the decoder, for training with them (untrained: the uniform baseline along a schedule)"
    paper_schedule: ClassVar[Schedule] = ((8, 0.5), (16, 0.25), (24, 0.125))

    def prune_tokens(self, view: DecoderView) -> Tensor:
        return spaced_picks(view.valid, view.num_keep)
