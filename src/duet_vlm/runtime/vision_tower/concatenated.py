"""Towers that concatenate pictures of any size in a batch of one (Pixtral): patches are dropped as in
``tower_hooks.py``.

Patches are reordered unit by unit before the blocks, so that whole units are dropped. Spare patches, which fill no unit
and become no token, are dropped with the first units of their picture; in an unreduced picture they stay, after its
units, as its other patches attend to them.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.models.adapter import ConcatenatedBlocks, RecordedQK, TowerBlocks
from duet_vlm.ops.ragged import gather_rows, gather_square, upload
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext
from duet_vlm.runtime.vision_tower.capabilities import is_flash, recomputation_error, recomputes, use_size_bias
from duet_vlm.runtime.vision_tower.patch_groups import in_cells, in_patches, previous_pictures
from duet_vlm.runtime.vision_tower.selection import select_patches
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks
from duet_vlm.runtime.vision_tower.varlen import PackedUnits, SurvivingPatches, VarlenTowerState, first_units


@dataclasses.dataclass(kw_only=True)
class ConcatenatedTowerState(VarlenTowerState):
    """State of a tower with concatenated pictures.

    Attributes
    ----------
    cells : Tensor
        [units of the call, c] patch numbers of each unit among the patches of all pictures.
    patches_before : int
        Patches of all pictures.
    ends : Tensor
        [P] patch number after the last one of each picture.
    spare : Tensor
        [s] numbers of the spare patches that are kept.
    spares : tuple of int
        Their number in each picture, on the host.
    entering : SurvivingPatches or None
        The selection before the blocks, until its rows are passed on.
    entered : Tensor
        Numbers of the patches that entered the first block.
    """

    pending_merges: ClassVar[bool] = False

    cells: Tensor
    patches_before: int
    ends: Tensor
    spare: Tensor
    spares: tuple[int, ...]
    entering: SurvivingPatches | None = None
    entered: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.entered = self.rows

    def patch_order(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Patch numbers of ``units`` [n], then of spare patches [R], and the order that sorts them by picture."""
        patches = torch.cat([self.cells[units].flatten(), self.spare])
        if not len(self.spare):
            return patches, torch.arange(len(patches), device=patches.device)
        return patches, torch.bucketize(patches, self.ends, right=True).argsort(stable=True)

    @property
    def rows(self) -> Tensor:
        """Numbers of the kept patches, in block order."""
        patches, order = self.patch_order(self.kept)
        return patches[order]

    @property
    def block_positions(self) -> Tensor:
        """Positions of the patches of each unit, then of the spare ones, among these rows."""
        return self.patch_order(self.kept)[1].argsort()

    def in_block_order(self, units: Tensor, spare: Tensor) -> Tensor:
        """Values of the patches of each unit [n * unit, ...], then of the spare ones, in block order."""
        return torch.cat([units, spare])[self.patch_order(self.kept)[1]]

    def by_unit(self, rows: Tensor) -> Tensor:
        return rows[self.block_positions[: len(self.entry_index) * self.packed.unit]].unflatten(
            0, (-1, self.packed.unit)
        )

    def rows_of(self, units: Tensor) -> Tensor:
        seats, count = self.block_positions, len(self.entry_index) * self.packed.unit
        return torch.cat([seats[self.patches(units)], seats[count:]])[self.patch_order(self.kept[units])[1]]

    def with_units(self, rows: Tensor, units: Tensor) -> Tensor:
        return rows.index_copy(0, self.block_positions[: len(units) * self.packed.unit], units.flatten(0, 1))

    def row_sizes(self) -> Tensor:
        return self.in_block_order(super().row_sizes(), self.size.new_ones(len(self.spare)))

    def row_counts(self) -> list[int]:
        return [rows + spare for rows, spare in zip(super().row_counts(), self.spares, strict=True)]

    def enter(self, hidden: Tensor) -> Tensor:
        """Rows that enter the first block, unit by unit [1, R, D], of those of all patches [1, N, D]."""
        survivors = self.entering
        self.entering = None
        if survivors is None or not any(survivors.pooled):
            return gather_rows(hidden, self.rows[None])
        units = survivors.entering(hidden[0, self.cells].flatten(1)).view(-1, hidden.shape[2])
        return self.in_block_order(units, hidden[0, self.spare])[None]

    def positions_among_entered(self) -> Tensor:
        """Positions of the kept rows among those that entered the first block."""
        position = torch.arange(len(self.entered), device=self.entered.device)
        return self.entered.new_zeros(self.patches_before).index_copy(0, self.entered, position)[self.rows]

    def survivors(self) -> Tensor:
        is_output = self.is_output.float().repeat_interleave(self.packed.unit)
        return self.whole(self.in_block_order(is_output, is_output.new_ones(len(self.spare)))[None, :, None])

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Expand kept rows, along ``dim``, to all patches: zeros where they were dropped."""
        shape = list(rows.shape)
        shape[dim] = self.patches_before
        return rows.new_zeros(shape).index_copy(dim, self.rows, rows)

    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        (qk,) = calls
        size = self.whole(self.row_sizes()[None])
        return [dataclasses.replace(qk, query=self.whole(qk.query, 2), key=self.whole(qk.key, 2), size=size)]

    def mask(self, mask: Any, key: Tensor) -> Any:
        if not isinstance(mask, Tensor):  # flash attention gets the lengths of the pictures
            return mask
        kept_mask = gather_square(mask, self.rows[None])
        return (
            (kept_mask + self.row_sizes().log().to(key.dtype)).clamp(min=torch.finfo(key.dtype).min)
            if self.uses_size_bias
            else kept_mask
        )

    def lengths_of(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of flash attention: the number of kept rows of each picture."""
        if "cu_seq_lens_q" not in kwargs:
            return {}
        ends = upload([0, *itertools.accumulate(self.row_counts())], self.packed.units.device).int()
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}  # max lengths remain valid


class ConcatenatedTowerHooks(TowerHooks):
    """The hooks on one tower with concatenated pictures."""

    def enter(
        self,
        blocks: TowerBlocks,
        depth: int,
        parameters: tuple[str, ...],
        stack: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        running = self.current_state()
        if running is None or running[0].tower_work.patches is None:
            return None
        context, tower = running
        assert isinstance(blocks, ConcatenatedBlocks)
        recomputed = recomputes(blocks.tower)
        with torch.no_grad(), compat.without_autocast(running[0].tower_work.patches):
            context.tower_work.state = tower_state = self._begin_concatenated(context, tower, blocks, depth, recomputed)
        context.tower_work.patches = context.tower_work.pixels = None
        if tower_state is None or context.call.standalone:
            return None
        new_kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        new_kwargs[parameters[0]] = tower_state.enter(new_kwargs[parameters[0]])
        new_kwargs["position_embeddings"] = tuple(
            table[tower_state.rows] for table in new_kwargs["position_embeddings"]
        )
        if max(tower_state.stages) == 0:  # else block by block
            new_kwargs["attention_mask"] = tower_state.mask(new_kwargs.get("attention_mask"), new_kwargs[parameters[0]])
        return (), new_kwargs | tower_state.lengths_of(new_kwargs)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        running = self.current_state()
        if running is None or running[0].tower_work.state is None or running[0].call.standalone:
            return
        tower_state: ConcatenatedTowerState = running[0].tower_work.state
        width = len(tower_state.entry_index) * tower_state.packed.unit + len(tower_state.spare)

        def full(rows: Tensor | None) -> Tensor | None:
            return rows if rows is None or rows.shape[1] != width else tower_state.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def hand_over(self, block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a block: pass the tables of the kept rows."""
        running = self.current_state()
        tower_state: ConcatenatedTowerState | None = (
            None if running is None or running[0].call.standalone else running[0].tower_work.state
        )
        if tower_state is None or len(tower_state.entry_index) == len(tower_state.packed.units):
            return None
        positions = tuple(table[tower_state.positions_among_entered()] for table in kwargs["position_embeddings"])
        return args, kwargs | {"position_embeddings": positions} | tower_state.lengths_of(kwargs)

    def _begin_concatenated(
        self, context: EncodeContext, tower: TowerReducer, blocks: ConcatenatedBlocks, depth: int, recomputed: bool
    ) -> ConcatenatedTowerState | None:
        """The state of the reduced tower; None: nothing is dropped.

        ``recomputed``: its blocks run again in the backward pass.
        """
        assert context.tower_work.patches is not None
        sides = blocks.grids(context.encoding)
        cell = blocks.patch_grid
        device = context.tower_work.patches.device
        grids = tuple((height // cell, width // cell) for height, width in sides)
        lengths = [height * width for height, width in grids]
        spans: list[tuple[int, ...]] = [(n,) for n in lengths]
        stages = self.stages(context, tower, spans, depth)
        if not stages:
            return None
        if max(stages) and recomputed:
            raise recomputation_error()
        starts = [sum(height * width for height, width in sides[:number]) for number in range(len(sides) + 1)]
        numbers = torch.arange(starts[-1], device=device).split([height * width for height, width in sides])
        cells = torch.cat([in_cells(some.view(side), cell) for some, side in zip(numbers, sides, strict=True)])
        uses_size_bias = use_size_bias(tower, not is_flash(blocks.tower))
        survivors = SurvivingPatches.all(lengths, device)
        if 0 in stages:
            rows = torch.cat(
                [
                    some[:, :height, :width].flatten(1).t()
                    for some, (height, width) in zip(context.tower_work.patches, sides, strict=True)
                ]
            )
            valid = pad_sequence(
                [torch.ones(n, cell**2, dtype=torch.bool, device=device) for n in lengths], batch_first=True
            )
            embedded = pad_sequence(list(rows[cells].split(lengths)), batch_first=True)
            pixels = (
                None
                if context.tower_work.pixels is None
                else self._pixels(context.tower_work.pixels, sides, blocks.patch)[cells]
                .flatten(1)[:, None]
                .split(lengths)
            )
            pixel_groups = None if pixels is None else pad_sequence(list(pixels), batch_first=True)
            selection = select_patches(
                tower,
                embedded,
                valid,
                stages[0],
                grids,
                uses_size_bias,
                pixel_groups,
                previous_pictures(context, spans),
            )
            survivors = SurvivingPatches.of(selection, lengths)
            if sum(survivors.counts) == len(cells):
                return None
        positions = torch.arange(len(survivors.units), device=device)
        counts = [*(stages | ({0: survivors.counts} if 0 in stages else {})).values()]
        is_whole = [n == min(some) == max(some) for n, *some in zip(lengths, *counts, strict=True)]
        spare = [spare_patches(side, cell) + start for side, start in zip(sides, starts, strict=False)]
        spare = [some if whole else some[:0] for some, whole in zip(spare, is_whole, strict=True)]
        tower_state = ConcatenatedTowerState(
            stages=stages,
            grids=grids,
            uses_size_bias=uses_size_bias,
            invalid_code=survivors.wrong,
            pooled_count=survivors.pooled,
            packed=PackedUnits(survivors.units, positions, survivors.units, lengths, cell**2),
            size=survivors.size,
            is_output=survivors.is_output,
            entry_index=positions,
            block_index=pad_sequence(list(positions.split(list(survivors.counts))), batch_first=True),
            valid=upload(first_units(survivors.counts), device),
            remaining=survivors.counts,
            cells=cells,
            patches_before=starts[-1],
            ends=upload(starts[1:], device),
            spare=torch.cat(spare).to(device),
            spares=tuple(map(len, spare)),
            entering=survivors if 0 in stages else None,
        )
        if 0 in stages:
            tower_state.stages[0] = survivors.counts
            tower_state.kept_units[0] = survivors.units
        return tower_state

    def _pixels(self, pixels: Tensor, sides: list[tuple[int, int]], patch: int) -> Tensor:
        """Pictures [P, C, H, W], padded to the largest, patch by patch: [N, m]."""
        cut = [some[None, :, : high * patch, : wide * patch] for some, (high, wide) in zip(pixels, sides, strict=True)]
        return torch.cat([in_patches(some, *side)[0] for some, side in zip(cut, sides, strict=True)])


def spare_patches(side: tuple[int, int], cell: int) -> Tensor:
    """Numbers of a picture's spare patches (a row, or a column, at its end), on the host."""
    height, width = side
    in_unit = torch.zeros(side, dtype=torch.bool, device="cpu")
    in_unit[: height // cell * cell, : width // cell * cell] = True
    return (~in_unit).flatten().nonzero()[:, 0]
