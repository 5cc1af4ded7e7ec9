"""Motion: send through the tower what differs from what a clip usually shows there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import TowerReducer, TowerView


@register("motion")
@dataclass(frozen=True)
class Motion(TowerReducer):
    """Of a clip, the units whose pixels lie farthest from their median over all steps of time at that place (mean absolute difference), equally
    many of every frame; where nothing moves, those with the most contrast. Of an image, those with the most contrast (see ``contrast``).

    What stands still is seen in every frame's contrast only, and leaves first where the rest moves. Background subtraction by the median is
    old; that it says what a vision tower may leave out is our own rule.
    """

    paper = "Ours: background subtraction by the median, in front of a vision tower"
    summary = "only patches that differ from what a clip usually shows there go through the vision tower; images by contrast"
    requires = frozenset({Input.PATCH_CONTRAST, Input.PIXELS})

    proportional_attention: bool = False

    def keep_patches(self, view: TowerView) -> Tensor:
        contrast = view.require(Input.PATCH_CONTRAST)
        scores = contrast / contrast.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        starts = [number for number, before in enumerate(view.previous_picture) if before < 0]
        for first, end in zip(starts, [*starts[1:], len(view.previous_picture)], strict=True):
            if end - first < 2:
                continue
            pixels = view.require(Input.PIXELS)[first:end, :, 0].float()
            change = (pixels - pixels.median(0).values).abs().mean(-1)
            scores[first:end] = 0.05 * scores[first:end] + change / change.amax().clamp(min=torch.finfo(torch.float32).tiny)
        return top(scores, view.valid, view.num_keep)
