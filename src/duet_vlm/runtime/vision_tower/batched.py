"""What goes through a tower that takes pictures side by side in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import RecordedQK
from duet_vlm.ops.merge import weighed_means
from duet_vlm.ops.ragged import gather_rows, gather_square
from duet_vlm.ops.score import cls_attention, column_attention
from duet_vlm.planning.budget import TowerStages
from duet_vlm.reducers.vision_tower import Grid
from duet_vlm.runtime.vision_tower.patch_groups import content_first
from duet_vlm.runtime.vision_tower.selection import PatchSelection
from duet_vlm.runtime.vision_tower.state import TowerState


@dataclasses.dataclass
class BatchedTowerState(TowerState):
    """``Run`` of a tower that takes pictures as a batch.

    Attributes
    ----------
    units : Tensor
        [P, U] numbers of the units that are left, of which ``there`` [P, U] are real and ``read`` [P, U] are read behind the tower, and their
        ``size`` [P, U] (0 where it is none).
    content : Tensor
        [P, U] bool, those that show more than padding, and become tokens.
    cells : Tensor
        [units of a picture, c] numbers of the patches of each.
    total : int
        Rows of the whole tower.
    """

    pending_merges: ClassVar[bool] = False

    stages: dict[int, tuple[int, ...]]
    grids: tuple[Grid, ...]
    num_cls: int
    uses_size_bias: bool
    invalid_code: Tensor
    pooled_count: tuple[int, ...]
    units: Tensor
    there: Tensor
    read: Tensor
    content: Tensor
    size: Tensor
    cells: Tensor
    total: int
    entering: PatchSelection | None = None  # until its rows are handed over
    widths: dict[int, int] = dataclasses.field(default_factory=dict)  # units in the batch since each cut

    @property
    def planned_stages(self) -> list[TowerStages]:
        """Padded to the picture that keeps most."""
        return [tuple((after, max(counts)) for after, counts in self.stages.items())] * len(self.units)

    @property
    def run_stages(self) -> list[TowerStages]:
        return [tuple(self.widths.items())] * len(self.units)

    @property
    def patches_of_unit(self) -> int:
        return self.cells.shape[1]

    @property
    def rows(self) -> Tensor:
        """[P, R] numbers of the rows that are left in the whole tower, those in front of the patches first, then unit by unit."""
        front = torch.arange(self.num_cls, device=self.units.device).expand(len(self.units), -1)
        return torch.cat([front, self.num_cls + self.cells[self.units].flatten(1)], 1)

    def of_rows(self, units: Tensor, front: float) -> Tensor:
        """Numbers of units [P, U] as those of rows [P, R]."""
        return nn.functional.pad(units.repeat_interleave(self.cells.shape[1], 1), (self.num_cls, 0), value=front)

    def survivors(self) -> Tensor:
        return self.whole(self.of_rows((self.there & self.read).float(), 1.0)[..., None])[:, self.num_cls :]

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Rows that are left, along ``dim``, as those of the whole tower: zeros where they are gone."""
        shape = list(rows.shape)
        shape[dim] = self.total + 1  # the last one collects what is not valid
        place = torch.where(self.of_rows(self.there, True), self.rows, self.total)
        place = place.view(len(place), *[1] * (dim - 1), -1, *[1] * (rows.ndim - dim - 1)).expand(rows.shape)
        return rows.new_zeros(shape).scatter(dim, place, rows).narrow(dim, 0, self.total)

    def row_sizes(self) -> Tensor:
        """[P, R] float32, how many rows each one stands for in the attention; 0: it is not there."""
        return self.of_rows(self.size if self.uses_size_bias else self.there.float(), 1.0)

    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        size = self.whole(self.row_sizes())
        return [dataclasses.replace(one, query=self.whole(one.query, 2), key=self.whole(one.key, 2), size=size) for one in calls]

    @property
    def is_stock(self) -> bool:
        """Whether the rows are still those of the whole tower, in its order and not unit by unit."""
        return not self.widths and self.cells.shape[1] == 1

    def bias(self, key: Tensor) -> Tensor | None:
        """What is added to the attention logits; None where nothing is hidden and all weigh alike."""
        if not self.widths or not self.uses_size_bias and len(set(self.counts)) == 1:
            return None
        return self.row_sizes().log().to(key.dtype).clamp(min=torch.finfo(key.dtype).min)[:, None, None]

    def mask(self, mask: Any, key: Tensor) -> Any:
        if self.is_stock:
            return mask
        bias = self.bias(key)
        if not isinstance(mask, Tensor):
            return bias
        if mask.ndim == 2:  # which patches are no padding, as flash attention takes it
            return mask.gather(1, self.rows)
        seen = gather_square(mask, self.rows)
        if seen.dtype == torch.bool:
            seen = torch.zeros_like(seen, dtype=key.dtype).masked_fill(~seen, torch.finfo(key.dtype).min)
        return seen if bias is None else (seen + bias).clamp(min=torch.finfo(key.dtype).min)

    def of_units(self, rows: Tensor) -> Tensor:
        return rows[:, self.num_cls :].unflatten(1, (-1, self.cells.shape[1])).mean(2, dtype=torch.float32)

    def attention(self, calls: list[RecordedQK]) -> Tensor:
        (one,) = calls
        size = self.row_sizes()
        if self.num_cls:
            return nn.functional.pad(cls_attention(one.query, one.key, one.scaling, size), (1, 0))
        return column_attention(one.query, one.key, one.scaling, one.sample, size)

    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return content_first(self.there, self.there & self.content, counts), self.units

    def sizes(self) -> Tensor:
        return self.size

    def begin(self, chosen: PatchSelection) -> None:
        """Only these units come to the first block."""
        self.entering = chosen
        self._go_on(chosen, 0)

    def enter(self, hidden: Tensor) -> Tensor:
        """Of the rows of the whole tower [P, total, D] those that come to the first block, unit by unit [P, R, D]."""
        chosen, self.entering = self.entering, None
        if chosen is None or chosen.into is None:
            return gather_rows(hidden, self.rows)
        units = chosen.entering(hidden[:, self.num_cls + self.cells].flatten(2)).unflatten(2, (self.cells.shape[1], -1)).flatten(1, 2)
        return torch.cat([hidden[:, : self.num_cls], units], 1)

    def drop_patches(self, chosen: PatchSelection, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        count = self.cells.shape[1]
        front = torch.arange(self.num_cls, device=hidden.device).expand(len(hidden), -1)
        patches = (chosen.index[..., None] * count + torch.arange(count, device=hidden.device)).flatten(1) + self.num_cls
        kept = torch.cat([front, patches], 1)
        if chosen.into is None:
            rows = gather_rows(hidden, kept)
        else:
            units = hidden[:, self.num_cls :].unflatten(1, (-1, count)).flatten(2)
            merged = weighed_means(units, self.size, chosen.into, chosen.index).unflatten(2, (count, -1)).flatten(1, 2)
            rows = torch.cat([hidden[:, : self.num_cls], merged], 1)
        self._go_on(chosen, after)
        return rows, kept

    def _go_on(self, chosen: PatchSelection, after: int) -> None:
        self.units, self.content = (x.gather(1, chosen.index) for x in (self.units, self.content))
        self.there, self.read, self.size, self.pooled_count = chosen.valid, ~chosen.unread, chosen.size, chosen.pooled
        self.widths[after], self.invalid_code = chosen.index.shape[1], torch.maximum(self.invalid_code, chosen.wrong)
        self.stages[after] = chosen.counts
