"""Key norm: send through the rest of the tower what has short keys behind its first block."""

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
    """The units with the shortest keys (length of a head's key, mean over heads) of one block stay, ties to the lower index.

    The one score of an early block that told things from ground where we looked: attention knows little so early.

    Attributes
    ----------
    after : int
        The units that leave do so behind the attention of that many blocks, in front of the last one's MLP.
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
