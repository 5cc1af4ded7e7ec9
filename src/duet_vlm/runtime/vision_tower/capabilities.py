"""What a tower's attention kernel and gradient checkpointing allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from duet_vlm.models.adapter import TowerBlocks
from duet_vlm.reducers.vision_tower import TowerReducer


def bias_refusal(tower: TowerReducer, possible: bool) -> bool:
    """Whether rows stand for several in the attention; ``possible``: a bias can be handed to it."""
    if tower.pooled_context_tokens and not possible:
        raise ValueError(
            f"pooled_context_tokens={tower.pooled_context_tokens}: rows that stand for what leaves need a bias of the tower's attention, which flash attention does not take, "
            "nor does this tower with gradient checkpointing: leave context out, or load the tower with attn_implementation='sdpa'"
        )
    return possible and (tower.proportional_attention or tower.pooled_context_tokens > 0)


def takes_bias(blocks: TowerBlocks, stages: dict[int, tuple[int, ...]], again: bool) -> bool:
    """Whether the attention of a tower can be biased; without, pictures that keep unlike many cannot stand in one batch."""
    if not is_flash(blocks.tower):
        return blocks.takes_mask or not again
    for counts in stages.values():
        if len(set(counts)) == 1:
            continue
        if not counts:
            raise ValueError(
                "flash attention takes no mask, and a threshold keeps unlike many units of the pictures of a batch: give keep=, or load the tower "
                "with attn_implementation='sdpa'"
            )
        raise ValueError(
            f"flash attention takes no mask, and the pictures of this call would keep {min(counts)} to {max(counts)} units: give a fraction that "
            "leaves equally many, or load the tower with attn_implementation='sdpa'"
        )
    return False


def is_flash(tower: Any) -> bool:
    """Whether a tower's attention kernel takes neither mask nor bias."""
    return "flash" in (tower.config._attn_implementation or "")


def recomputes(tower: nn.Module) -> bool:
    """Whether blocks run again in the backward pass, when nobody knows any more which call they belonged to."""
    return torch.is_grad_enabled() and tower.training and any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


def runs_again() -> ValueError:
    """Where units leave behind blocks, nobody could repeat that."""
    return ValueError(
        "units cannot leave behind a block of a vision tower that runs again in the backward pass (gradient checkpointing): switch it off for "
        "the tower, or take a method that chooses in front of the blocks (contrast)"
    )
