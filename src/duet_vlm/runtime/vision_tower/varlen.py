"""Towers that pack all pictures of a call into one sequence of patches (Qwen2-VL and its relatives): only the kept
patches are packed.

A "unit" is the group of patches that becomes one token. The stock forward takes tables of positions, segments and
windows as arguments, so it is called with those of the kept patches. Its merger then runs on them only, and their
tokens are written back to their positions. All patches are embedded once, for the selection.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.models.adapter import RecordedQK, VarlenTower
from duet_vlm.ops.merge import weighed_means
from duet_vlm.ops.ragged import gather_rows, upload
from duet_vlm.ops.score import column_attention
from duet_vlm.planning.budget import TowerStages
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext
from duet_vlm.runtime.vision_tower.capabilities import is_flash, recomputation_error, recomputes, use_size_bias
from duet_vlm.runtime.vision_tower.patch_groups import previous_pictures
from duet_vlm.runtime.vision_tower.selection import PatchSelection, select_patches
from duet_vlm.runtime.vision_tower.state import TowerState
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks


@dataclasses.dataclass(frozen=True)
class PackedUnits:
    """The units of a packed sequence that enter the first block.

    Attributes
    ----------
    units : Tensor
        [K] their numbers in the whole sequence, in raster order.
    order : Tensor
        [K] their positions in block order, among those that enter.
    slots : Tensor
        [K] their positions in block order, in the whole sequence.
    lengths : list of int
        Units of each picture of the whole sequence.
    unit : int
        Patches of a unit.
    """

    units: Tensor
    order: Tensor
    slots: Tensor
    lengths: list[int]
    unit: int


@dataclasses.dataclass(kw_only=True)
class VarlenTowerState(TowerState):
    """State of a packed tower. The blocks process units in an order of their own (windows).

    Attributes
    ----------
    packed : PackedUnits
        The units that entered the first block.
    size : Tensor
        Of each kept unit, in block order, how many units it represents.
    entry_index : Tensor
        Of each kept unit, in block order, its position when the first block began.
    block_index, valid : Tensor
        [P, U] positions of the kept units of each picture in block order, in the order of the method's view, and their
        validity.
    is_output : Tensor
        Of each kept unit, in block order: it is used after the tower (False for pooled context).
    kept_units : dict
        Block -> units that were kept there, in raster order.
    remaining : tuple of int
        Kept units of each picture, on the host.
    segments : list of (Tensor, Tensor)
        Ends of the segments that the blocks are given, and those of what the last stage kept of them.
    num_attended : int
        Rows of the running block whose attention has run.
    """

    pending_merges: ClassVar[bool] = True

    packed: PackedUnits
    size: Tensor
    is_output: Tensor
    entry_index: Tensor
    block_index: Tensor
    valid: Tensor
    kept_units: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    remaining: tuple[int, ...] = ()
    segments: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    num_attended: int = 0

    @property
    def run_stages(self) -> list[TowerStages]:
        ends = upload(self.packed.lengths, self.packed.units.device).cumsum(0)
        counts = [
            torch.bincount(torch.bucketize(units, ends, right=True), minlength=len(ends)).tolist()
            for units in self.kept_units.values()
        ]
        return [
            tuple(zip(self.kept_units, counts_of_picture, strict=True))
            for counts_of_picture in zip(*counts, strict=True)
        ]

    @property
    def patches_of_unit(self) -> int:
        return self.packed.unit

    @property
    def total(self) -> int:
        return sum(self.packed.lengths)

    @property
    def kept(self) -> Tensor:
        """Kept units of the whole sequence, in block order."""
        return self.packed.units[self.packed.order[self.entry_index]]

    def survivors(self) -> Tensor:
        return (
            self.size.new_zeros(self.total)
            .index_copy(0, self.kept, self.is_output.float())
            .repeat_interleave(self.packed.unit)[None, :, None]
        )

    def whole(self, rows: Tensor) -> Tensor:
        """Expand rows of the units that entered the first block [K, D] to all units [U, D], zeros elsewhere."""
        return rows.new_zeros(self.total, rows.shape[1]).index_copy(0, self.packed.units, rows)

    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        patches, segments = (
            self.patches(self.packed.slots[self.entry_index]),
            [n * self.packed.unit for n in self.packed.lengths],
        )

        def of_all(rows: Tensor) -> tuple[Tensor, ...]:
            shape = list(rows.shape)
            shape[2] = self.total * self.packed.unit
            return rows.new_zeros(shape).index_copy(2, patches, rows).split(segments, 2)

        query, key = (of_all(torch.cat([getattr(qk, name) for qk in calls], 2)) for name in ("query", "key"))
        sizes = of_all(self.row_sizes().view(1, 1, -1))
        return [
            dataclasses.replace(calls[0], query=q, key=k, segments=None, size=s[:, 0])
            for q, k, s in zip(query, key, sizes, strict=True)
        ]

    def projected(self, rows: Tensor) -> Tensor:
        """Expand the merger's output for the kept units [n, D] to all units [U, D], in block order."""
        return rows.new_zeros(self.total, rows.shape[1]).index_copy(0, self.packed.slots[self.entry_index], rows)

    def patches(self, units: Tensor) -> Tensor:
        """Numbers of units [n] as those of their patches [n * unit]."""
        return (units[:, None] * self.packed.unit + torch.arange(self.packed.unit, device=units.device)).flatten()

    def by_unit(self, rows: Tensor) -> Tensor:
        """Rows as the blocks have them [R, D], unit by unit [n, unit, D]."""
        return rows.unflatten(0, (-1, self.packed.unit))

    def rows_of(self, units: Tensor) -> Tensor:
        """Row numbers of these units among the current rows: [n] -> [R']."""
        return self.patches(units)

    def with_units(self, rows: Tensor, units: Tensor) -> Tensor:
        """Rows [R, D] with the rows of units replaced by [n, unit, D]."""
        return units.flatten(0, 1)

    def row_sizes(self) -> Tensor:
        """Of each row, in block order, how many it represents in the attention."""
        return (self.size if self.uses_size_bias else torch.ones_like(self.size)).repeat_interleave(self.packed.unit)

    def mask(self, mask: Any, key: Tensor) -> Any:
        """The bias of the next rows of the running block: attention is computed segment by segment."""
        if not self.uses_size_bias or not self.kept_units:
            return mask
        size = self.row_sizes()
        first, self.num_attended = self.num_attended, (self.num_attended + key.shape[2]) % len(size)
        return size[first : first + key.shape[2]].log().to(key.dtype)[None, None, None]

    def of_units(self, rows: Tensor) -> Tensor:
        return self.by_unit(rows[0]).mean(1, dtype=torch.float32)[self.block_index]

    def attention(self, calls: list[RecordedQK]) -> Tensor:
        query, key = (torch.cat([getattr(qk, name) for qk in calls], 2) for name in ("query", "key"))
        counts = self.row_counts()
        pictures = zip(
            query.split(counts, 2), key.split(counts, 2), self.row_sizes()[None].split(counts, 1), strict=True
        )
        return torch.cat(
            [column_attention(q, k, calls[0].scaling, calls[0].sample, size) for q, k, size in pictures], 1
        )

    def row_counts(self) -> list[int]:
        """Rows of each picture in the blocks."""
        return [n * self.packed.unit for n in self.remaining]

    def kept_ends(self, ends: Tensor) -> Tensor:
        """Ends of the segments of the kept rows, of those of the rows that entered the first block.

        Ends of whole pictures are known; which windows are empty is read from the device, once for all blocks after
        a stage.
        """
        for whole, kept_ends in self.segments:
            if whole is ends:
                return kept_ends
        if len(ends) == len(self.remaining) + 1 and all(self.remaining):  # a segment for each picture
            kept_ends = upload([0, *self.remaining], ends.device).cumsum(0) * self.packed.unit
        else:
            patches = self.patches(self.entry_index)
            kept = torch.zeros(
                len(self.packed.units) * self.packed.unit, dtype=torch.long, device=patches.device
            ).index_fill(0, patches, 1)
            kept_ends = nn.functional.pad(kept.cumsum(0), (1, 0))[ends.long()].unique_consecutive()
        self.segments.append((ends, kept_ends.int()))
        return self.segments[-1][1]

    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        starts = upload([0, *self.packed.lengths[:-1]], self.packed.units.device).cumsum(0)
        return self.valid, (self.kept[self.block_index] - starts[:, None]) * self.valid

    def sizes(self) -> Tensor:
        return self.size[self.block_index] * self.valid

    def drop_patches(self, selection: PatchSelection, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        used = valid_positions(selection)
        # picture by picture, in the order of the view
        block_positions = self.block_index.gather(1, selection.index).flatten()[used]
        kept_positions, order = block_positions.sort()
        kept = self.rows_of(kept_positions)[None]
        rows = gather_rows(hidden, kept)
        merged = None
        if selection.into is not None:
            units = self.by_unit(hidden[0]).flatten(1)[self.block_index]
            merged = (
                weighed_means(units, self.sizes(), selection.into, selection.index)
                .flatten(0, 1)[used][order]
                .unflatten(1, (self.packed.unit, -1))
            )
        self.entry_index = self.entry_index[kept_positions]
        self.size = selection.size.flatten()[used][order]
        self.is_output = ~selection.unread.flatten()[used][order]
        new_position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        self.block_index = pad_sequence(list(new_position.split(list(selection.counts))), batch_first=True)
        self.valid = upload(first_units(selection.counts), hidden.device)
        self.invalid_code = torch.maximum(self.invalid_code, selection.wrong)
        self.stages[after] = selection.counts
        self.kept_units[after] = self.kept.sort().values
        self.remaining = selection.counts
        self.segments.clear()
        return rows if merged is None else self.with_units(rows[0], merged)[None], kept


def first_units(counts: Sequence[int]) -> Tensor:
    """[P, U] bool, the first ``counts`` units of each picture; on the host, without a device access."""
    return torch.arange(max(counts), device="cpu") < torch.tensor(counts, device="cpu")[:, None]


@dataclasses.dataclass(frozen=True)
class SurvivingPatches:
    """Units that enter the first block, in raster order.

    Attributes
    ----------
    units : Tensor
        [K] their numbers among those of all pictures.
    size : Tensor
        [K] how many units each represents.
    is_output : Tensor
        [K] bool, it is used after the tower.
    counts : tuple of int
        Units of each picture.
    pooled : tuple of int
        Units of each picture that are pooled context, unused after the tower.
    wrong : Tensor
        0-dim code of what the method returned (runtime/validation.py).
    chosen : PatchSelection or None
        The selection; None for all units.
    lengths : tuple of int
        Units of each whole picture.
    """

    units: Tensor
    size: Tensor
    is_output: Tensor
    counts: tuple[int, ...]
    pooled: tuple[int, ...]
    wrong: Tensor
    chosen: PatchSelection | None = None
    lengths: tuple[int, ...] = ()

    @classmethod
    def all(cls, lengths: list[int], device: torch.device) -> SurvivingPatches:
        """Every unit of every picture."""
        units = torch.arange(sum(lengths), device=device)
        return cls(
            units=units,
            size=torch.ones(len(units), device=device),
            is_output=torch.ones_like(units, dtype=torch.bool),
            counts=tuple(lengths),
            pooled=(0,) * len(lengths),
            wrong=torch.zeros((), dtype=torch.long, device=device),
        )

    @classmethod
    def of(cls, selection: PatchSelection, lengths: list[int]) -> SurvivingPatches:
        """The units of a selection before the blocks."""
        positions = valid_positions(selection)
        start = upload([0, *lengths[:-1]], positions.device).cumsum(0)
        return cls(
            units=(selection.index + start[:, None]).flatten()[positions],
            size=selection.size.flatten()[positions],
            is_output=~selection.unread.flatten()[positions],
            counts=selection.counts,
            pooled=selection.pooled,
            wrong=selection.wrong,
            chosen=selection,
            lengths=tuple(lengths),
        )

    def entering(self, units: Tensor) -> Tensor:
        """Rows that enter the first block [K, C], of those of all units [U, C]."""
        if self.chosen is None or self.chosen.into is None:
            return units[self.units]
        return self.chosen.entering(pad_sequence(list(units.split(self.lengths)), batch_first=True)).flatten(0, 1)[
            valid_positions(self.chosen)
        ]


def valid_positions(selection: PatchSelection) -> Tensor:
    """Positions of valid units among [P * K]."""
    return upload(first_units(selection.counts).flatten().nonzero()[:, 0], selection.index.device)


class VarlenTowerHooks(TowerHooks):
    """The hooks on one packed tower."""

    def around(
        self, tower: VarlenTower, depth: int, original: Callable[..., Any], embed: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The forward of the tower."""

        @functools.wraps(original)
        def forward(hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
            running = self.current_state()
            if running is None:
                return original(hidden_states, grid_thw, **kwargs)
            context, reducer = running
            spans = [(h * w // tower.unit,) * t for t, h, w in context.encoding.sizes]
            stages = self.stages(context, reducer, spans, depth)
            if not stages:
                return original(hidden_states, grid_thw, **kwargs)
            recomputed = recomputes(tower.module)
            if max(stages) and recomputed:
                raise recomputation_error()
            rows = embed(hidden_states) if 0 in stages else hidden_states
            with torch.no_grad(), compat.without_autocast(rows):
                tower_state, tables, entering = self._pack(
                    context, reducer, tower, stages, spans, rows, hidden_states, recomputed
                )
            context.tower_work.state = tower_state
            if context.call.standalone or tower_state is None:
                context.tower_work.embedded = rows if 0 in stages else None
                del rows, entering
                return original(hidden_states, grid_thw, **kwargs)
            context.tower_work.embedded = (
                entering.entering(rows.view(-1, tower.unit * rows.shape[1])).view(-1, rows.shape[1])
                if 0 in stages
                else None
            )
            del rows, entering
            output = original(hidden_states, grid_thw, **(kwargs | tables))  # the patches are embedded already
            output.pooler_output = tower_state.whole(output.pooler_output)
            if getattr(output, "deepstack_features", None) is not None:
                output.deepstack_features = [tower_state.whole(level) for level in output.deepstack_features]
            return output

        return forward

    def embedding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the patch embedding: returns the embeddings that were computed for the selection."""

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = self.current_state()
            if running is None or running[0].tower_work.embedded is None:
                return original(*args, **kwargs)
            rows, running[0].tower_work.embedded = running[0].tower_work.embedded, None
            return rows

        return forward

    def cut_so_far(self) -> VarlenTowerState | None:
        """The state, if units have been dropped after a block."""
        running = self.current_state()
        tower_state: VarlenTowerState | None = (
            None if running is None or running[0].call.standalone else running[0].tower_work.state
        )
        return (
            tower_state
            if tower_state is not None and len(tower_state.entry_index) < len(tower_state.packed.units)
            else None
        )

    def hand_over(self, block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a block: pass the tables of the kept rows."""
        tower_state = self.cut_so_far()
        if tower_state is None:
            return None
        positions = tuple(
            table[tower_state.patches(tower_state.entry_index)] for table in kwargs["position_embeddings"]
        )
        return args, kwargs | {
            "cu_seqlens": tower_state.kept_ends(kwargs["cu_seqlens"]),
            "position_embeddings": positions,
        }

    def merged(self, merger: Any, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of a merger: one row for each unit that entered the first block."""
        tower_state = self.cut_so_far()
        if tower_state is None or len(output) != len(tower_state.entry_index):
            return None
        return output.new_zeros(len(tower_state.packed.units), output.shape[1]).index_copy(
            0, tower_state.entry_index, output
        )

    def _pack(
        self, context: EncodeContext, reducer: TowerReducer, tower: VarlenTower, stages: dict[int, tuple[int, ...]], spans: list[tuple[int, ...]],
        rows: Tensor, pixels: Tensor, recomputed: bool,
    ) -> tuple[VarlenTowerState | None, dict[str, Any], SurvivingPatches]:  # fmt: skip
        """The state of the reduced tower (None: nothing is dropped), the tables of its units, and the units that enter
        the first block."""
        unit = tower.unit
        side = round(unit**0.5)
        grids = tuple((h // side, w // side) for t, h, w in context.encoding.sizes for _ in range(t))
        lengths = [height * width for height, width in grids]
        device = rows.device
        survivors = SurvivingPatches.all(lengths, device)
        uses_size_bias = use_size_bias(reducer, not is_flash(tower.module) and not recomputed)
        if 0 in stages:
            pictures = rows.detach().view(-1, unit, rows.shape[1]).split(lengths)
            valid = pad_sequence(
                [torch.ones(n, unit, dtype=torch.bool, device=device) for n in lengths], batch_first=True
            )
            pixel_groups = pixels_by_frame(pixels, tower, lengths) if Input.PIXELS in reducer.requires else None
            previous_picture = previous_pictures(context, spans)
            patches = pad_sequence(list(pictures), batch_first=True)
            selection = select_patches(
                reducer, patches, valid, stages[0], grids, uses_size_bias, pixel_groups, previous_picture
            )
            survivors = SurvivingPatches.of(selection, lengths)
            if sum(survivors.counts) == sum(lengths):
                return None, {}, survivors
        # the host has read it: asking the device again would wait for it
        grid = torch.tensor(context.encoding.sizes, device="cpu")
        tables, order, slots = tower.tables(grid, survivors.units, survivors.counts)
        block_position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        tower_state = VarlenTowerState(
            stages=stages,
            grids=grids,
            uses_size_bias=uses_size_bias,
            invalid_code=survivors.wrong,
            pooled_count=survivors.pooled,
            packed=PackedUnits(survivors.units, order, slots, lengths, unit),
            size=survivors.size[order],
            is_output=survivors.is_output[order],
            entry_index=torch.arange(len(order), device=device),
            block_index=pad_sequence(list(block_position.split(list(survivors.counts))), batch_first=True),
            valid=upload(first_units(survivors.counts), device),
            remaining=survivors.counts,
        )
        if 0 in stages:
            tower_state.stages[0] = survivors.counts
            tower_state.kept_units[0] = survivors.units
        return tower_state, tables if 0 in stages else {}, survivors


def pixels_by_frame(pixels: Tensor, tower: VarlenTower, lengths: list[int]) -> Tensor:
    """Pixels [N, c T p p] unit by unit, frame by frame: [P, U, T, m]."""
    frames = (
        pixels.detach()
        .view(sum(lengths), tower.unit, -1, tower.steps, tower.patch**2)
        .permute(0, 3, 1, 2, 4)
        .flatten(2)
    )
    return pad_sequence(list(frames.split(lengths)), batch_first=True)
