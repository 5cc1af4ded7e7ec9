"""State of a tower that takes pictures as a batch."""

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
from duet_vlm.runtime.vision_tower.patch_groups import selectable_units
from duet_vlm.runtime.vision_tower.selection import PatchSelection
from duet_vlm.runtime.vision_tower.state import TowerState


@dataclasses.dataclass(kw_only=True)
class BatchedTowerState(TowerState):
    """State of a tower that takes pictures as a batch.

    Attributes
    ----------
    units : Tensor
        [P, U] numbers of the kept units.
    valid : Tensor
        [P, U] bool.
    is_output : Tensor
        [P, U] bool, used after the tower (False for pooled context).
    content : Tensor
        [P, U] bool, not only padding: the unit becomes a token.
    size : Tensor
        [P, U] how many units each represents, 0 for padding.
    cells : Tensor
        [units of a picture, c] patch numbers of each unit.
    total : int
        Rows of the whole tower.
    entering : PatchSelection or None
        The selection before the blocks, until its rows are passed on.
    widths : dict
        Block -> units in the batch after the drop there.
    """

    pending_merges: ClassVar[bool] = False

    units: Tensor
    valid: Tensor
    is_output: Tensor
    content: Tensor
    size: Tensor
    cells: Tensor
    total: int
    entering: PatchSelection | None = None
    widths: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def planned_stages(self) -> list[TowerStages]:
        """Padded to the picture that keeps the most."""
        return [tuple((after, max(counts)) for after, counts in self.stages.items())] * len(self.units)

    @property
    def run_stages(self) -> list[TowerStages]:
        return [tuple(self.widths.items())] * len(self.units)

    @property
    def patches_of_unit(self) -> int:
        return self.cells.shape[1]

    @property
    def rows(self) -> Tensor:
        """[P, R] numbers of the kept rows in the whole tower: those before the patches (CLS), then unit by unit."""
        front = torch.arange(self.num_cls, device=self.units.device).expand(len(self.units), -1)
        return torch.cat([front, self.num_cls + self.cells[self.units].flatten(1)], 1)

    def of_rows(self, units: Tensor, front: float) -> Tensor:
        """Values of units [P, U] repeated for their rows [P, R]; ``front`` for the CLS rows."""
        return nn.functional.pad(units.repeat_interleave(self.cells.shape[1], 1), (self.num_cls, 0), value=front)

    def survivors(self) -> Tensor:
        return self.whole(self.of_rows((self.valid & self.is_output).float(), 1.0)[..., None])[:, self.num_cls :]

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Expand kept rows, along ``dim``, to the whole tower: zeros where they were dropped."""
        shape = list(rows.shape)
        shape[dim] = self.total + 1  # the last one collects invalid rows
        target = torch.where(self.of_rows(self.valid, True), self.rows, self.total)
        target = target.view(len(target), *[1] * (dim - 1), -1, *[1] * (rows.ndim - dim - 1)).expand(rows.shape)
        return rows.new_zeros(shape).scatter(dim, target, rows).narrow(dim, 0, self.total)

    def row_sizes(self) -> Tensor:
        """[P, R] float32, how many rows each one stands for in the attention; 0: it is not there."""
        return self.of_rows(self.size if self.uses_size_bias else self.valid.float(), 1.0)

    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        size = self.whole(self.row_sizes())
        return [
            dataclasses.replace(qk, query=self.whole(qk.query, 2), key=self.whole(qk.key, 2), size=size) for qk in calls
        ]

    @property
    def is_stock(self) -> bool:
        """True if the rows are still those of the whole tower, in its order and not unit by unit."""
        return not self.widths and self.cells.shape[1] == 1

    def bias(self, key: Tensor) -> Tensor | None:
        """The bias of the attention logits; None where nothing is hidden and all sizes are equal."""
        if not self.widths or not self.uses_size_bias and len(set(self.counts)) == 1:
            return None
        return self.row_sizes().log().to(key.dtype).clamp(min=torch.finfo(key.dtype).min)[:, None, None]

    def mask(self, mask: Any, key: Tensor) -> Any:
        if self.is_stock:
            return mask
        bias = self.bias(key)
        if not isinstance(mask, Tensor):
            return bias
        if mask.ndim == 2:  # valid patches, the form for flash attention
            return mask.gather(1, self.rows)
        kept_mask = gather_square(mask, self.rows)
        if kept_mask.dtype == torch.bool:
            kept_mask = torch.zeros_like(kept_mask, dtype=key.dtype).masked_fill(~kept_mask, torch.finfo(key.dtype).min)
        return kept_mask if bias is None else (kept_mask + bias).clamp(min=torch.finfo(key.dtype).min)

    def of_units(self, rows: Tensor) -> Tensor:
        return rows[:, self.num_cls :].unflatten(1, (-1, self.cells.shape[1])).mean(2, dtype=torch.float32)

    def attention(self, calls: list[RecordedQK]) -> Tensor:
        (qk,) = calls
        size = self.row_sizes()
        if self.num_cls:
            return nn.functional.pad(cls_attention(qk.query, qk.key, qk.scaling, size), (1, 0))
        return column_attention(qk.query, qk.key, qk.scaling, qk.sample, size)

    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return selectable_units(self.valid, self.valid & self.content, counts), self.units

    def sizes(self) -> Tensor:
        return self.size

    def begin(self, selection: PatchSelection) -> None:
        """Let only the selected units enter the first block."""
        self.entering = selection
        self._update(selection, 0)

    def enter(self, hidden: Tensor) -> Tensor:
        """Rows that enter the first block, unit by unit [P, R, D], of those of the whole tower [P, total, D]."""
        selection = self.entering
        self.entering = None
        if selection is None or selection.into is None:
            return gather_rows(hidden, self.rows)
        units = (
            selection.entering(hidden[:, self.num_cls + self.cells].flatten(2))
            .unflatten(2, (self.cells.shape[1], -1))
            .flatten(1, 2)
        )
        return torch.cat([hidden[:, : self.num_cls], units], 1)

    def drop_patches(self, selection: PatchSelection, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        count = self.cells.shape[1]
        front = torch.arange(self.num_cls, device=hidden.device).expand(len(hidden), -1)
        patches = (selection.index[..., None] * count + torch.arange(count, device=hidden.device)).flatten(
            1
        ) + self.num_cls
        kept = torch.cat([front, patches], 1)
        if selection.into is None:
            rows = gather_rows(hidden, kept)
        else:
            units = hidden[:, self.num_cls :].unflatten(1, (-1, count)).flatten(2)
            merged = (
                weighed_means(units, self.size, selection.into, selection.index).unflatten(2, (count, -1)).flatten(1, 2)
            )
            rows = torch.cat([hidden[:, : self.num_cls], merged], 1)
        self._update(selection, after)
        return rows, kept

    def _update(self, selection: PatchSelection, after: int) -> None:
        """Update the state after a drop."""
        self.units = self.units.gather(1, selection.index)
        self.content = self.content.gather(1, selection.index)
        self.valid = selection.valid
        self.is_output = ~selection.unread
        self.size = selection.size
        self.pooled_count = selection.pooled
        self.widths[after] = selection.index.shape[1]
        self.invalid_code = torch.maximum(self.invalid_code, selection.wrong)
        self.stages[after] = selection.counts
