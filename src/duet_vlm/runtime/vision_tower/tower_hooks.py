"""In front of the tower's blocks: choose the units that go through them, and hand out what comes out at its full length.

Rows that left come back as zeros behind the tower, so that everything that the model does with its output (select a layer, cut CLS off,
shuffle cells of patches into tokens, pool, split by pictures) runs unchanged. Units are whole cells, so no living token ever mixes with such
a row. Towers whose pictures stand side by side in a batch are served here; those that pack them into one row in ``packed.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.models.adapter import Adapter, TowerBlocks
from duet_vlm.ops.ragged import upload
from duet_vlm.planning.spans import tower_counts
from duet_vlm.reducers.inputs import Input
from duet_vlm.reducers.vision_tower import TowerReducer
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext, ThreadState
from duet_vlm.runtime.vision_tower.batched import BatchedTowerState
from duet_vlm.runtime.vision_tower.capabilities import bias_refusal, recomputes, runs_again, takes_bias
from duet_vlm.runtime.vision_tower.patch_groups import content_first, frames_before, in_cells, in_patches, stages_of
from duet_vlm.runtime.vision_tower.selection import select_patches


class TowerHooks:
    """The hooks on the towers of one model."""

    def __init__(self, adapter: Adapter, state: ThreadState) -> None:
        self.adapter, self.state = adapter, state

    def current_state(self) -> tuple[EncodeContext, TowerReducer] | None:
        """The running encoder call, if something reduces in its tower."""
        call = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        return None if call is None or call.config.tower_reducer is None else (call, call.config.tower_reducer)

    def stages(
        self, call: EncodeContext, tower: TowerReducer, spans: list[tuple[int, ...]], depth: int, whole: int | None = None
    ) -> dict[int, tuple[int, ...]]:
        """After the attention of how many of ``depth`` blocks units leave, and how many of each picture are left then, by the plan of its span;
        ``spans``: units of each picture, span by span, and ``whole`` where the tower sees more of it. Where a threshold decides, none are named.
        """
        if call.config.by_threshold:
            return {0: ()}
        fed, beside = self.adapter.num_cls_rows(call.encoding), self.adapter.num_separator_rows(call.encoding, len(spans))
        plans = [call.config.plan_span([n + fed for n in sizes], rows, call.per_crop, fed=fed) for sizes, rows in zip(spans, beside, strict=True)]
        left = [
            tower_counts(plan, sizes, fed, tower.least) if plan.tower is not None else [whole or n for n in sizes]
            for plan, sizes in zip(plans, spans, strict=True)
        ]
        before = [max(1, n) if plan.tower is not None else whole or n for plan, sizes in zip(plans, spans, strict=True) for n in sizes]
        return stages_of(tower, before, [n for some in left for n in some], depth, [whole or n for sizes in spans for n in sizes])

    def embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Post-hook of the patch embedding."""
        if running := self.current_state():
            running[0].patches = output.detach()
            running[0].pixels = args[0].detach() if Input.PIXELS in running[1].requires else None

    def enter(
        self, blocks: TowerBlocks, depth: int, parameters: tuple[str, ...], stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Pre-hook of what runs the blocks: hand over the rows that are left."""
        running = self.current_state()
        if running is None or running[0].patches is None:
            return None
        call, tower = running
        again = recomputes(blocks.tower)
        with torch.no_grad(), compat.without_autocast(running[0].patches):
            call.tower_state = self._begin(call, tower, blocks, depth, again)
        call.patches = call.pixels = None
        if call.tower_state is None or call.standalone or call.tower_state.is_stock:  # who calls the encoder himself gets what the stock model gives
            return None
        given = dict(zip(parameters, args, strict=False)) | kwargs
        given[parameters[0]] = call.tower_state.enter(given[parameters[0]])
        if "attention_mask" in parameters and max(call.tower_state.stages) == 0:  # else block by block
            given["attention_mask"] = call.tower_state.mask(given.get("attention_mask"), given[parameters[0]])
        return (), given

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the tower: every row that it hands out at its old place."""
        running = self.current_state()
        if running is None or running[0].tower_state is None or running[0].standalone:
            return
        run: BatchedTowerState = running[0].tower_state
        width = run.num_cls + run.units.shape[1] * run.cells.shape[1]

        def full(rows: Tensor | None) -> Tensor | None:  # None: a layer that nobody asked for
            return rows if rows is None or rows.shape[1] != width else run.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def _begin(self, call: EncodeContext, tower: TowerReducer, blocks: TowerBlocks, depth: int, again: bool) -> BatchedTowerState | None:
        """What goes through the tower; None: all of it. ``again``: its blocks run a second time in the backward pass."""
        assert call.patches is not None
        pictures, _, high, wide = call.patches.shape
        cell, device = self.adapter.cell_of(call.encoding, blocks), call.patches.device
        grid = high // cell, wide // cell
        total = grid[0] * grid[1]
        spans = self.adapter.images_of(call.encoding, pictures, total)
        stages = self.stages(call, tower, spans, depth, total)
        if not stages:
            return None
        cells = in_cells(torch.arange(high * wide, device=device).view(high, wide), cell)
        rows = call.patches.flatten(2).transpose(1, 2)
        real = self.adapter.real_patches(call.encoding, pictures)
        real = torch.ones(rows.shape[:2], dtype=torch.bool, device=device) if real is None else upload(real, device)
        real = real[:, cells]
        if self.adapter.feeds_padding:  # then the last token of a picture is one, padding or not
            real[:, -1] = True
        real[:, 0] |= ~real.any(2).any(1)[:, None]  # of a crop that packing cuts off as a whole one unit goes through
        every, content = torch.ones_like(real[..., 0]), real.any(2)
        weighs = bias_refusal(tower, takes_bias(blocks, stages, again))
        run = BatchedTowerState(
            stages, (grid,) * pictures, blocks.num_cls, weighs, torch.zeros((), dtype=torch.long, device=device), (0,) * pictures,
            torch.arange(total, device=device).expand(pictures, -1), every, every, content, every.float(), cells, blocks.num_cls + high * wide,
        )  # fmt: skip
        if max(stages) and again:
            raise runs_again()
        if 0 not in stages:
            return run
        pixels = None if call.pixels is None else in_patches(call.pixels, high, wide)[:, cells].flatten(2)[:, :, None]
        if stages[0]:
            real = real | (content_first(every, content, stages[0]) & ~content)[..., None]
        chosen = select_patches(tower, rows[:, cells], real, stages[0], [grid] * pictures, weighs, pixels, frames_before(call, spans))
        if min(chosen.counts) == total:
            return None
        run.begin(chosen)
        return run


def names_of(stack: nn.Module) -> tuple[str, ...]:
    """The names of what a stack of blocks takes, in order."""
    plain: Callable[..., Any] = stack.forward
    return tuple(inspect.signature(plain).parameters)
