"""State of a reduced tower in one call, for every way in which towers take pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from duet_vlm.models.adapter import RecordedQK
from duet_vlm.planning.budget import TowerStages
from duet_vlm.reducers.vision_tower import Grid
from duet_vlm.runtime.vision_tower.selection import PatchSelection


@dataclass(kw_only=True)
class TowerState(ABC):
    """State of a reduced tower in one call: the units that are kept so far. A subclass lays rows out as its tower does.

    A "unit" is the group of patches that becomes one token.

    Attributes
    ----------
    stages : dict
        Number of blocks whose attention has run -> units of each picture that are kept there.
    grids : tuple
        (rows, columns) of each picture's units.
    num_cls : int
        Rows before the units of each picture.
    uses_size_bias : bool
        Rows represent several in the attention, by a bias of their log size.
    pending_merges : bool
        Modules after the blocks (mergers) get the kept units only, too.
    invalid_code : Tensor
        0-dim code of what the method returned (runtime/validation.py).
    pooled_count : tuple of int
        Units of each picture that are pooled context: they represent units dropped before the blocks, and are unused
        after them.
    """

    pending_merges: ClassVar[bool]

    stages: dict[int, tuple[int, ...]]
    grids: tuple[Grid, ...]
    uses_size_bias: bool
    invalid_code: Tensor
    pooled_count: tuple[int, ...]
    num_cls: int = 0

    @property
    @abstractmethod
    def patches_of_unit(self) -> int:
        """Patches of a unit."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Units of each picture that are kept to the end and used."""
        return tuple(n - pooled for n, pooled in zip(self.stages[max(self.stages)], self.pooled_count, strict=True))

    @property
    def planned_stages(self) -> list[TowerStages]:
        """Per picture the blocks where units are dropped, and the planned counts."""
        return [tuple(zip(self.stages, counts, strict=True)) for counts in zip(*self.stages.values(), strict=True)]

    @property
    @abstractmethod
    def run_stages(self) -> list[TowerStages]:
        """The same as measured on the rows of the blocks, padding included."""

    @abstractmethod
    def survivors(self) -> Tensor:
        """[P, N, 1] float32, 1 for kept patches, in the form of the adapter's ``patches_to_tokens``."""

    @abstractmethod
    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        """Queries and keys of the kept rows, expanded to all rows, each with its size."""

    @abstractmethod
    def mask(self, mask: Any, key: Tensor) -> Any:
        """The attention mask of a block with keys [P, H, R, d], given that of the whole tower."""

    @abstractmethod
    def of_units(self, rows: Tensor) -> Tensor:
        """Values of the blocks' rows [B, R, C] by unit, in the order of the view.

        [P, U, C] float32, means over a unit's patches.
        """

    @abstractmethod
    def attention(self, calls: list[RecordedQK]) -> Tensor:
        """[B, R] CLS attention of each row, or attention that it receives."""

    @abstractmethod
    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[P, U] bool, the units that can be selected, of which ``counts`` are to be kept, and their numbers in the
        picture."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """[P, U] float32, how many units each of them represents."""

    @abstractmethod
    def drop_patches(self, chosen: PatchSelection, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        """Keep the selected units: the kept rows of a block [.., R, D] -> [.., R', D], merged where the method merges,
        and their row numbers [B, R']."""
