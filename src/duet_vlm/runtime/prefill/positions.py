"""Positions of kept tokens: the original ones, or renumbered."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.models.adapter import Adapter, Rotary
from duet_vlm.ops.ragged import gather_last_dim, gather_rows, last_true
from duet_vlm.planning.tokens import TokenMap


def prompt_positions(position_ids: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """The positions the decoder would use: as given ([..., B or 1, S]) or 0..S-1."""
    return torch.arange(rows, device=device)[None] if position_ids is None else position_ids


def compact_positions(valid: Tensor) -> Tensor:
    """0..n-1 over the valid tokens of [B, T]; padding gets 0."""
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def entry_positions(position_ids: Tensor, tokens: TokenMap, positions: str) -> Tensor:
    """Positions of the tokens that enter the decoder."""
    return (
        compact_positions(tokens.valid)
        if positions == "compact"
        else gather_last_dim(position_ids, tokens.prompt_index)
    )


def next_positions(position_ids: Tensor, valid: Tensor) -> Tensor:
    """The position after the last ``valid`` [B, T] token of each prompt, as ``generate`` continues: [B] or, with
    M-RoPE, [3, B].

    This is not the largest one: time positions of a video may exceed those of the text after it.
    """
    last = (
        gather_last_dim(position_ids, last_true(valid).long().argmax(1, keepdim=True).to(position_ids.device))[..., 0]
        + 1
    )
    return last if position_ids.ndim == 2 else last[-3:]


def group_rotary(
    adapter: Adapter, hidden: Tensor, rotary: Rotary, tokens: TokenMap, positions: str, kind: str
) -> Rotary:
    """(cos, sin) of the current tokens in layers of type ``kind``.

    Gathered from the entering sequence, or computed for renumbered positions.
    """
    if positions == "compact":
        return adapter.rotary(hidden, compact_positions(tokens.valid), kind)
    return gather_rows(rotary[0], tokens.entry_index), gather_rows(rotary[1], tokens.entry_index)
