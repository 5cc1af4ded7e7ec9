"""What a method in the tower chooses, checked, with what each survivor stands for."""

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
    """Units that go on, as places in what the method was shown: ``index`` [P, K] in its order, of which ``valid`` [P, K] are real; ``size``
    [P, K] float32, how many units each stands for; ``counts`` of each picture, of which ``pooled`` are ``unread`` [P, K] and stand for what left;
    ``into`` [P, U]: where units merge, which one each joins."""

    index: Tensor
    valid: Tensor
    size: Tensor
    counts: tuple[int, ...]
    pooled: tuple[int, ...]
    unread: Tensor
    wrong: Tensor
    into: Tensor | None

    def entering(self, units: Tensor) -> Tensor:
        """Of the rows of all units [P, U, C] in front of the blocks those that go on [P, K, C]."""
        if self.into is None:
            return gather_rows(units, self.index)
        return weighed_means(units, torch.ones_like(self.into, dtype=torch.float32), self.into, self.index)


def select_patches(
    tower: TowerReducer, patches: Tensor, real: Tensor, counts: Sequence[int], grids: Sequence[Grid], weighs: bool,
    pixels: Tensor | None = None, before: tuple[int, ...] = (),
) -> PatchSelection:  # fmt: skip
    """What ``tower`` chooses in front of the blocks.

    Parameters
    ----------
    patches : Tensor
        [P, U, c, D] patch embeddings of the c patches of each unit, without position.
    real : Tensor
        [P, U, c] bool, False for padding.
    counts : sequence of int
        Units of each picture that are to be left; empty where a threshold says how many.
    weighs : bool
        Survivors stand for those that leave.
    """
    mean = mean_of(patches, real)
    some = real.any(2)
    signals = {"contrast": patch_contrast(patches, mean, real) if Input.PATCH_CONTRAST in tower.requires else None, "pixels": pixels}
    unit = torch.arange(some.shape[1], device=some.device).expand(some.shape)
    return apply_selection(tower, some, counts, patches.mean(2, dtype=torch.float32) - mean[:, 0], some.float(), weighs, grids=tuple(grids), previous_picture=before,
                  unit_index=unit, **signals)  # fmt: skip


def apply_selection(
    tower: TowerReducer, there: Tensor, counts: Sequence[int], metric: Tensor | None, size: Tensor, weighs: bool, **shown: Any
) -> PatchSelection:
    """What ``tower`` chooses of the units that are ``there`` [P, U], each standing for ``size`` [P, U] of them; ``metric`` [P, U, d] says which
    are alike, ``shown`` what else the method looks at."""
    last = there & (shown["unit_index"] == shown["unit_index"].masked_fill(~there, -1).amax(1, keepdim=True)) & tower.protect_predicting_tokens  # may have to predict
    free = there & ~last
    keep = (upload(counts, there.device) if counts else there.sum(1)) - last.sum(1)
    view = TowerView(free, keep, tuple(n - tower.protect_predicting_tokens for n in counts), **shown, method=tower.name)
    picked, place = tower.keep_patches(view), torch.arange(there.shape[1], device=there.device).expand(there.shape)
    into, order = None, place
    if isinstance(picked, MergePairs):
        if not view.after:
            raise ValueError(f"{tower.name}.keep_patches returned who joins whom in front of the blocks: units join others behind a block's attention only")
        into, mask, wrong = check_merge_pairs(tower, picked, view)
        order = place if picked.order is None else picked.order
    else:
        mask, wrong = check_units(tower, picked, view)
    mask = mask | last
    counts = tuple(counts) or tuple(mask.sum(1).tolist())
    unread, pooled = torch.zeros_like(mask), (0,) * len(counts)
    if tower.pooled_context_tokens:
        pooled = tuple(tower.pooled_features(high * wide, n) for (high, wide), n in zip(view.grids, counts, strict=True))
        groups, gone = upload(pooled, there.device), there & ~mask
        into = in_stretches(gone, groups)
        unread = unread.scatter(1, into, gone & (groups > 0)[:, None])
        counts = tuple(map(sum, zip(counts, pooled, strict=True)))
    index, valid = pack_right((mask | unread).gather(1, order), max(counts))
    index = order.gather(1, index)
    if into is not None:
        size = torch.zeros_like(size).scatter_add(1, into, size * there).gather(1, index) * valid
    elif weighs:
        assert metric is not None
        size = sizes_of(metric, mask | ~there, index, valid, size)
    else:
        size = size.gather(1, index) * valid
    return PatchSelection(index, valid, size, counts, pooled, unread.gather(1, index), wrong, into)


def mean_of(patches: Tensor, real: Tensor) -> Tensor:
    """[P, U, c, D] -> [P, 1, 1, D] float32, over the patches that are real."""
    blocks = zip(patches.split(BLOCK, 1), real.split(BLOCK, 1), strict=True)
    total = sum((some.float() * there[..., None]).sum((1, 2), keepdim=True) for some, there in blocks)
    return total / real.sum((1, 2))[:, None, None, None]


def patch_contrast(patches: Tensor, mean: Tensor, real: Tensor) -> Tensor:
    """[P, U, c, D] -> [P, U] float32: how far patches lie from their picture's mean [P, 1, 1, D], mean over a unit's; padding lies nowhere."""
    blocks = zip(patches.split(BLOCK, 1), real.split(BLOCK, 1), strict=True)  # memory is that of the scores
    return torch.cat([((some.float() - mean).norm(dim=-1) * there).mean(2) for some, there in blocks], 1)
