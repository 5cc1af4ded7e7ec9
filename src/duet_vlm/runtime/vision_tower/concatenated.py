"""Towers that hand their blocks pictures of any size one behind the other in a batch of one (Pixtral): rows leave as in ``hooks.py``.

Units stand one by one in front of the blocks, so that whole ones leave. Patches that fill no unit, which no token shows, leave with the first
ones of their picture; of a picture that stays whole they stay, behind its units, as its other patches see them.
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
from duet_vlm.runtime.vision_tower.capabilities import bias_refusal, is_flash, recomputes, runs_again
from duet_vlm.runtime.vision_tower.patch_groups import frames_before, in_cells, in_patches
from duet_vlm.runtime.vision_tower.selection import select_patches
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks
from duet_vlm.runtime.vision_tower.varlen import SurvivingPatches, VarlenTowerState, host_grids


@dataclasses.dataclass(kw_only=True)
class ConcatenatedTowerState(VarlenTowerState):
    """``cells`` [units of the call, c]: numbers of the patches of each among the ``patches_before`` of all pictures, which end at ``ends`` [P];
    ``spare`` [s]: of those that fill no unit the numbers of the ones that stay, ``spares`` how many of each picture, on the host."""

    pending_merges: ClassVar[bool] = False

    cells: Tensor
    patches_before: int
    ends: Tensor
    spare: Tensor
    spares: tuple[int, ...]
    entering: SurvivingPatches | None = None  # until its rows are handed over
    came: Tensor = dataclasses.field(init=False)  # numbers of the patches that came to the first block

    def __post_init__(self) -> None:
        self.came = self.rows

    def in_order(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the patches of ``units`` of the call [n], then the spare ones [R], and how they stand picture by picture."""
        patches = torch.cat([self.cells[units].flatten(), self.spare])
        if not len(self.spare):
            return patches, torch.arange(len(patches), device=patches.device)
        return patches, torch.bucketize(patches, self.ends, right=True).argsort(stable=True)

    @property
    def rows(self) -> Tensor:
        """Numbers of the patches that are left, as the blocks have them."""
        patches, order = self.in_order(self.left)
        return patches[order]

    @property
    def seats(self) -> Tensor:
        """Where the patches of each unit, then the spare ones, stand among these rows."""
        return self.in_order(self.left)[1].argsort()

    def arranged(self, units: Tensor, spare: Tensor) -> Tensor:
        """What belongs to the patches of each unit [n * unit, ...], then to the spare ones, as the blocks have them."""
        return torch.cat([units, spare])[self.in_order(self.left)[1]]

    def by_unit(self, rows: Tensor) -> Tensor:
        return rows[self.seats[: len(self.place) * self.unit]].unflatten(0, (-1, self.unit))

    def rows_of(self, units: Tensor) -> Tensor:
        seats, count = self.seats, len(self.place) * self.unit
        return torch.cat([seats[self.patches(units)], seats[count:]])[self.in_order(self.left[units])[1]]

    def with_units(self, rows: Tensor, units: Tensor) -> Tensor:
        return rows.index_copy(0, self.seats[: len(units) * self.unit], units.flatten(0, 1))

    def row_sizes(self) -> Tensor:
        return self.arranged(super().row_sizes(), self.size.new_ones(len(self.spare)))

    def row_counts(self) -> list[int]:
        return [rows + spare for rows, spare in zip(super().row_counts(), self.spares, strict=True)]

    def enter(self, hidden: Tensor) -> Tensor:
        """Of the rows of all patches [1, N, D] those that come to the first block, unit by unit [1, R, D]."""
        left, self.entering = self.entering, None
        if left is None or not any(left.pooled):
            return gather_rows(hidden, self.rows[None])
        units = left.entering(hidden[0, self.cells].flatten(1)).view(-1, hidden.shape[2])
        return self.arranged(units, hidden[0, self.spare])[None]

    def again(self) -> Tensor:
        """Where the rows that are left stood among those that came to the first block."""
        place = torch.arange(len(self.came), device=self.came.device)
        return self.came.new_zeros(self.patches_before).index_copy(0, self.came, place)[self.rows]

    def survivors(self) -> Tensor:
        read = self.read.float().repeat_interleave(self.unit)
        return self.whole(self.arranged(read, read.new_ones(len(self.spare)))[None, :, None])

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Rows that are left, along ``dim``, as those of all: zeros where they are gone."""
        shape = list(rows.shape)
        shape[dim] = self.patches_before
        return rows.new_zeros(shape).index_copy(dim, self.rows, rows)

    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        (one,) = calls
        size = self.whole(self.row_sizes()[None])
        return [dataclasses.replace(one, query=self.whole(one.query, 2), key=self.whole(one.key, 2), size=size)]

    def mask(self, mask: Any, key: Tensor) -> Any:
        if not isinstance(mask, Tensor):  # flash attention is given the lengths of the pictures
            return mask
        seen = gather_square(mask, self.rows[None])
        return (seen + self.row_sizes().log().to(key.dtype)).clamp(min=torch.finfo(key.dtype).min) if self.uses_size_bias else seen

    def lengths_of(self, given: dict[str, Any]) -> dict[str, Any]:
        """What flash attention is told of the pictures: how long what is left of each is."""
        if "cu_seq_lens_q" not in given:
            return {}
        ends = upload([0, *itertools.accumulate(self.row_counts())], self.units.device).int()
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}  # no picture is longer than it was


class ConcatenatedTowerHooks(TowerHooks):
    """The hooks on one tower of this kind."""

    def enter(
        self, blocks: TowerBlocks, depth: int, parameters: tuple[str, ...], stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        running = self.current_state()
        if running is None or running[0].patches is None:
            return None
        call, tower = running
        assert isinstance(blocks, ConcatenatedBlocks)
        again = recomputes(blocks.tower)
        with torch.no_grad(), compat.without_autocast(running[0].patches):
            call.tower_state = run = self._joined(call, tower, blocks, depth, again)
        call.patches = call.pixels = None
        if run is None or call.standalone:
            return None
        given = dict(zip(parameters, args, strict=False)) | kwargs
        given[parameters[0]] = run.enter(given[parameters[0]])
        given["position_embeddings"] = tuple(table[run.rows] for table in given["position_embeddings"])
        if max(run.stages) == 0:  # else block by block
            given["attention_mask"] = run.mask(given.get("attention_mask"), given[parameters[0]])
        return (), given | run.lengths_of(given)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        running = self.current_state()
        if running is None or running[0].tower_state is None or running[0].standalone:
            return
        run: ConcatenatedTowerState = running[0].tower_state
        width = len(run.place) * run.unit + len(run.spare)

        def full(rows: Tensor | None) -> Tensor | None:
            return rows if rows is None or rows.shape[1] != width else run.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def hand_over(self, block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a block: the tables of the rows that are left."""
        running = self.current_state()
        run: ConcatenatedTowerState | None = None if running is None or running[0].standalone else running[0].tower_state
        if run is None or len(run.place) == len(run.units):
            return None
        positions = tuple(table[run.again()] for table in kwargs["position_embeddings"])
        return args, kwargs | {"position_embeddings": positions} | run.lengths_of(kwargs)

    def _joined(self, call: EncodeContext, tower: TowerReducer, blocks: ConcatenatedBlocks, depth: int, again: bool) -> ConcatenatedTowerState | None:
        """What goes through the tower; None: all of it. ``again``: its blocks run a second time in the backward pass."""
        assert call.patches is not None
        sides, cell, device = blocks.grids(call.encoding), blocks.patch_grid, call.patches.device
        grids = tuple((high // cell, wide // cell) for high, wide in sides)
        lengths = [high * wide for high, wide in grids]
        spans: list[tuple[int, ...]] = [(n,) for n in lengths]
        stages = self.stages(call, tower, spans, depth)
        if not stages:
            return None
        if max(stages) and again:
            raise runs_again()
        starts = [sum(high * wide for high, wide in sides[:number]) for number in range(len(sides) + 1)]
        numbers = torch.arange(starts[-1], device=device).split([high * wide for high, wide in sides])
        cells = torch.cat([in_cells(some.view(side), cell) for some, side in zip(numbers, sides, strict=True)])
        weighs = bias_refusal(tower, not is_flash(blocks.tower))
        left = SurvivingPatches.all(lengths, device)
        if 0 in stages:
            rows = torch.cat([some[:, :high, :wide].flatten(1).t() for some, (high, wide) in zip(call.patches, sides, strict=True)])
            real = pad_sequence([torch.ones(n, cell**2, dtype=torch.bool, device=device) for n in lengths], batch_first=True)
            embedded = pad_sequence(list(rows[cells].split(lengths)), batch_first=True)
            pixels = None if call.pixels is None else self._pixels(call.pixels, sides, blocks.patch)[cells].flatten(1)[:, None].split(lengths)
            shown = None if pixels is None else pad_sequence(list(pixels), batch_first=True)
            chosen = select_patches(tower, embedded, real, stages[0], grids, weighs, shown, frames_before(call, spans))
            left = SurvivingPatches.of(chosen, lengths)
            if sum(left.counts) == len(cells):
                return None
        place = torch.arange(len(left.units), device=device)
        counts = [*(stages | ({0: left.counts} if 0 in stages else {})).values()]
        stays = [n == min(some) == max(some) for n, *some in zip(lengths, *counts, strict=True)]
        spare = [spare_patches(side, cell) + start for side, start in zip(sides, starts, strict=False)]
        spare = [some if whole else some[:0] for some, whole in zip(spare, stays, strict=True)]
        run = ConcatenatedTowerState(
            stages, grids, weighs, left.wrong, left.pooled, left.units, place, left.units, left.size, left.read, place,
            pad_sequence(list(place.split(list(left.counts))), batch_first=True), upload(host_grids(left.counts), device), lengths, cell**2,
            remaining=left.counts, cells=cells, patches_before=starts[-1], ends=upload(starts[1:], device),
            spare=torch.cat(spare).to(device), spares=tuple(map(len, spare)), entering=left if 0 in stages else None,
        )  # fmt: skip
        if 0 in stages:
            run.stages[0], run.passed[0] = left.counts, left.units
        return run

    def _pixels(self, pixels: Tensor, sides: list[tuple[int, int]], patch: int) -> Tensor:
        """Pictures [P, C, H, W], padded to the largest, patch by patch: [N, m]."""
        cut = [some[None, :, : high * patch, : wide * patch] for some, (high, wide) in zip(pixels, sides, strict=True)]
        return torch.cat([in_patches(some, *side)[0] for some, side in zip(cut, sides, strict=True)])


def spare_patches(side: tuple[int, int], cell: int) -> Tensor:
    """Numbers of a picture's patches that fill no unit, on the host: a line, or a column, at its end."""
    high, wide = side
    fills = torch.zeros(side, dtype=torch.bool, device="cpu")
    fills[: high // cell * cell, : wide // cell * cell] = True
    return (~fills).flatten().nonzero()[:, 0]
