"""ToMe inside the vision tower: merge the most similar patches in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from duet_vlm.ops.merge import matched
from duet_vlm.ops.ragged import gather_rows, pack_right
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import MergePairs, TowerReducer, TowerView
from duet_vlm.utils.field_types import check_choice


@register("tome_tower")
@dataclass(frozen=True)
class ToMeTower(TowerReducer):
    """Token Merging (ICLR 2023, arXiv 2210.09461) inside the vision tower: in every block, between attention and MLP.

    Bipartite soft matching: units (patches, or groups of patches that later form one token) are split alternately into
    sources and targets, each source is matched with the target that it resembles most (cosine of mean keys of that
    block), and the most similar pairs are merged to a mean weighted by size, the number of units merged into each.
    Later attention is weighted by size as well (``proportional_attention``, as in the paper). At most half of the units
    can be merged in one block.

    Parameters
    ----------
    shares : tuple of int
        Numbers of units merged in each block, first block first: used in proportion, and exactly if they add up to the
        required number. Empty: equal shares in all blocks up to the one whose output is used.
    order : str
        Order of the units that is split in the next block: "raster", or that of the released code ("released": unmerged
        sources, most similar first (in their old order in towers with a CLS token), then targets).

    Cost: in each block a quarter of a table of all pairs of units, in float32. Needs: keys of every tower block; no
    text.

    Differences from the authors' code (facebookresearch/ToMe): a merged unit has the position of its target, in raster
    order unless ``order`` is "released"; distillation tokens are not supported.
    """

    paper = "ToMe, ICLR 2023, arXiv 2210.09461"
    summary = "in every block of the vision tower, merge the patches that resemble each other most"
    requires = frozenset({Input.BLOCK_KEYS})

    shares: tuple[int, ...] = ()
    order: str = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ("raster", "released"))
        if self.shares and (min(self.shares) < 0 or sum(self.shares) == 0):
            raise ValueError(f"shares={self.shares}: numbers of 0 or more, not all 0")

    def boundaries(self, depth: int) -> Sequence[int]:
        return range(1, (len(self.shares) or depth) + 1)

    @property
    def least(self) -> int:
        """Smallest number of units: the last unit, which may have to predict text, is never merged, and all others
        become one at least.
        """
        return 1 + self.options.protect_predicting_tokens

    def stage_counts(self, units: int, left: int, depth: int) -> Sequence[int]:
        shares = self.shares or (1,) * depth
        counts, here = [], units
        for done in accumulate(shares):
            wanted = units - (units - left) * done // sum(shares)
            here = min(here, max(wanted, here - here // 2, self.least))
            counts.append(here)
        if here > left:
            raise ValueError(
                f"{self.name}: {left} of {units} units cannot be reached, {here} are left when at most half of them leave in a block: raise keep, or "
                "give other shares"
            )
        return counts

    def merge_pairs(self, units: int, left: int) -> int:
        return (units - units // 2) * (units // 2)

    def keep_patches(self, view: TowerView) -> MergePairs:
        column = torch.arange(view.valid.shape[1], device=view.valid.device).expand(view.valid.shape)
        index, real = pack_right(view.valid, column.shape[1])
        keys, there = (
            nn.functional.pad(gather_rows(view.require(Input.BLOCK_KEYS), index), (0, 0, view.num_cls, 0)),
            nn.functional.pad(real, (view.num_cls, 0), value=True),
        )
        source, target = matched(keys, there, view.num_cls)
        leaves = torch.arange(source.shape[1], device=column.device) < (view.valid.sum(1) - view.num_keep)[:, None]
        everyone = torch.arange(keys.shape[1], device=column.device).expand(there.shape)
        joined = everyone.scatter(1, source, torch.where(leaves, target, source))[:, view.num_cls :] - view.num_cls
        into = column.scatter(1, index, index.gather(1, joined))
        if self.order == "raster":
            return MergePairs(into)
        looked = source if view.num_cls == 0 else source.sort(1).values
        order = torch.cat([looked, everyone[:, 1::2]], 1)
        order = order[order >= view.num_cls].view(len(order), -1) - view.num_cls
        return MergePairs(into, index.gather(1, order))
