"""Contrast: send through the vision tower what differs from the rest of its picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.registry import register
from duet_vlm.tower import TowerReducer, TowerView


@register("contrast")
@dataclass(frozen=True)
class Contrast(TowerReducer):
    """The units whose patch embeddings lie farthest from the picture's mean go through the tower, ties to the lower index.

    No attention is needed and no block has run, so all of a unit's cost is saved. What is smoother than its surroundings is lost first: a
    plain thing in foliage, faint print on texture. Our own rule, after PixelPrune (arXiv 2604.00886: choose before the first block), ToMe
    (arXiv 2210.09461: attention biased by the log of sizes) and ToFu (arXiv 2312.01026: early blocks should drop and not average).
    """

    paper = "Ours, after PixelPrune (arXiv 2604.00886) and ToMe (arXiv 2210.09461)"
    summary = "only patches that differ from the rest of the picture go through the vision tower"
    tower_signals = frozenset({"contrast"})

    def stay(self, view: TowerView) -> Tensor:
        assert view.contrast is not None  # promised by ``tower_signals``
        return top(view.contrast, view.valid, view.keep)
