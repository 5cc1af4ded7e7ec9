"""Frozen context for CLIP towers, as ``tower_tries.py`` tries it: what left is seen by those that stay, and never
changes.

Each cell of the grid becomes one row, the mean of its patches that left as they stood in front of the first block,
position included, and weighs as many rows as it stands for. Every block makes keys and values of the same rows; they
ask nothing and have no MLP.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from duet_vlm.profiling.model_dims import VisionDims

NAME = "tower_context"


class Context:
    """The blocks of one tower with context, where a method asked for some in the call that runs."""

    def __init__(self, tower: nn.Module) -> None:
        self.before: Tensor | None = None  # [P, 1 + N, D], the rows in front of the blocks
        # rows [P, c, D] and their weights [P, c], the log of how many each stands for
        self.frozen: tuple[Tensor, Tensor] | None = None
        self.blocks = {block.self_attn: block for block in tower.encoder.layers}
        tower.pre_layrnorm.register_forward_hook(self._begin)
        AttentionInterface.register(NAME, self._attend)
        for attention in self.blocks:
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation_internal = NAME

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.before, self.frozen = output, None

    def freeze(self, gone: Tensor, grid: tuple[int, int], cell: int) -> None:
        """Patches that left, ``gone`` [P, N] bool, by cells of ``cell`` x ``cell``."""
        assert self.before is not None
        number = torch.arange(grid[0])[:, None] // cell * (grid[1] // cell) + torch.arange(grid[1]) // cell
        member = nn.functional.one_hot(number.flatten()).T * gone[:, None].float()  # [P, c, N]
        count = member.sum(2)
        rows = member @ self.before[:, 1:] / count.clamp(min=1)[..., None]
        self.frozen = rows, count.log().clamp(min=torch.finfo(torch.float32).min)

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if self.frozen is None:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        rows, weight = self.frozen
        normed = self.blocks[module].layer_norm1(rows)
        keys, values = (
            linear(normed).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
            for linear in (module.k_proj, module.v_proj)
        )
        # in place of ``mask``: mass is not handed on
        bias = nn.functional.pad(weight, (key.shape[2], 0))[:, None, None]
        return sdpa_attention_forward(
            module, query, torch.cat([key, keys], 2), torch.cat([value, values], 2), bias, **options
        )


def context_flops(shape: VisionDims, patches: int, frozen: int) -> int:
    """FLOPs that ``frozen`` rows add to a tower through which ``patches`` of a picture go."""
    return shape.layers * (4 * frozen * shape.width**2 + 4 * (patches + shape.extra_rows) * frozen * shape.width)
