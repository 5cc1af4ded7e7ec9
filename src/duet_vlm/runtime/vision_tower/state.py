"""What goes through a tower in one call, whatever way it takes its pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from duet_vlm.models.adapter import RecordedQK
from duet_vlm.planning.budget import TowerStages
from duet_vlm.reducers.vision_tower import Grid
from duet_vlm.runtime.vision_tower.selection import PatchSelection


class TowerState(ABC):
    """What goes through the tower in one call; where units leave behind a block, what is left now.

    Attributes
    ----------
    stages : dict
        Blocks whose attention has run -> units of each picture that are to be left then.
    grids : tuple
        (rows, columns) of each picture's units.
    extra : int
        Rows in front of the units of each picture.
    weighs : bool
        Rows stand for several in the attention, by their sizes.
    projects_survivors_only : bool
        What comes behind the blocks sees only what is left, too.
    wrong : Tensor
        The code of what the method returned (runtime/validation.py).
    pooled : tuple of int
        Units of each picture that stand for what left in front of the blocks, and are not read.
    """

    pending_merges: ClassVar[bool]

    stages: dict[int, tuple[int, ...]]
    grids: tuple[Grid, ...]
    num_cls: int
    uses_size_bias: bool
    invalid_code: Tensor
    pooled_count: tuple[int, ...]

    @property
    @abstractmethod
    def patches_of_unit(self) -> int:
        """How many patches a unit is."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Units of each picture that are left to be read in the end."""
        return tuple(n - pooled for n, pooled in zip(self.stages[max(self.stages)], self.pooled_count, strict=True))

    @property
    def planned_stages(self) -> list[TowerStages]:
        """Per picture where units leave, and how many are left."""
        return [tuple(zip(self.stages, left, strict=True)) for left in zip(*self.stages.values(), strict=True)]

    @property
    @abstractmethod
    def run_stages(self) -> list[TowerStages]:
        """The same as the blocks had it, padding included, counted on their rows."""

    @abstractmethod
    def survivors(self) -> Tensor:
        """[P, N, 1] float32, as the adapter's ``carried`` takes numbers of patches: which are left."""

    @abstractmethod
    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        """Queries and keys of the rows that are left as those of all, each with its size."""

    @abstractmethod
    def mask(self, mask: Any, key: Tensor) -> Any:
        """The attention mask of a block with keys [P, H, R, d], given that of the whole tower."""

    @abstractmethod
    def of_units(self, rows: Tensor) -> Tensor:
        """What the blocks have of each row [B, R, C] as the method sees it: [P, U, C] float32, means over a unit's patches."""

    @abstractmethod
    def attention(self, calls: list[RecordedQK]) -> Tensor:
        """[B, R] CLS attention of each row, or attention that it receives."""

    @abstractmethod
    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[P, U] bool, the units of which ``counts`` are to be left, and their numbers in the picture."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """[P, U] float32, how many units each of them stands for."""

    @abstractmethod
    def drop_patches(self, chosen: PatchSelection, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        """Go on with these units: of the rows of a block [.., R, D] those that are left [.., R', D], merged where they are to be, and their
        places among all [B, R']."""
