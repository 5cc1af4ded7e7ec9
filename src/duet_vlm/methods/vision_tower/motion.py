"""Motion: keep the patches that differ from the video's median at their place, before the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import TowerReducer, TowerView


@register("motion")
@dataclass(frozen=True)
class Motion(TowerReducer):
    """Motion: drop the static background of a video before the vision tower's first block (our own rule).

    In a video, the units (patches, or groups of patches that later form one token) whose pixels are farthest from their
    median over all time steps at that place (mean absolute difference) are kept, equally many in every frame; in a
    static video, those with the most contrast. In an image, those with the most contrast (see ``contrast``). Static
    content is ranked by contrast alone, and dropped first where other content moves. Background subtraction by the
    median is old; using it to choose a vision tower's inputs is our own rule.

    Parameters: those of ``TowerReducer``; ``proportional_attention`` is off by default.

    Cost: a median over the pixels of a video. Needs: pixels and patch embeddings; no attention and no text.
    """

    paper = "Ours: background subtraction by the median, in front of a vision tower"
    summary = (
        "only patches that differ from what a clip usually shows there go through the vision tower; images by contrast"
    )
    requires = frozenset({Input.PATCH_CONTRAST, Input.PIXELS})

    default_options = TokenOptions(proportional_attention=False)

    def keep_patches(self, view: TowerView) -> Tensor:
        contrast = view.require(Input.PATCH_CONTRAST)
        scores = contrast / contrast.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        starts = [number for number, before in enumerate(view.previous_picture) if before < 0]
        for first, end in zip(starts, [*starts[1:], len(view.previous_picture)], strict=True):
            if end - first < 2:
                continue
            pixels = view.require(Input.PIXELS)[first:end, :, 0].float()
            change = (pixels - pixels.median(0).values).abs().mean(-1)
            scores[first:end] = 0.05 * scores[first:end] + change / change.amax().clamp(
                min=torch.finfo(torch.float32).tiny
            )
        return top(scores, view.valid, view.num_keep)
