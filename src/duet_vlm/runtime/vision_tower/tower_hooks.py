"""Select the units that go through the tower's blocks, and expand the tower's output to its full length.

Dropped patches come back as zeros after the tower, so that everything that the model does with its output (select a
layer, cut CLS off, shuffle cells of patches into tokens, pool, split by pictures) runs unchanged. Units are whole
cells, so no kept token mixes with such a row. Towers with a batch of pictures are served here; those that pack them
into one sequence in ``varlen.py`` and ``concatenated.py``.
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
from duet_vlm.runtime.vision_tower.capabilities import recomputation_error, recomputes, takes_bias, use_size_bias
from duet_vlm.runtime.vision_tower.patch_groups import (
    in_cells,
    in_patches,
    previous_pictures,
    selectable_units,
    stages_of,
)
from duet_vlm.runtime.vision_tower.selection import select_patches


class TowerHooks:
    """The hooks on the towers of one model."""

    def __init__(self, adapter: Adapter, state: ThreadState) -> None:
        self.adapter, self.state = adapter, state

    def current_state(self) -> tuple[EncodeContext, TowerReducer] | None:
        """The running encoder call, if a method drops patches in its tower."""
        context = self.state.encode_contexts[-1] if self.state.encode_contexts else None
        return (
            None if context is None or context.config.tower_reducer is None else (context, context.config.tower_reducer)
        )

    def stages(
        self,
        context: EncodeContext,
        tower: TowerReducer,
        spans: list[tuple[int, ...]],
        depth: int,
        whole: int | None = None,
    ) -> dict[int, tuple[int, ...]]:
        """The stages of this call: number of blocks whose attention has run -> kept units of each picture, by the plan
        of its span.

        ``spans`` are the units of each picture, span by span; ``whole`` is their number in the tower, where that is
        larger. Where a threshold decides, the counts are empty.
        """
        if context.config.by_threshold:
            return {0: ()}
        num_cls = self.adapter.num_cls_rows(context.encoding)
        num_separators = self.adapter.num_separator_rows(context.encoding, len(spans))
        plans = []
        for sizes, separators in zip(spans, num_separators, strict=True):
            plans.append(
                context.config.plan_span(
                    [units + num_cls for units in sizes], separators, context.call.per_crop, num_cls=num_cls
                )
            )
        kept = [
            tower_counts(plan, sizes, num_cls, tower.least)
            if plan.tower is not None
            else [whole or units for units in sizes]
            for plan, sizes in zip(plans, spans, strict=True)
        ]
        available = [
            max(1, units) if plan.tower is not None else whole or units
            for plan, sizes in zip(plans, spans, strict=True)
            for units in sizes
        ]
        return stages_of(
            tower,
            available,
            [units for counts in kept for units in counts],
            depth,
            [whole or units for sizes in spans for units in sizes],
        )

    def embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Post-hook of the patch embedding."""
        running = self.current_state()
        if running is not None:
            running[0].tower_work.patches = output.detach()
            running[0].tower_work.pixels = args[0].detach() if Input.PIXELS in running[1].requires else None

    def enter(
        self,
        blocks: TowerBlocks,
        depth: int,
        parameters: tuple[str, ...],
        stack: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Pre-hook of the stack of blocks: pass the kept rows."""
        running = self.current_state()
        if running is None or running[0].tower_work.patches is None:
            return None
        context, tower = running
        recomputed = recomputes(blocks.tower)
        with torch.no_grad(), compat.without_autocast(running[0].tower_work.patches):
            context.tower_work.state = self._begin(context, tower, blocks, depth, recomputed)
        context.tower_work.patches = context.tower_work.pixels = None
        # a standalone call gets the stock output
        if context.tower_work.state is None or context.call.standalone or context.tower_work.state.is_stock:
            return None
        new_kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        new_kwargs[parameters[0]] = context.tower_work.state.enter(new_kwargs[parameters[0]])
        if "attention_mask" in parameters and max(context.tower_work.state.stages) == 0:  # else block by block
            new_kwargs["attention_mask"] = context.tower_work.state.mask(
                new_kwargs.get("attention_mask"), new_kwargs[parameters[0]]
            )
        return (), new_kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Post-hook of the tower: expand its output to all rows."""
        running = self.current_state()
        if running is None or running[0].tower_work.state is None or running[0].call.standalone:
            return
        tower_state: BatchedTowerState = running[0].tower_work.state
        width = tower_state.num_cls + tower_state.units.shape[1] * tower_state.cells.shape[1]

        def full(rows: Tensor | None) -> Tensor | None:  # None: not returned
            return rows if rows is None or rows.shape[1] != width else tower_state.whole(rows)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(full, output.hidden_states))

    def _begin(
        self, context: EncodeContext, tower: TowerReducer, blocks: TowerBlocks, depth: int, recomputed: bool
    ) -> BatchedTowerState | None:
        """The state of the reduced tower; None: nothing is dropped.

        ``recomputed``: its blocks run again in the backward pass.
        """
        assert context.tower_work.patches is not None
        pictures, _, height, width = context.tower_work.patches.shape
        cell = self.adapter.cell_of(context.encoding, blocks)
        device = context.tower_work.patches.device
        grid = height // cell, width // cell
        num_units = grid[0] * grid[1]
        spans = self.adapter.images_of(context.encoding, pictures, num_units)
        stages = self.stages(context, tower, spans, depth, num_units)
        if not stages:
            return None
        cells = in_cells(torch.arange(height * width, device=device).view(height, width), cell)
        rows = context.tower_work.patches.flatten(2).transpose(1, 2)
        valid = self.adapter.real_patches(context.encoding, pictures)
        valid = torch.ones(rows.shape[:2], dtype=torch.bool, device=device) if valid is None else upload(valid, device)
        valid = valid[:, cells]
        if self.adapter.feeds_padding:  # the last token of a picture is used, padding or not
            valid[:, -1] = True
        valid[:, 0] |= ~valid.any(2).any(1)[:, None]  # one unit of a crop that packing drops completely
        all_units = torch.ones_like(valid[..., 0])
        content = valid.any(2)
        uses_size_bias = use_size_bias(tower, takes_bias(blocks, stages, recomputed))
        tower_state = BatchedTowerState(
            stages=stages,
            grids=(grid,) * pictures,
            num_cls=blocks.num_cls,
            uses_size_bias=uses_size_bias,
            invalid_code=torch.zeros((), dtype=torch.long, device=device),
            pooled_count=(0,) * pictures,
            units=torch.arange(num_units, device=device).expand(pictures, -1),
            valid=all_units,
            is_output=all_units,
            content=content,
            size=all_units.float(),
            cells=cells,
            total=blocks.num_cls + height * width,
        )
        if max(stages) and recomputed:
            raise recomputation_error()
        if 0 not in stages:
            return tower_state
        pixels = (
            None
            if context.tower_work.pixels is None
            else in_patches(context.tower_work.pixels, height, width)[:, cells].flatten(2)[:, :, None]
        )
        if stages[0]:
            valid = valid | (selectable_units(all_units, content, stages[0]) & ~content)[..., None]
        selection = select_patches(
            tower,
            rows[:, cells],
            valid,
            stages[0],
            [grid] * pictures,
            uses_size_bias,
            pixels,
            previous_pictures(context, spans),
        )
        if min(selection.counts) == num_units:
            return None
        tower_state.begin(selection)
        return tower_state


def parameter_names(stack: nn.Module) -> tuple[str, ...]:
    """The parameter names of a stack of blocks, in order."""
    forward: Callable[..., Any] = stack.forward
    return tuple(inspect.signature(forward).parameters)
