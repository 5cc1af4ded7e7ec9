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
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from duet_vlm.flow import compat
from duet_vlm.flow.call import EncoderCall
from duet_vlm.flow.tower import TowerFlow, choose, is_flash, recomputes
from duet_vlm.models.adapter import PackedTower, Recorded
from duet_vlm.tower import TowerReducer


@dataclasses.dataclass
class PackedRun:
    """``Run`` of a packed tower.

    Attributes
    ----------
    units : Tensor
        [K] units that are left, in raster order, and their ``size`` [K].
    order : Tensor
        [K] where these stand in the order that the blocks work in, among those that are left.
    slots : Tensor
        [K] where the blocks, in their order, would have had the same units in the whole row.
    total, unit : int
        Units of the whole row, and patches of each.
    segments : list of int
        Patches of each picture of the whole row.
    embedded : Tensor or None
        Patch embeddings of what is left [K * unit, D], until the tower asks for them.
    """

    merges_left: ClassVar[bool] = True

    counts: tuple[int, ...]
    units: Tensor
    size: Tensor
    order: Tensor
    slots: Tensor
    total: int
    unit: int
    segments: list[int]
    weighs: bool
    wrong: Tensor
    embedded: Tensor | None = None
    seen: int = 0  # rows whose attention ran in this block

    @property
    def ran(self) -> Sequence[int]:
        ends = torch.tensor(self.segments, device=self.units.device).cumsum(0) // self.unit
        return torch.bincount(torch.bucketize(self.units, ends, right=True), minlength=len(ends)).tolist()

    def alive(self) -> Tensor:
        return self.whole(torch.ones_like(self.size)[:, None]).repeat_interleave(self.unit, 0)[None]

    def whole(self, rows: Tensor) -> Tensor:
        """Rows of the units that are left [K, D] among those of all [U, D], zeros elsewhere."""
        return rows.new_zeros(self.total, rows.shape[1]).index_copy(0, self.units, rows)

    def recorded(self, calls: list[Recorded]) -> list[Recorded]:
        place = (self.slots[:, None] * self.unit + torch.arange(self.unit, device=self.slots.device)).flatten()

        def of_all(rows: Tensor) -> tuple[Tensor, ...]:
            shape = list(rows.shape)
            shape[2] = self.total * self.unit
            return rows.new_zeros(shape).index_copy(2, place, rows).split(self.segments, 2)

        size = self.size[self.order].repeat_interleave(self.unit).view(1, 1, -1)
        query, key = (of_all(torch.cat([getattr(one, name) for one in calls], 2)) for name in ("query", "key"))
        sizes = of_all(size)
        return [dataclasses.replace(calls[0], query=q, key=k, segments=None, size=s[:, 0]) for q, k, s in zip(query, key, sizes, strict=True)]

    def bias(self, key: Tensor) -> Tensor | None:
        """Of the next rows of the block that runs: attention comes segment by segment."""
        if not self.weighs:
            return None
        rows, total = key.shape[2], self.unit * len(self.units)
        first, self.seen = self.seen, (self.seen + rows) % total
        size = self.size[self.order].repeat_interleave(self.unit)[first : first + rows]
        return size.log().to(key.dtype)[None, None, None]


class PackedFlow(TowerFlow):
    """The hooks on one packed tower."""

    def around(self, tower: PackedTower, plain: Callable[..., Any], embed: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the tower."""

        @functools.wraps(plain)
        def forward(hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
            running = self.running()
            if running is None:
                return plain(hidden_states, grid_thw, **kwargs)
            call, reducer = running
            sizes = call.encoding.sizes
            counts = self.counts(call, [(h * w // tower.unit,) * t for t, h, w in sizes])
            if sum(counts) * tower.unit == sum(t * h * w for t, h, w in sizes):
                return plain(hidden_states, grid_thw, **kwargs)
            rows = embed(hidden_states)
            run, tables = self._pack(call, reducer, tower, rows, counts, grid_thw)
            call.tower = run
            if call.aside:
                return plain(hidden_states, grid_thw, **kwargs)
            of_patches = (run.units[:, None] * tower.unit + torch.arange(tower.unit, device=rows.device)).flatten()
            run.embedded = rows[of_patches]
            del rows
            output = plain(hidden_states, grid_thw, **(kwargs | tables))  # the pixels are embedded already
            output.pooler_output = run.whole(output.pooler_output)
            if getattr(output, "deepstack_features", None) is not None:
                output.deepstack_features = [run.whole(level) for level in output.deepstack_features]
            return output

        return forward

    def embedding(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the patch embedding: what is left was embedded to choose by."""

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = self.running()
            run = None if running is None else running[0].tower
            if run is None or run.embedded is None:
                return plain(*args, **kwargs)
            rows, run.embedded = run.embedded, None
            return rows

        return forward

    def _pack(
        self, call: EncoderCall, reducer: TowerReducer, tower: PackedTower, rows: Tensor, counts: tuple[int, ...], grid_thw: Tensor
    ) -> tuple[PackedRun, dict[str, Any]]:
        """What goes through the tower, and the tables that belong to it."""
        unit, side = tower.unit, round(tower.unit**0.5)
        grids = [(h // side, w // side) for t, h, w in call.encoding.sizes for _ in range(t)]
        lengths = [rows * columns for rows, columns in grids]
        total = sum(lengths)
        with torch.no_grad(), compat.without_autocast(rows):
            pictures = rows.detach().view(total, unit, -1).split(lengths)
            real = pad_sequence([torch.ones(n, unit, dtype=torch.bool, device=rows.device) for n in lengths], batch_first=True)
            weighs = reducer.mass and not is_flash(tower.module) and not recomputes(tower.module)
            chosen = choose(reducer, pad_sequence(list(pictures), batch_first=True), real, counts, grids, weighs)
            start = torch.tensor([0, *lengths[:-1]], device=rows.device).cumsum(0)
            left = torch.arange(max(counts), device="cpu") < torch.tensor(counts, device="cpu")[:, None]  # known here: the device is not asked
            place = left.flatten().nonzero()[:, 0].to(rows.device)
            flat, size = (chosen.index + start[:, None]).flatten()[place], chosen.size.flatten()[place]
            tables, order, slots = tower.tables(grid_thw, flat, counts)
        run = PackedRun(counts, flat, size, order, slots, total, unit, [n * unit for n in lengths], weighs, chosen.wrong)
        return run, tables
