"""EViT: drop in three steps what the tower's own attention looks at least."""

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
    """EViT (ICLR 2022, arXiv 2202.07800): at a third, a half and three quarters of the tower's depth, the units stay that get the most attention
    from the CLS row, or from all rows where there is none. Each step keeps the same share.

    Attributes
    ----------
    after : tuple of int
        After the attention of how many blocks units leave; empty: 4, 7 and 10 of 12, in towers of other depths at the same shares.

    Differences from the authors' code: units leave without being fused into one extra row (fusing changed nothing where we measured it, and
    no model here was trained with such a row); what leaves is counted with what it resembles instead (``mass``). Ties to the lower index,
    rows in raster order. The paper trains with it; here nothing is trained.
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
