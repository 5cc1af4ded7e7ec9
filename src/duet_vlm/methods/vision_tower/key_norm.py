"""Key norm: keep the patches with short keys after the vision tower's first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from duet_vlm.ops.select import top
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import TowerReducer, TowerView, check_after


@register("key_norm")
@dataclass(frozen=True)
class KeyNorm(TowerReducer):
    """Key norm: drop the patches with long keys after an early tower block (our own rule).

    The units (patches, or groups of patches that later form one token) with the shortest keys of one block (norm of a
    head's key, mean over heads) are kept; ties go to the lower index. In our measurements it is the one score of an
    early block that separates objects from background; attention is hardly informative so early. The norm of keys as a
    score is after arXiv 2406.11430, where it ranks a decoder's cache.

    Parameters
    ----------
    after : int
        Number of blocks after whose attention units are dropped, before the MLP of the last of them.

    Cost: one norm per patch and head. Needs: keys of one tower block; no text.
    """

    paper = "Ours; the norm of keys as a score after arXiv 2406.11430 (there, of a decoder's cache)"
    summary = "only patches with short keys behind the first block's attention go through the rest of the vision tower"
    requires = frozenset({Input.KEY_NORM})

    after: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_after("after", (self.after,))

    def boundaries(self, depth: int) -> Sequence[int]:
        return (self.after,)

    def keep_patches(self, view: TowerView) -> Tensor:
        return top(-view.require(Input.KEY_NORM), view.valid, view.num_keep)
