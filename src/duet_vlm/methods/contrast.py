"""Contrast: send through the vision tower what differs from the rest of its picture."""

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
    """The units whose patch embeddings lie farthest from the picture's mean go through the tower, ties to the lower index.

    No attention is needed and no block has run, so all of a unit's cost is saved. What is smoother than its surroundings is lost first: a
    plain thing in foliage, faint print on texture. Our own rule, after PixelPrune (arXiv 2604.00886: choose before the first block), ToMe
    (arXiv 2210.09461: attention biased by the log of sizes) and ToFu (arXiv 2312.01026: early blocks should drop and not average).

    Attributes
    ----------
    ground : float
        The share of those that stay which are taken evenly from the ranks of the rest, so that what leaves is counted with something like it.
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
        spread = [int(self.ground * keep) for keep in view.has_count]
        count = upload(spread, view.num_keep.device)[:, None]
        first = top(contrast, view.valid, view.num_keep - count[:, 0])
        rest = view.valid & ~first
        number = torch.arange(max(spread), device=count.device)
        rank = (2 * number + 1) * rest.sum(1, keepdim=True) // (2 * count).clamp(min=1)
        chosen = ranking(contrast, rest).gather(1, rank.clamp(max=rest.shape[1] - 1))
        return first.scatter_add(1, chosen, number < count) if len(number) else first
