"""Limits of a tower's attention kernel and of gradient checkpointing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from duet_vlm.models.adapter import TowerBlocks
from duet_vlm.reducers.vision_tower import TowerReducer


def use_size_bias(tower: TowerReducer, possible: bool) -> bool:
    """True if the attention gets a size bias; ``possible``: its kernel takes one.

    Raises
    ------
    ValueError
        Pooled context without a bias.
    """
    if tower.options.pooled_context_tokens and not possible:
        raise ValueError(
            f"pooled_context_tokens={tower.options.pooled_context_tokens}: rows that represent dropped units need a bias of the tower's attention, which flash "
            "attention does not take, nor does this tower with gradient checkpointing: leave context out, or load the tower with attn_implementation='sdpa'"
        )
    return possible and (tower.options.proportional_attention or tower.options.pooled_context_tokens > 0)


def takes_bias(blocks: TowerBlocks, stages: dict[int, tuple[int, ...]], recomputed: bool) -> bool:
    """True if the attention of a tower takes a bias; without one, all pictures of a batch must keep equal counts."""
    if not is_flash(blocks.tower):
        return blocks.takes_mask or not recomputed
    for counts in stages.values():
        if len(set(counts)) == 1:
            continue
        if not counts:
            raise ValueError(
                "flash attention takes no mask, and a threshold keeps unequal numbers of units of the pictures of a batch: give keep=, or load the tower "
                "with attn_implementation='sdpa'"
            )
        raise ValueError(
            f"flash attention takes no mask, and the pictures of this call would keep {min(counts)} to {max(counts)} units: give a fraction that "
            "leaves equally many, or load the tower with attn_implementation='sdpa'"
        )
    return False


def is_flash(tower: Any) -> bool:
    """True if a tower's attention kernel takes neither mask nor bias."""
    return "flash" in (tower.config._attn_implementation or "")


def recomputes(tower: nn.Module) -> bool:
    """True if blocks run again in the backward pass, when their call is no longer known."""
    return (
        torch.is_grad_enabled()
        and tower.training
        and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    )


def recomputation_error() -> ValueError:
    """The error for drops after blocks that run again, where they could not be repeated."""
    return ValueError(
        "units cannot be dropped after a block of a vision tower that runs again in the backward pass (gradient checkpointing): switch it off for "
        "the tower, or take a method that selects before the blocks (contrast)"
    )
