"""In front of the tower's blocks: choose the units that go through them, and hand out what comes out at its full length.

Rows that left come back as zeros behind the tower, so that everything that the model does with its output (select a layer, cut CLS off,
shuffle cells of patches into tokens, pool, pack) runs unchanged. Units are whole cells, so no living token ever mixes with such a row.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.flow import compat
from duet_vlm.flow.call import EncoderCall, Stacks
from duet_vlm.flow.verify import checked_units
from duet_vlm.models.adapter import Adapter, Blocks, Recorded
from duet_vlm.ops.merge import sizes_of
from duet_vlm.ops.ragged import pack_right, take, take_square
from duet_vlm.parts import left_in_tower
from duet_vlm.tower import TowerReducer, TowerView


@dataclasses.dataclass(frozen=True)
class TowerRun:
    """What goes through the tower in one call; P pictures.

    Attributes
    ----------
    counts : tuple of int
        Units of each picture that are left.
    rows : Tensor
        [P, R] rows in front of the patches, and the patches that are left, unit by unit.
    valid : Tensor
        [P, R] bool; pictures may keep unlike many.
    size : Tensor
        [P, R] float32, how many rows each stands for; 0 where it is not valid.
    total : int
        Rows of the whole tower.
    extra : int
        Rows in front of the patches.
    weighs : bool
        Sizes bias the attention.
    wrong : Tensor
        The code of what the method returned (flow/verify.py).
    """

    counts: tuple[int, ...]
    rows: Tensor
    valid: Tensor
    size: Tensor
    total: int
    extra: int
    weighs: bool
    wrong: Tensor

    def alive(self) -> Tensor:
        """[P, N, 1] float32: which patches are left."""
        there = torch.zeros(len(self.rows), self.total, device=self.rows.device)
        return there.scatter_add(1, self.rows, self.valid.float()).clamp(max=1.0)[:, self.extra :, None]

    def whole(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Rows that are left, along ``dim``, as those of the whole tower: zeros where they are gone."""
        shape = list(rows.shape)
        shape[dim] = self.total + 1  # the last one collects what is not valid
        place = torch.where(self.valid, self.rows, self.total)
        place = place.view(len(place), *[1] * (dim - 1), -1, *[1] * (rows.ndim - dim - 1)).expand(rows.shape)
        return rows.new_zeros(shape).scatter(dim, place, rows).narrow(dim, 0, self.total)

    def recorded(self, one: Recorded) -> Recorded:
        """Queries and keys of the rows that are left as those of all, each with its size."""
        query, key = (self.whole(x, 2) for x in (one.query, one.key))
        return dataclasses.replace(one, query=query, key=key, size=self.whole(self.size))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention logits [P, 1, 1, R]; None where that is nothing."""
        if not self.weighs and len(set(self.counts)) == 1:
            return None
        return self.size.log().clamp(min=torch.finfo(dtype).min).to(dtype)[:, None, None]


class TowerFlow:
    """The hooks on the towers of one model."""

    def __init__(self, adapter: Adapter, stacks: Stacks) -> None:
        self.adapter, self.stacks = adapter, stacks

    def _call(self) -> tuple[EncoderCall, TowerReducer] | None:
        """The running encoder call, if something reduces in its tower."""
        call = self.stacks.encoders[-1] if self.stacks.encoders else None
        tower = None if call is None else getattr(call.rules.reducer, "tower", None)
        return None if call is None or tower is None else (call, tower)

    def embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Post-hook of the patch embedding."""
        if running := self._call():
            running[0].patches = output.detach()

    def enter(self, blocks: Blocks, parameters: tuple[str, ...], stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of what runs the blocks: hand over the rows that are left."""
        running = self._call()
        if running is None or running[0].patches is None:
            return None
        call, tower = running
        with torch.no_grad(), compat.without_autocast(call.patches):
            call.tower, call.patches = self._choose(call, tower, blocks), None
        if call.tower is None or call.aside:  # who calls the encoder himself gets what the stock model gives
            return None
        given = dict(zip(parameters, args, strict=False)) | kwargs
        given[parameters[0]] = take(given[parameters[0]], call.tower.rows)
        if blocks.masks:
            given["attention_mask"] = cut(given.get("attention_mask"), call.tower, given[parameters[0]].dtype)
        return (), given

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the tower: every row that it hands out at its old place."""
        running = self._call()
        if running is None or running[0].tower is None or running[0].aside:
            return
        run: TowerRun = running[0].tower

        def full(rows: Tensor | None) -> Tensor | None:  # None: a layer that nobody asked for
            return rows if rows is None or rows.shape[1] != run.rows.shape[1] else run.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def _choose(self, call: EncoderCall, tower: TowerReducer, blocks: Blocks) -> TowerRun | None:
        assert call.patches is not None
        pictures, _, *grid = call.patches.shape
        rows, columns = (size // blocks.cell for size in grid)
        counts = self._counts(call, pictures, rows * columns)
        if min(counts) == rows * columns:
            return None
        away = call.patches.flatten(2).transpose(1, 2).float()
        away = away - away.mean(1, keepdim=True)
        units = in_cells(torch.arange(grid[0] * grid[1], device=away.device).view(1, -1, 1), grid, blocks.cell)[0, :, :, 0]  # [U, patches]
        real = self.adapter.real_patches(call.encoding, pictures)
        contrast = away.norm(dim=-1) if real is None else away.norm(dim=-1).masked_fill(~real.to(away.device), -1.0)  # padding leaves first
        keep = torch.tensor(counts, device=away.device)
        valid = torch.ones(pictures, rows * columns, dtype=torch.bool, device=away.device)
        last = torch.zeros_like(valid)
        if tower.keep_predicting:  # the last row of a picture may have to predict
            last[:, -1] = True
        view = TowerView(
            valid & ~last, keep - last.sum(1), tuple(n - tower.keep_predicting for n in counts), (rows, columns),
            contrast[:, units].mean(2) if "contrast" in tower.tower_signals else None,
        )  # fmt: skip
        mask, wrong = checked_units(tower, tower.stay(view), view)
        mask = mask | last
        kept, there = pack_right(mask, max(counts))
        weighs = tower.mass and takes_bias(blocks, counts)
        size = sizes_of(away[:, units].mean(2), mask, kept, there) if weighs else there.float()
        front = torch.arange(blocks.extra, device=away.device).expand(pictures, -1)
        patches = blocks.extra + units[kept].flatten(1)
        there, size = (x.repeat_interleave(units.shape[1], 1) for x in (there, size))
        return TowerRun(
            counts, torch.cat([front, patches], 1), torch.cat([torch.ones_like(front, dtype=torch.bool), there], 1),
            torch.cat([torch.ones_like(front, dtype=size.dtype), size], 1), blocks.extra + units.numel(), blocks.extra, weighs, wrong,
        )  # fmt: skip

    def _counts(self, call: EncoderCall, pictures: int, units: int) -> tuple[int, ...]:
        """Units of each picture that are left, by the plan of its span."""
        fed = self.adapter.fed(call.encoding)
        counts: list[int] = []
        for sizes in self.adapter.passes(call.encoding, [units] * pictures):
            counts += left_in_tower(call.rules.span([size + fed for size in sizes], 0, call.each), sizes)
        return tuple(counts)


def takes_bias(blocks: Blocks, counts: tuple[int, ...]) -> bool:
    """Whether the tower's attention can be biased; without, pictures that keep unlike many cannot go through it together."""
    if blocks.masks and "flash" not in (blocks.tower.config._attn_implementation or ""):
        return True
    if len(set(counts)) > 1:
        raise ValueError(
            f"the tower's attention takes no mask, and the pictures of this call would keep {min(counts)} to {max(counts)} units: give a fraction "
            "that leaves equally many, or load the tower with attn_implementation='sdpa'"
        )
    return False


def cut(mask: Any, run: TowerRun, dtype: torch.dtype) -> Any:
    """The attention mask of the rows that are left, with the bias of their sizes; None where nothing is hidden and all weigh alike."""
    bias = run.bias(dtype)
    if not isinstance(mask, Tensor):
        return bias
    seen = take_square(mask, run.rows)
    if seen.dtype == torch.bool:
        seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return seen if bias is None else (seen + bias).clamp(min=torch.finfo(dtype).min)


def in_cells(patches: Tensor, grid: list[int], cell: int) -> Tensor:
    """Patches [P, h * w, c], line by line, as units of cell x cell patches: [P, U, cell * cell, c]; what fills no cell is left out."""
    rows, columns = (size // cell for size in grid)
    table = patches.unflatten(1, grid)[:, : rows * cell, : columns * cell]
    return table.unflatten(2, (columns, cell)).unflatten(1, (rows, cell)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def names_of(stack: nn.Module) -> tuple[str, ...]:
    """The names of what a stack of blocks takes, in order."""
    plain: Callable[..., Any] = stack.forward
    return tuple(inspect.signature(plain).parameters)
