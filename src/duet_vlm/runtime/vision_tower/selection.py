"""The selection of a method in the vision tower, checked, with the size of each kept unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.merge import BLOCK, in_stretches, sizes_of, weighed_means
from duet_vlm.ops.ragged import gather_rows, pack_right, upload
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.vision_tower import Grid, MergePairs, TowerReducer, TowerView
from duet_vlm.runtime.validation import check_merge_pairs, check_units


@dataclass(frozen=True)
class PatchSelection:
    """Units that continue, as positions in the method's view.

    Attributes
    ----------
    index, valid : Tensor
        [P, K] in the method's order.
    size : Tensor
        [P, K] float32, how many units each represents.
    counts : tuple of int
        Units of each picture.
    pooled : tuple of int
        Those of them that are pooled context: they represent dropped units and are unused after the tower.
    unread : Tensor
        [P, K] bool, pooled context.
    wrong : Tensor
        0-dim code of what the method returned (runtime/validation.py).
    into : Tensor or None
        [P, U] target of each unit, where units are merged.
    """

    index: Tensor
    valid: Tensor
    size: Tensor
    counts: tuple[int, ...]
    pooled: tuple[int, ...]
    unread: Tensor
    wrong: Tensor
    into: Tensor | None

    def entering(self, units: Tensor) -> Tensor:
        """Rows that enter the first block [P, K, C], of those of all units [P, U, C]."""
        if self.into is None:
            return gather_rows(units, self.index)
        return weighed_means(units, torch.ones_like(self.into, dtype=torch.float32), self.into, self.index)


def select_patches(
    tower: TowerReducer, patches: Tensor, valid: Tensor, counts: Sequence[int], grids: Sequence[Grid], uses_size_bias: bool,
    pixels: Tensor | None = None, previous_picture: tuple[int, ...] = (),
) -> PatchSelection:  # fmt: skip
    """The selection of ``tower`` before the blocks.

    Parameters
    ----------
    patches : Tensor
        [P, U, c, D] patch embeddings of the c patches of each unit, without position.
    valid : Tensor
        [P, U, c] bool, False for padding.
    counts : sequence of int
        Units of each picture that are to be kept; empty where a threshold decides.
    uses_size_bias : bool
        Kept units represent dropped ones in the attention.
    """
    mean = mean_of(patches, valid)
    unit_valid = valid.any(2)
    signals = {
        "contrast": patch_contrast(patches, mean, valid) if Input.PATCH_CONTRAST in tower.requires else None,
        "pixels": pixels,
    }
    unit_index = torch.arange(unit_valid.shape[1], device=unit_valid.device).expand(unit_valid.shape)
    metric = patches.mean(2, dtype=torch.float32) - mean[:, 0]
    return apply_selection(
        tower, unit_valid, counts, metric, unit_valid.float(), uses_size_bias, grids=tuple(grids), previous_picture=previous_picture,
        unit_index=unit_index, **signals,
    )  # fmt: skip


def apply_selection(
    tower: TowerReducer,
    valid: Tensor,
    counts: Sequence[int],
    metric: Tensor | None,
    size: Tensor,
    uses_size_bias: bool,
    **view_fields: Any,
) -> PatchSelection:
    """The selection of ``tower`` among the ``valid`` [P, U] units.

    ``size`` [P, U] is how many units each represents, ``metric`` [P, U, d] measures similarity, ``view_fields`` are
    further fields of the method's view.
    """
    unit_index = view_fields["unit_index"]
    protected = valid & (unit_index == unit_index.masked_fill(~valid, -1).amax(1, keepdim=True))
    protected = protected & tower.options.protect_predicting_tokens  # its token may have to predict
    selectable = valid & ~protected
    keep = (upload(counts, valid.device) if counts else valid.sum(1)) - protected.sum(1)
    view = TowerView(
        selectable,
        keep,
        tuple(n - tower.options.protect_predicting_tokens for n in counts),
        **view_fields,
        method=tower.name,
    )
    result = tower.keep_patches(view)
    positions = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    into = None
    order = positions
    if isinstance(result, MergePairs):
        if not view.after:
            raise ValueError(
                f"{tower.name}.keep_patches returned who joins whom in front of the blocks: units join others behind a block's attention only"
            )
        into, mask, invalid_code = check_merge_pairs(tower, result, view)
        order = positions if result.order is None else result.order
    else:
        mask, invalid_code = check_units(tower, result, view)
    mask = mask | protected
    counts = tuple(counts) or tuple(mask.sum(1).tolist())
    unread = torch.zeros_like(mask)
    pooled = (0,) * len(counts)
    if tower.options.pooled_context_tokens:
        pooled = tuple(
            tower.pooled_features(high * wide, n) for (high, wide), n in zip(view.grids, counts, strict=True)
        )
        groups, dropped = upload(pooled, valid.device), valid & ~mask
        into = in_stretches(dropped, groups)
        unread = unread.scatter(1, into, dropped & (groups > 0)[:, None])
        counts = tuple(map(sum, zip(counts, pooled, strict=True)))
    index, index_valid = pack_right((mask | unread).gather(1, order), max(counts))
    index = order.gather(1, index)
    if into is not None:
        size = torch.zeros_like(size).scatter_add(1, into, size * valid).gather(1, index) * index_valid
    elif uses_size_bias:
        assert metric is not None
        size = sizes_of(metric, mask | ~valid, index, index_valid, size)
    else:
        size = size.gather(1, index) * index_valid
    return PatchSelection(
        index=index,
        valid=index_valid,
        size=size,
        counts=counts,
        pooled=pooled,
        unread=unread.gather(1, index),
        wrong=invalid_code,
        into=into,
    )


def mean_of(patches: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid patches: [P, U, c, D] -> [P, 1, 1, D] float32."""
    blocks = zip(patches.split(BLOCK, 1), valid.split(BLOCK, 1), strict=True)
    total = sum((block.float() * block_valid[..., None]).sum((1, 2), keepdim=True) for block, block_valid in blocks)
    return total / valid.sum((1, 2))[:, None, None, None]


def patch_contrast(patches: Tensor, mean: Tensor, valid: Tensor) -> Tensor:
    """Distance of patches from their picture's mean [P, 1, 1, D], averaged over a unit, 0 for padding.

    [P, U, c, D] -> [P, U] float32.
    """
    blocks = zip(patches.split(BLOCK, 1), valid.split(BLOCK, 1), strict=True)  # block by block, to bound memory
    return torch.cat([((block.float() - mean).norm(dim=-1) * block_valid).mean(2) for block, block_valid in blocks], 1)
