"""EViT: drop the least attended patches at three depths of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import TowerReducer, TowerView, check_after


@register("evit")
@dataclass(frozen=True)
class EViT(TowerReducer):
    """EViT (ICLR 2022, arXiv 2202.07800): attention-ranked drops at three depths of the vision tower.

    At a third, a half and three quarters of the tower's depth, the units (patches, or groups of patches that later form
    one token) with the most attention from the CLS token are kept; in towers without one, from all patches. Each step
    keeps the same share.

    Parameters
    ----------
    after : tuple of int
        Numbers of blocks after whose attention units are dropped; empty: 4, 7 and 10 of 12, in towers of other depths
        at the same shares.

    Cost: one query row of attention (CLS) or column sums, per step. Needs: attention of three tower blocks; no text.

    Differences from the authors' code: dropped units are not fused into one extra row (fusing changed nothing where we
    measured it, and no model here was trained with such a row); each is counted with the survivor that it resembles
    instead (``proportional_attention``). Ties to the lower index, rows in raster order. The paper trains with the
    drops; here nothing is trained.
    """

    paper = "EViT, ICLR 2022, arXiv 2202.07800"
    summary = "in three steps the patches leave the vision tower that its own attention looks at least"
    requires = frozenset({Input.BLOCK_ATTENTION})

    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_after("after", self.after)

    def boundaries(self, depth: int) -> Sequence[int]:
        return self.after or sorted({max(1, k * (depth + 1) // 12) for k in (4, 7, 10)} & set(range(1, depth + 1)))

    def keep_patches(self, view: TowerView) -> Tensor:
        return top(view.require(Input.BLOCK_ATTENTION), view.valid, view.num_keep)
