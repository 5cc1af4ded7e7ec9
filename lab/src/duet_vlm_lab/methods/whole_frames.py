"""Whole frames, evenly spaced: what a user of video does first to save tokens. A reference for tables, no method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from duet_vlm import EncoderReducer, EncoderView, Selection, SpanPlan
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions


@dataclass(frozen=True)
class WholeFrames(EncoderReducer):
    """``frames`` of every ``of`` frames stay as they are, at the position numbers that they had; the rest leave at the
    decoder's entry.

    Has no budget of its own: a count of frames can be no finer than a frame.
    """

    name: ClassVar[str] = "whole_frames"
    reference = True
    paper = "reference"
    summary = "whole frames, evenly spaced"
    requires = frozenset({Input.FEATURES})
    compares_frames = True

    default_options = TokenOptions(crops="joint")
    frames: int = 4
    of: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.frames <= self.of:
            raise ValueError(f"frames={self.frames} of={self.of}: keep at least 1 frame and at most all of them")
        if self.options.crops != "joint":
            raise ValueError(
                f"whole_frames chooses among the frames of a clip: use crops='joint', not {self.options.crops!r}"
            )

    def plan(self, tokens: int, depth: int, budget: Any) -> SpanPlan:
        if budget is not None:
            raise ValueError(
                f"whole_frames takes a count of frames and no budget, got {budget!r}: give frames= and of="
            )
        if tokens % self.of:
            raise ValueError(f"a clip of {tokens} tokens is not made of {self.of} equal frames: give of=")
        kept = tokens // self.of * self.frames
        return SpanPlan(tokens, kept, 0, (kept,) * depth)

    def select_tokens(self, view: EncoderView) -> Selection:
        place = torch.arange(view.valid.shape[1], device=view.valid.device)
        number = place * self.of // view.valid.sum(1, keepdim=True).clamp(min=1)  # all frames have equally many rows
        chosen = (torch.arange(self.frames, device=place.device) * 2 + 1) * self.of // (2 * self.frames)
        stays = (number[..., None] == chosen).any(-1) & view.valid
        order = stays.int().argsort(dim=1, descending=True, stable=True)[:, : max(plan.dominant for plan in view.plans)]
        return Selection.keep_only(order, stays.gather(1, order))
