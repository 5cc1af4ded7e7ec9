"""Contrast: keep the patches that differ most from the rest of their image, before the vision tower's first block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.ops.select import ranking, top
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import TowerReducer, TowerView


@register("contrast")
@dataclass(frozen=True)
class Contrast(TowerReducer):
    """Contrast: drop low-contrast patches before the vision tower's first block (our own rule).

    The units (patches, or groups of patches that later form one token) whose embeddings are farthest from the image's
    mean are kept; ties go to the lower index. No block has run yet, so the whole cost of a dropped unit in the tower is
    saved. Details that are smoother than their surroundings are lost first: a plain object in foliage, faint print on
    texture. After PixelPrune (arXiv 2604.00886: choose before the first block), ToMe (arXiv 2210.09461: attention
    biased by the log of sizes) and ToFu (arXiv 2312.01026: early blocks should drop and not average).

    Parameters
    ----------
    ground : float
        Share of the kept units, in [0, 1], that is taken evenly over the ranks of the others, so that a dropped unit is
        counted with a similar survivor (``proportional_attention``).

    Cost: one distance per patch embedding. Needs: patch embeddings; no attention and no text.
    """

    paper = "Ours, after PixelPrune (arXiv 2604.00886) and ToMe (arXiv 2210.09461)"
    summary = "only patches that differ from the rest of the picture go through the vision tower"
    requires = frozenset({Input.PATCH_CONTRAST})

    ground: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ground <= 1:
            raise ValueError(f"ground={self.ground}: a share of the patches that stay, from 0 to 1")

    def keep_patches(self, view: TowerView) -> Tensor:
        contrast = view.require(Input.PATCH_CONTRAST)
        spread = [int(self.ground * keep) for keep in view.host_num_keep]
        count = upload(spread, view.num_keep.device)[:, None]
        first = top(contrast, view.valid, view.num_keep - count[:, 0])
        rest = view.valid & ~first
        number = torch.arange(max(spread), device=count.device)
        rank = (2 * number + 1) * rest.sum(1, keepdim=True) // (2 * count).clamp(min=1)
        chosen = ranking(contrast, rest).gather(1, rank.clamp(max=rest.shape[1] - 1))
        return first.scatter_add(1, chosen, number < count) if len(number) else first
