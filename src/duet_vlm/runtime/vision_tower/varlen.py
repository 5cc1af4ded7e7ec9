"""Towers that pack all pictures of a call into one row of patches (Qwen2-VL and its relatives): only the survivors are packed.

The stock forward takes every table of positions, segments and windows ready-made, so it is called with those of the patches that are left. Its
merger then runs on survivors only, and their tokens go back to their places. All patches are embedded once: that is what is chosen by.
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
from duet_vlm.reducers.vision_tower import Grid, TowerReducer
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext
from duet_vlm.runtime.vision_tower.capabilities import bias_refusal, is_flash, recomputes, runs_again
from duet_vlm.runtime.vision_tower.patch_groups import frames_before
from duet_vlm.runtime.vision_tower.selection import PatchSelection, select_patches
from duet_vlm.runtime.vision_tower.state import TowerState
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks


@dataclasses.dataclass
class VarlenTowerState(TowerState):
    """``Run`` of a packed tower. The blocks work on units in an order of their own (windows).

    Attributes
    ----------
    units : Tensor
        [K] units of the whole row that come to the first block, in raster order.
    order : Tensor
        [K] where these stand in the order that the blocks work in, among those that come.
    slots : Tensor
        [K] where the blocks, in their order, would have had the same units in the whole row.
    size : Tensor
        Of each unit that is left, in the order of the blocks, how many it stands for.
    place : Tensor
        Of the same, where they stood when the first block began.
    shown, there : Tensor
        [P, U] where the units of each picture that are left stand in that order, as the method sees them, and which are real.
    read : Tensor
        Of each unit that is left, in the order of the blocks, whether it is read behind the tower.
    lengths : list of int
        Units of each picture of the whole row.
    unit : int
        Patches of a unit.
    """

    pending_merges: ClassVar[bool] = True
    num_cls: ClassVar[int] = 0  # type: ignore[misc]

    stages: dict[int, tuple[int, ...]]
    grids: tuple[Grid, ...]
    uses_size_bias: bool
    invalid_code: Tensor
    pooled_count: tuple[int, ...]
    units: Tensor
    order: Tensor
    slots: Tensor
    size: Tensor
    read: Tensor
    place: Tensor
    shown: Tensor
    there: Tensor
    lengths: list[int]
    unit: int
    passed: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # since each cut, the units that were left, in raster order
    remaining: tuple[int, ...] = ()  # units of each picture, on the host
    segments: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)  # of the blocks, and what the last cut has left of them
    seen: int = 0  # rows whose attention ran in this block

    @property
    def run_stages(self) -> list[TowerStages]:
        ends = upload(self.lengths, self.units.device).cumsum(0)
        counts = [torch.bincount(torch.bucketize(units, ends, right=True), minlength=len(ends)).tolist() for units in self.passed.values()]
        return [tuple(zip(self.passed, left, strict=True)) for left in zip(*counts, strict=True)]

    @property
    def patches_of_unit(self) -> int:
        return self.unit

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def left(self) -> Tensor:
        """Units of the whole row that are left, in the order of the blocks."""
        return self.units[self.order[self.place]]

    def survivors(self) -> Tensor:
        return self.size.new_zeros(self.total).index_copy(0, self.left, self.read.float()).repeat_interleave(self.unit)[None, :, None]

    def whole(self, rows: Tensor) -> Tensor:
        """Rows of the units that came to the first block [K, D] among those of all [U, D], zeros elsewhere."""
        return rows.new_zeros(self.total, rows.shape[1]).index_copy(0, self.units, rows)

    def record_attention(self, calls: list[RecordedQK]) -> list[RecordedQK]:
        place, segments = self.patches(self.slots[self.place]), [n * self.unit for n in self.lengths]

        def of_all(rows: Tensor) -> tuple[Tensor, ...]:
            shape = list(rows.shape)
            shape[2] = self.total * self.unit
            return rows.new_zeros(shape).index_copy(2, place, rows).split(segments, 2)

        query, key = (of_all(torch.cat([getattr(one, name) for one in calls], 2)) for name in ("query", "key"))
        sizes = of_all(self.row_sizes().view(1, 1, -1))
        return [dataclasses.replace(calls[0], query=q, key=k, segments=None, size=s[:, 0]) for q, k, s in zip(query, key, sizes, strict=True)]

    def projected(self, rows: Tensor) -> Tensor:
        """What a merger makes of the units that are left [n, D] at their places among those of all [U, D], in the order of the blocks."""
        return rows.new_zeros(self.total, rows.shape[1]).index_copy(0, self.slots[self.place], rows)

    def patches(self, units: Tensor) -> Tensor:
        """Numbers of units [n] as those of their patches [n * unit]."""
        return (units[:, None] * self.unit + torch.arange(self.unit, device=units.device)).flatten()

    def by_unit(self, rows: Tensor) -> Tensor:
        """Rows as the blocks have them [R, D], unit by unit [n, unit, D]."""
        return rows.unflatten(0, (-1, self.unit))

    def rows_of(self, units: Tensor) -> Tensor:
        """Numbers of the rows that go on where only these units do, of those that are left now [n] -> [R']."""
        return self.patches(units)

    def with_units(self, rows: Tensor, units: Tensor) -> Tensor:
        """Rows [R, D] with those of the units that are left in their places [n, unit, D]."""
        return units.flatten(0, 1)

    def row_sizes(self) -> Tensor:
        """Of each row, in the order of the blocks, how many it stands for in the attention."""
        return (self.size if self.uses_size_bias else torch.ones_like(self.size)).repeat_interleave(self.unit)

    def mask(self, mask: Any, key: Tensor) -> Any:
        """Of the next rows of the block that runs: attention comes segment by segment."""
        if not self.uses_size_bias or not self.passed:
            return mask
        size = self.row_sizes()
        first, self.seen = self.seen, (self.seen + key.shape[2]) % len(size)
        return size[first : first + key.shape[2]].log().to(key.dtype)[None, None, None]

    def of_units(self, rows: Tensor) -> Tensor:
        return self.by_unit(rows[0]).mean(1, dtype=torch.float32)[self.shown]

    def attention(self, calls: list[RecordedQK]) -> Tensor:
        query, key = (torch.cat([getattr(one, name) for one in calls], 2) for name in ("query", "key"))
        counts = self.row_counts()
        pictures = zip(query.split(counts, 2), key.split(counts, 2), self.row_sizes()[None].split(counts, 1), strict=True)
        return torch.cat([column_attention(q, k, calls[0].scaling, calls[0].sample, size) for q, k, size in pictures], 1)

    def row_counts(self) -> list[int]:
        """Of each picture, how many rows the blocks have."""
        return [n * self.unit for n in self.remaining]

    def ends_left(self, ends: Tensor) -> Tensor:
        """Ends of the segments of the rows that came to the first block, as those of the rows that are left. Of whole pictures they are known;
        which windows are empty is read from the device, once for all blocks behind a cut."""
        for whole, left in self.segments:
            if whole is ends:
                return left
        if len(ends) == len(self.remaining) + 1 and all(self.remaining):  # a segment for each picture
            left = upload([0, *self.remaining], ends.device).cumsum(0) * self.unit
        else:
            patches = self.patches(self.place)
            alive = torch.zeros(len(self.units) * self.unit, dtype=torch.long, device=patches.device).index_fill(0, patches, 1)
            left = nn.functional.pad(alive.cumsum(0), (1, 0))[ends.long()].unique_consecutive()
        self.segments.append((ends, left.int()))
        return self.segments[-1][1]

    def view(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        starts = upload([0, *self.lengths[:-1]], self.units.device).cumsum(0)
        return self.there, (self.left[self.shown] - starts[:, None]) * self.there

    def sizes(self) -> Tensor:
        return self.size[self.shown] * self.there

    def drop_patches(self, chosen: PatchSelection, hidden: Tensor, after: int) -> tuple[Tensor, Tensor]:
        real = real_places(chosen)
        flat = self.shown.gather(1, chosen.index).flatten()[real]  # picture by picture, as the method sees them
        stays, seat = flat.sort()
        kept = self.rows_of(stays)[None]
        rows, merged = gather_rows(hidden, kept), None
        if chosen.into is not None:
            units = self.by_unit(hidden[0]).flatten(1)[self.shown]
            merged = weighed_means(units, self.sizes(), chosen.into, chosen.index).flatten(0, 1)[real][seat].unflatten(1, (self.unit, -1))
        self.place, self.size, self.read = self.place[stays], chosen.size.flatten()[real][seat], ~chosen.unread.flatten()[real][seat]
        now = torch.empty_like(seat).scatter_(0, seat, torch.arange(len(seat), device=seat.device))
        self.shown = pad_sequence(list(now.split(list(chosen.counts))), batch_first=True)
        self.there = upload(host_grids(chosen.counts), hidden.device)
        self.invalid_code, self.stages[after] = torch.maximum(self.invalid_code, chosen.wrong), chosen.counts
        self.passed[after] = self.left.sort().values
        self.remaining = chosen.counts
        self.segments.clear()
        return rows if merged is None else self.with_units(rows[0], merged)[None], kept


def host_grids(counts: Sequence[int]) -> Tensor:
    """[P, U] bool, the first ones of each picture; on the host, so that no device is asked."""
    return torch.arange(max(counts), device="cpu") < torch.tensor(counts, device="cpu")[:, None]


@dataclasses.dataclass(frozen=True)
class SurvivingPatches:
    """Units that come to the first block, in raster order: their numbers among those of all pictures, how many each stands for, and whether it is
    read behind the tower [K]; ``counts`` of each picture, of which ``pooled`` are not read."""

    units: Tensor
    size: Tensor
    read: Tensor
    counts: tuple[int, ...]
    pooled: tuple[int, ...]
    wrong: Tensor
    chosen: PatchSelection | None = None
    lengths: tuple[int, ...] = ()

    @classmethod
    def all(cls, lengths: list[int], device: torch.device) -> SurvivingPatches:
        every = torch.arange(sum(lengths), device=device)
        none, counts = torch.zeros((), dtype=torch.long, device=device), tuple(lengths)
        return cls(every, torch.ones(len(every), device=device), torch.ones_like(every, dtype=torch.bool), counts, (0,) * len(counts), none)

    @classmethod
    def of(cls, chosen: PatchSelection, lengths: list[int]) -> SurvivingPatches:
        place = real_places(chosen)
        start = upload([0, *lengths[:-1]], place.device).cumsum(0)
        units, size, read = (x.flatten()[place] for x in (chosen.index + start[:, None], chosen.size, ~chosen.unread))
        return cls(units, size, read, chosen.counts, chosen.pooled, chosen.wrong, chosen, tuple(lengths))

    def entering(self, units: Tensor) -> Tensor:
        """Of the rows of all units [U, C] those that come to the first block [K, C]."""
        if self.chosen is None or self.chosen.into is None:
            return units[self.units]
        return self.chosen.entering(pad_sequence(list(units.split(self.lengths)), batch_first=True)).flatten(0, 1)[real_places(self.chosen)]


def real_places(chosen: PatchSelection) -> Tensor:
    """Which of all places [P * K] hold a unit."""
    return upload(host_grids(chosen.counts).flatten().nonzero()[:, 0], chosen.index.device)


class VarlenTowerHooks(TowerHooks):
    """The hooks on one packed tower."""

    def around(self, tower: VarlenTower, depth: int, plain: Callable[..., Any], embed: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the tower."""

        @functools.wraps(plain)
        def forward(hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
            running = self.current_state()
            if running is None:
                return plain(hidden_states, grid_thw, **kwargs)
            call, reducer = running
            spans = [(h * w // tower.unit,) * t for t, h, w in call.encoding.sizes]
            stages = self.stages(call, reducer, spans, depth)
            if not stages:
                return plain(hidden_states, grid_thw, **kwargs)
            again = recomputes(tower.module)
            if max(stages) and again:
                raise runs_again()
            rows = embed(hidden_states) if 0 in stages else hidden_states
            with torch.no_grad(), compat.without_autocast(rows):
                run, tables, entering = self._pack(call, reducer, tower, stages, spans, rows, hidden_states, again)
            call.tower_state = run
            if call.standalone or run is None:
                call.embedded = rows if 0 in stages else None
                del rows, entering
                return plain(hidden_states, grid_thw, **kwargs)
            call.embedded = entering.entering(rows.view(-1, tower.unit * rows.shape[1])).view(-1, rows.shape[1]) if 0 in stages else None
            del rows, entering
            output = plain(hidden_states, grid_thw, **(kwargs | tables))  # the pixels are embedded already
            output.pooler_output = run.whole(output.pooler_output)
            if getattr(output, "deepstack_features", None) is not None:
                output.deepstack_features = [run.whole(level) for level in output.deepstack_features]
            return output

        return forward

    def embedding(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the patch embedding: what goes through the tower was embedded to choose by."""

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = self.current_state()
            if running is None or running[0].embedded is None:
                return plain(*args, **kwargs)
            rows, running[0].embedded = running[0].embedded, None
            return rows

        return forward

    def cut_so_far(self) -> VarlenTowerState | None:
        """What is left, if units have left behind a block."""
        running = self.current_state()
        run: VarlenTowerState | None = None if running is None or running[0].standalone else running[0].tower_state
        return run if run is not None and len(run.place) < len(run.units) else None

    def hand_over(self, block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of a block: the tables of the rows that are left."""
        run = self.cut_so_far()
        if run is None:
            return None
        positions = tuple(table[run.patches(run.place)] for table in kwargs["position_embeddings"])
        return args, kwargs | {"cu_seqlens": run.ends_left(kwargs["cu_seqlens"]), "position_embeddings": positions}

    def merged(self, merger: Any, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of a merger: a row for each unit that came to the first block."""
        run = self.cut_so_far()
        if run is None or len(output) != len(run.place):
            return None
        return output.new_zeros(len(run.units), output.shape[1]).index_copy(0, run.place, output)

    def _pack(
        self, call: EncodeContext, reducer: TowerReducer, tower: VarlenTower, stages: dict[int, tuple[int, ...]], spans: list[tuple[int, ...]],
        rows: Tensor, pixels: Tensor, again: bool,
    ) -> tuple[VarlenTowerState | None, dict[str, Any], SurvivingPatches]:  # fmt: skip
        """What goes through the tower (None: all of it), the tables that belong to it, and the units that come to the first block."""
        unit, side = tower.unit, round(tower.unit**0.5)
        grids = tuple((h // side, w // side) for t, h, w in call.encoding.sizes for _ in range(t))
        lengths = [high * wide for high, wide in grids]
        device, left = rows.device, SurvivingPatches.all(lengths, rows.device)
        weighs = bias_refusal(reducer, not is_flash(tower.module) and not again)
        if 0 in stages:
            pictures = rows.detach().view(-1, unit, rows.shape[1]).split(lengths)
            real = pad_sequence([torch.ones(n, unit, dtype=torch.bool, device=device) for n in lengths], batch_first=True)
            shown = in_frames(pixels, tower, lengths) if Input.PIXELS in reducer.requires else None
            before = frames_before(call, spans)
            chosen = select_patches(reducer, pad_sequence(list(pictures), batch_first=True), real, stages[0], grids, weighs, shown, before)
            left = SurvivingPatches.of(chosen, lengths)
            if sum(left.counts) == sum(lengths):
                return None, {}, left
        grid = torch.tensor(call.encoding.sizes, device="cpu")  # the host has read it: asking the device again would wait for it
        tables, order, slots = tower.tables(grid, left.units, left.counts)
        there = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        run = VarlenTowerState(
            stages, grids, weighs, left.wrong, left.pooled, left.units, order, slots, left.size[order], left.read[order],
            torch.arange(len(order), device=device), pad_sequence(list(there.split(list(left.counts))), batch_first=True),
            upload(host_grids(left.counts), device), lengths, unit, remaining=left.counts,
        )  # fmt: skip
        if 0 in stages:
            run.stages[0], run.passed[0] = left.counts, left.units
        return run, tables if 0 in stages else {}, left


def in_frames(pixels: Tensor, tower: VarlenTower, lengths: list[int]) -> Tensor:
    """Pixels [N, c T p p] unit by unit, frame by frame: [P, U, T, m]."""
    frames = pixels.detach().view(sum(lengths), tower.unit, -1, tower.steps, tower.patch**2).permute(0, 3, 1, 2, 4).flatten(2)
    return pad_sequence(list(frames.split(lengths)), batch_first=True)
