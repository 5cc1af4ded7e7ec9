"""Prepared attention masks for fewer tokens, and windows counted in positions of the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm.models.adapter import FULL
from duet_vlm.ops.ragged import gather_square
from duet_vlm.runtime.compat import is_allowed


def valid_tokens(mask: Any, embeds: Tensor) -> Tensor:
    """Valid tokens [B, S] bool of a 2-D mask, a prepared 4-D mask (a valid token attends to itself), a dict of those,
    or None."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention masks of type {type(mask).__name__} cannot follow dropped tokens: use sdpa, eager or flash attention"
        )
    if mask.ndim == 2:
        if mask.shape != embeds.shape[:2]:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, the prompt {tuple(embeds.shape[:2])}")
        return mask.bool()
    return is_allowed(mask[:, 0]).diagonal(dim1=1, dim2=2).expand(embeds.shape[:2])


def documents(mask: Any, position_ids: Tensor | None, valid: Tensor, cached: bool) -> Tensor:
    """First tokens of documents [B, S] bool, in rows that pack several of them, by the rules of the stock models.

    In a prepared mask these are tokens that attend to nothing before themselves; without mask and cache, tokens whose
    position does not follow the one before.
    """
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        first = is_allowed(mask[:, 0]).to(torch.uint8).argmax(-1).expand(valid.shape)
        return valid & (first == torch.arange(valid.shape[1], device=valid.device))
    starts = torch.zeros_like(valid)
    if mask is None and not cached and position_ids is not None and (position_ids.ndim == 2 or len(position_ids) == 4):
        # the other three are patch coordinates
        text_positions = position_ids if position_ids.ndim == 2 else position_ids[0]
        starts[:, 1:] = (text_positions.diff(dim=-1) != 1).to(valid.device)
        starts[:, 0] = starts.any(1)
    return starts


def cut_mask(mask: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """A prepared 4-D mask for the rows ``index`` [B, T']; keys that are not ``valid`` [B, T'] are hidden."""
    cut = gather_square(mask, index)
    hidden = ~valid[:, None, None, :]
    return cut & ~hidden if cut.dtype == torch.bool else cut.masked_fill(hidden, torch.finfo(cut.dtype).min)


def window(valid: Tensor, positions: Tensor, num_queries: int, size: int) -> Tensor:
    """Visible keys of the last ``num_queries`` tokens: valid, not later, fewer than ``size`` positions back.

    valid, positions [B, K] -> [B, 1, num_queries, K] bool.
    """
    distance = positions[:, -num_queries:, None] - positions[:, None, :]
    return (valid[:, None, :] & (distance >= 0) & (distance < size))[:, None]
