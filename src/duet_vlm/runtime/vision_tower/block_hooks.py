"""Inside a block of the tower: units leave, or join others, behind the attention and in front of the MLP.

The stock block runs on. The norm behind its attention is handed the rows that are left of the residual stream, so that the MLP works on these;
what the MLP makes of them goes back to their places, where the block adds it to the stream of all; behind the block only they are left.
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
    """What one block is doing: ``kept`` [B, R'] of its ``count`` rows stay; ``change`` [B, R', D] is what merging adds to these."""

    kept: Tensor
    count: int
    change: Tensor | None


def depth_of(blocks: TowerBlocks | VarlenTower, adapter: Adapter, reducer: EncoderReducer) -> int:
    """After the attention of how many blocks units can leave at the latest: a block whose rows are read, or whose attention ranks tokens, must
    have only those that are left."""
    ranks = adapter.vision_attentions(reducer.signal_layer) if reducer.requires & VISION_LAYER_INPUTS else []
    ranking = [number for number, inside in enumerate(blocks.block_modules) if any(inside.attention is module for module in ranks)]
    return max(0, min([blocks.output_block, *ranking]))


def check_boundaries(adapter: Adapter, reducer: EncoderReducer) -> None:
    """Raise where units cannot leave as the method of the tower wants it."""
    tower = tower_of(reducer)
    assert isinstance(tower, TowerReducer)
    if tower.pooled_context_tokens and tower.prunes_inside:
        raise ValueError(f"pooled_context_tokens={tower.pooled_context_tokens}: with {tower.name} units leave behind blocks, and only what leaves in front of all is stood for")
    for blocks in adapter.blocks_to_reduce():
        depth = depth_of(blocks, adapter, reducer)
        if depth == 0 and tower.prunes_inside:
            raise ValueError(f"{tower.name}: units leave behind blocks, but the rows of the first block of this tower are read already")
        boundaries = list(tower.boundaries(depth))
        if not boundaries or boundaries != sorted(set(boundaries)) or boundaries[0] < 0:
            raise ValueError(f"{tower.name}.boundaries({depth}) returned {boundaries}: give numbers of blocks, ascending, 0 or more")
        if boundaries[-1] > depth:
            raise ValueError(
                f"{tower.name}: units would leave after the attention of {boundaries[-1]} blocks, but the rows or the attention of block {depth} "
                f"(counted from 0) are read: let them leave after at most {depth}"
            )
        if Input.BLOCK_ATTENTION in tower.requires:
            windowed = [after for after in boundaries if after and not adapter.attends_globally(after - 1)]
            if windowed:
                raise ValueError(f"{tower.name}: block {windowed[0] - 1} attends within windows, so its attention ranks no whole picture")


def blocks_to_cut(adapter: Adapter, reducer: Reducer, tokens: int, left: int) -> TowerStages:
    """Where a picture of ``tokens`` loses some of them in the tower, if ``left`` are to be left behind it."""
    tower = tower_of(reducer)
    if left == tokens or not isinstance(reducer, EncoderReducer) or not isinstance(tower, TowerReducer):
        return ()
    depth = depth_of(adapter.blocks_to_reduce()[0], adapter, reducer)
    stages = stages_of(tower, [tokens], [left], depth, [tokens])
    return tuple((after, counts[0] + tower.pooled_features(tokens, counts[0])) for after, counts in stages.items())


class BlockHooks:
    """The hooks on the blocks of one model's towers."""

    def __init__(self, flow: TowerHooks) -> None:
        self.tower_hooks = flow

    def after_attention(self, number: int) -> tuple[EncodeContext, TowerReducer, TowerState] | None:
        """The running call, if units leave behind the attention of block ``number``."""
        running = self.tower_hooks.current_state()
        run = None if running is None else running[0].tower_state
        return None if running is None or run is None or running[0].standalone or number + 1 not in run.stages else (*running, run)

    def before_mlp(self, number: int, norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the norm in front of the MLP."""
        there = self.after_attention(number)
        if there is None:
            return None
        call, tower, run = there
        hidden = args[0]
        rows = hidden if hidden.ndim == 3 else hidden[None]
        with torch.no_grad(), compat.without_autocast(hidden):
            exist, unit = run.view(run.stages[number + 1])
            shown = attention_shares(tower, run, call.captured_attention)
            metric = run.of_units(keys_of(call.captured_attention)) if run.uses_size_bias else None
            chosen = apply_selection(
                tower, exist, run.stages[number + 1], metric, run.sizes(), run.uses_size_bias, grids=run.grids, after=number + 1, unit_index=unit,
                num_cls=run.num_cls, **shown,
            )  # fmt: skip
        call.captured_attention.clear()
        left, kept = run.drop_patches(chosen, rows, number + 1)
        call.active_cut = BlockCut(kept, rows.shape[1], None if chosen.into is None else left - gather_rows(rows, kept))
        return (left if hidden.ndim == 3 else left[0], *args[1:])

    def after_block(self, number: int, mlp: Any, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of the MLP: its rows among those of the residual stream."""
        there = self.after_attention(number)
        cutting: BlockCut | None = None if there is None else there[0].active_cut
        if cutting is None:
            return None
        rows = output if output.ndim == 3 else output[None]
        among = rows.new_zeros(len(rows), cutting.count, rows.shape[2]).scatter(1, cutting.kept[..., None].expand_as(rows), rows)
        return among if output.ndim == 3 else among[0]

    def end(self, number: int, block: Any, args: Any, output: Tensor) -> Tensor | None:
        """Post-hook of the block: only what is left goes on."""
        there = self.after_attention(number)
        cutting: BlockCut | None = None if there is None else there[0].active_cut
        if there is None or cutting is None:
            return None
        there[0].active_cut = None
        rows = gather_rows(output if output.ndim == 3 else output[None], cutting.kept)
        rows = rows if cutting.change is None else rows + cutting.change
        return rows if output.ndim == 3 else rows[0]


def keys_of(calls: list[RecordedQK]) -> Tensor:
    """[B, R, d] float32, means over heads."""
    return torch.cat([one.key.float().mean(1) for one in calls], 1)


def attention_shares(tower: TowerReducer, run: TowerState, calls: list[RecordedQK]) -> dict[str, Tensor]:
    """What a method asks for of the attention that just ran."""
    signals: dict[Input, tuple[str, Callable[[], Tensor]]] = {
        Input.BLOCK_KEYS: ("keys", lambda: run.of_units(keys_of(calls))),
        Input.KEY_NORM: ("key_norm", lambda: run.of_units(torch.cat([one.key.float().norm(dim=-1).mean(1) for one in calls], 1)[..., None])[..., 0]),
        Input.BLOCK_ATTENTION: ("attention", lambda: run.of_units(run.attention(calls)[..., None])[..., 0]),
    }
    return {name: make() for wanted, (name, make) in signals.items() if wanted in tower.requires}
