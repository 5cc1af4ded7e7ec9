"""RLT: drop the patches of a video that did not change since the frame before, before the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.ops.select import spaced_picks
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.options import TokenOptions
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import ThresholdReducer, TowerView, check_threshold
from duet_vlm.utils.field_types import check_choice


@register("rlt")
@dataclass(frozen=True)
class RLT(ThresholdReducer):
    """Run-Length Tokenization (NeurIPS 2024, arXiv 2411.05222), without its length embedding.

    The first time step of a video is kept whole, and of each later one the units (patches, or groups of patches that
    later form one token) that changed: mean absolute difference of pixels above a threshold. Images are kept whole. In
    steps of several frames, the last frame of a step is compared with the first frame of its reference, as in the
    released code.

    Parameters
    ----------
    threshold : float
        Mean absolute difference of pixels, in the scale of the processor's output.
    against : str
        Reference of a unit: the last kept one at its place ("kept", so that a slow drift is noticed), or the one of the
        step before ("before", as in the released code).

    With ``keep``, or a budget, the units that changed most since the step before are kept, equally many in every frame;
    the first step is compared with the second. Images, which show no change, are then thinned evenly.

    Cost: one difference per pixel. Needs: pixels; no attention and no text.
    """

    paper = "RLT, NeurIPS 2024, arXiv 2411.05222"
    summary = "patches of a clip that did not change since the frame before do not go through the vision tower"
    requires = frozenset({Input.PIXELS})

    default_options = TokenOptions(proportional_attention=False)
    threshold: float = 0.1
    against: str = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        check_choice("against", self.against, ("kept", "before"))

    def keep_patches(self, view: TowerView) -> Tensor:
        alone = upload([n < 0 for n in view.previous_picture], view.valid.device)
        alone = alone & ~upload([n in view.previous_picture for n in range(len(view.previous_picture))], alone.device)
        return (
            torch.where(alone[:, None], spaced_picks(view.valid, view.num_keep), super().keep_patches(view))
            if view.host_num_keep
            else super().keep_patches(view)
        )

    def scores(self, view: TowerView) -> Tensor:
        pixels = view.require(Input.PIXELS)
        scores = torch.full(view.valid.shape, torch.inf, device=view.valid.device)
        reference = pixels[:, :, 0].float().clone()
        for picture, before in enumerate(view.previous_picture):
            if before < 0:
                continue
            change = (pixels[picture, :, -1].float() - reference[before]).abs().mean(-1)
            scores[picture] = change - self.threshold
            if view.host_num_keep and view.previous_picture[before] < 0:
                scores[before] = scores[picture]
            if not view.host_num_keep and self.against == "kept":
                reference[picture] = torch.where(
                    (change > self.threshold)[:, None], reference[picture], reference[before]
                )
        return scores
