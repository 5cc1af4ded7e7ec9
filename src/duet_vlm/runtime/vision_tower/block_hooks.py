"""Drop or merge units inside a block of the tower, between its attention and its MLP.

The stock block runs unchanged. The norm after its attention gets only the kept rows of the residual stream, so the MLP
works on these; the output of the MLP is expanded to all rows, where the block adds it to the residual stream; after the
block only the kept rows continue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duet_vlm.models.adapter import Adapter, RecordedQK, TowerBlocks, VarlenTower
from duet_vlm.ops.ragged import gather_rows
from duet_vlm.planning.budget import TowerStages
from duet_vlm.reducers.base import Reducer
from duet_vlm.reducers.encoder import EncoderReducer
from duet_vlm.reducers.inputs import VISION_LAYER_INPUTS, Input
from duet_vlm.reducers.vision_tower import TowerReducer, tower_of
from duet_vlm.runtime import compat
from duet_vlm.runtime.context import EncodeContext
from duet_vlm.runtime.vision_tower.patch_groups import stages_of
from duet_vlm.runtime.vision_tower.selection import apply_selection
from duet_vlm.runtime.vision_tower.state import TowerState
from duet_vlm.runtime.vision_tower.tower_hooks import TowerHooks


@dataclass(frozen=True)
class BlockCut:
    """The drop inside one running block.

    Attributes
    ----------
    kept : Tensor
        [B, R'] rows that continue.
    count : int
        Rows of the block.
    change : Tensor or None
        [B, R', D] difference that merging adds to the kept rows.
    """

    kept: Tensor
    count: int
    change: Tensor | None


def depth_of(blocks: TowerBlocks | VarlenTower, adapter: Adapter, reducer: EncoderReducer) -> int:
    """The largest number of blocks after whose attention units can be dropped.

    A block whose output is used, or whose attention ranks tokens, must have the kept units only.
    """
    attentions = (
        adapter.vision_attentions(reducer.options.signal_layer) if reducer.requires & VISION_LAYER_INPUTS else []
    )
    scored_blocks = [
        number
        for number, modules in enumerate(blocks.block_modules)
        if any(modules.attention is module for module in attentions)
    ]
    return max(0, min([blocks.output_block, *scored_blocks]))


def check_boundaries(adapter: Adapter, reducer: EncoderReducer) -> None:
    """Raise where the method's boundaries do not fit the tower."""
    tower = tower_of(reducer)
    assert isinstance(tower, TowerReducer)
    if tower.options.pooled_context_tokens and tower.prunes_inside:
        raise ValueError(
            f"pooled_context_tokens={tower.options.pooled_context_tokens}: with {tower.name} units are dropped after blocks, and context is pooled from units "
            "dropped before all blocks only"
        )
    for blocks in adapter.blocks_to_reduce():
        depth = depth_of(blocks, adapter, reducer)
        if depth == 0 and tower.prunes_inside:
            raise ValueError(
                f"{tower.name}: units are dropped after blocks, but the output of the first block of this tower is used already"
            )
        boundaries = list(tower.boundaries(depth))
        if not boundaries or boundaries != sorted(set(boundaries)) or boundaries[0] < 0:
            raise ValueError(
                f"{tower.name}.boundaries({depth}) returned {boundaries}: give numbers of blocks, ascending, 0 or more"
            )
        if boundaries[-1] > depth:
            raise ValueError(
                f"{tower.name}: units would leave after the attention of {boundaries[-1]} blocks, but the rows or the attention of block {depth} "
                f"(counted from 0) are read: let them leave after at most {depth}"
            )
        if Input.BLOCK_ATTENTION in tower.requires:
            windowed = [after for after in boundaries if after and not adapter.attends_globally(after - 1)]
            if windowed:
                raise ValueError(
                    f"{tower.name}: block {windowed[0] - 1} attends within windows, so its attention ranks no whole picture"
                )


def blocks_to_cut(adapter: Adapter, reducer: Reducer, tokens: int, num_kept: int) -> TowerStages:
    """The tower's stages for a picture of ``tokens``, of which ``num_kept`` are to be kept: (block, kept tokens)."""
    tower = tower_of(reducer)
    if num_kept == tokens or not isinstance(reducer, EncoderReducer) or not isinstance(tower, TowerReducer):
        return ()
    depth = depth_of(adapter.blocks_to_reduce()[0], adapter, reducer)
    stages = stages_of(tower, [tokens], [num_kept], depth, [tokens])
    return tuple((after, counts[0] + tower.pooled_features(tokens, counts[0])) for after, counts in stages.items())


class BlockHooks:
    """The hooks on the blocks of one model's towers."""

    def __init__(self, tower_hooks: TowerHooks) -> None:
        self.tower_hooks = tower_hooks

    def _dropping_call(self, number: int) -> tuple[EncodeContext, TowerReducer, TowerState] | None:
        """The running call, if units are dropped after the attention of block ``number``."""
        running = self.tower_hooks.current_state()
        tower_state = None if running is None else running[0].tower_work.state
        if running is None or tower_state is None or running[0].call.standalone or number + 1 not in tower_state.stages:
            return None
        return (*running, tower_state)

    def before_mlp(self, number: int, norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the norm before the MLP."""
        running = self._dropping_call(number)
        if running is None:
            return None
        context, tower, state = running
        hidden = args[0]
        rows = hidden if hidden.ndim == 3 else hidden[None]
        with torch.no_grad(), compat.without_autocast(hidden):
            valid, unit_index = state.view(state.stages[number + 1])
            signals = tower_signals_of(tower, state, context.tower_work.captured_attention)
            metric = state.of_units(keys_of(context.tower_work.captured_attention)) if state.uses_size_bias else None
            selection = apply_selection(
                tower, valid, state.stages[number + 1], metric, state.sizes(), state.uses_size_bias, grids=state.grids, after=number + 1, unit_index=unit_index,
                num_cls=state.num_cls, **signals,
            )  # fmt: skip
        context.tower_work.captured_attention.clear()
        kept_rows, kept = state.drop_patches(selection, rows, number + 1)
        context.tower_work.active_cut = BlockCut(
            kept, rows.shape[1], None if selection.into is None else kept_rows - gather_rows(rows, kept)
        )
        return (kept_rows if hidden.ndim == 3 else kept_rows[0], *args[1:])

    def after_mlp(self, number: int, mlp: Any, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of the MLP: expand its output to the rows of the residual stream."""
        running = self._dropping_call(number)
        cut: BlockCut | None = None if running is None else running[0].tower_work.active_cut
        if cut is None:
            return None
        rows = output if output.ndim == 3 else output[None]
        expanded = rows.new_zeros(len(rows), cut.count, rows.shape[2]).scatter(
            1, cut.kept[..., None].expand_as(rows), rows
        )
        return expanded if output.ndim == 3 else expanded[0]

    def after_block(self, number: int, block: Any, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of the block: only kept rows continue."""
        running = self._dropping_call(number)
        cut: BlockCut | None = None if running is None else running[0].tower_work.active_cut
        if running is None or cut is None:
            return None
        running[0].tower_work.active_cut = None
        rows = gather_rows(output if output.ndim == 3 else output[None], cut.kept)
        rows = rows if cut.change is None else rows + cut.change
        return rows if output.ndim == 3 else rows[0]


def keys_of(calls: list[RecordedQK]) -> Tensor:
    """[B, R, d] float32, means over heads."""
    return torch.cat([qk.key.float().mean(1) for qk in calls], 1)


def tower_signals_of(tower: TowerReducer, state: TowerState, calls: list[RecordedQK]) -> dict[str, Tensor]:
    """The signals that a method declares, of the attention that just ran."""
    signals: dict[Input, tuple[str, Callable[[], Tensor]]] = {
        Input.BLOCK_KEYS: ("keys", lambda: state.of_units(keys_of(calls))),
        Input.KEY_NORM: (
            "key_norm",
            lambda: state.of_units(torch.cat([qk.key.float().norm(dim=-1).mean(1) for qk in calls], 1)[..., None])[
                ..., 0
            ],
        ),
        Input.BLOCK_ATTENTION: ("attention", lambda: state.of_units(state.attention(calls)[..., None])[..., 0]),
    }
    return {name: compute() for required, (name, compute) in signals.items() if required in tower.requires}
