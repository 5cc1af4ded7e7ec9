"""The floors of reduction in the tower: patches by chance, and patches evenly spaced."""

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
    """A random choice of units: what a method inside the tower must beat. The same for every picture of a size, whatever the batch.

    Parameters
    ----------
    seed : int
        Of the choice.
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
    """Units evenly spaced; of half of them every other one, lines shifted against each other."""

    paper = "-"
    summary = "evenly spaced patches go through the vision tower"

    def keep_patches(self, view: TowerView) -> Tensor:
        number = torch.arange(view.valid.shape[1], device=view.valid.device).expand(view.valid.shape)
        columns = upload([columns for _, columns in view.grids], number.device)[:, None]
        shifted = number // columns * columns + (number % columns + number // columns % 2) % columns  # every second line begins one later
        order = shifted.argsort(dim=1, stable=True)
        return spaced_picks(view.valid.gather(1, order), view.num_keep).gather(1, order.argsort(dim=1, stable=True))
