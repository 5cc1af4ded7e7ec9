"""Baselines of reduction inside the tower: random and evenly spaced patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duet_vlm.ops.ragged import upload
from duet_vlm.ops.select import spaced_picks, top
from duet_vlm.reducers.registry import register
from duet_vlm.reducers.vision_tower import TowerReducer, TowerView


@register("random_patches")
@dataclass(frozen=True)
class RandomPatches(TowerReducer):
    """Random choice of patches before the vision tower: the baseline that a method inside the tower must beat.

    The choice is the same for every image of a size, whatever the batch.

    Parameters
    ----------
    seed : int
        Seed of the choice.

    Cost: none. Needs: no attention and no text.
    """

    paper = "-"
    summary = "random patches go through the vision tower"

    seed: int = 0

    def keep_patches(self, view: TowerView) -> Tensor:
        chance = torch.rand(view.valid.shape[1], generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return top(upload(chance, view.valid.device).expand(view.valid.shape), view.valid, view.num_keep)


@register("checkerboard")
@dataclass(frozen=True)
class Checkerboard(TowerReducer):
    """Evenly spaced patches before the vision tower; at a half, every other one, with alternate lines shifted by one.

    Cost: none. Needs: no attention and no text.
    """

    paper = "-"
    summary = "evenly spaced patches go through the vision tower"

    def keep_patches(self, view: TowerView) -> Tensor:
        number = torch.arange(view.valid.shape[1], device=view.valid.device).expand(view.valid.shape)
        columns = upload([columns for _, columns in view.grids], number.device)[:, None]
        # every second line is shifted by one
        shifted = number // columns * columns + (number % columns + number // columns % 2) % columns
        order = shifted.argsort(dim=1, stable=True)
        return spaced_picks(view.valid.gather(1, order), view.num_keep).gather(1, order.argsort(dim=1, stable=True))
