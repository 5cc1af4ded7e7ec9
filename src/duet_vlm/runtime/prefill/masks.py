"""Attention masks that families or callers prepared, for fewer rows, and windows counted in the slots of the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from duet_vlm.models.adapter import FULL
from duet_vlm.ops.ragged import gather_square
from duet_vlm.runtime.compat import is_allowed


def real_rows(mask: Any, embeds: Tensor) -> Tensor:
    """[B, S] bool from a 2-D mask, a prepared 4-D mask (a real row sees itself), a dict of those, or nothing."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if mask is None:
        return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention masks of type {type(mask).__name__} cannot follow dropped tokens: use sdpa, eager or flash attention")
    if mask.ndim == 2:
        if mask.shape != embeds.shape[:2]:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, the prompt {tuple(embeds.shape[:2])}")
        return mask.bool()
    return is_allowed(mask[:, 0]).diagonal(dim1=1, dim2=2).expand(embeds.shape[:2])


def documents(mask: Any, position_ids: Tensor | None, valid: Tensor, cached: bool) -> Tensor:
    """[B, S] bool: where a document begins, in rows that pack several of them, as stock models find it out: in a prepared mask a row that
    sees nothing before itself; without mask and cache, positions that do not follow each other."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        first = is_allowed(mask[:, 0]).to(torch.uint8).argmax(-1).expand(valid.shape)
        return valid & (first == torch.arange(valid.shape[1], device=valid.device))
    begins = torch.zeros_like(valid)
    if mask is None and not cached and position_ids is not None and (position_ids.ndim == 2 or len(position_ids) == 4):
        text = position_ids if position_ids.ndim == 2 else position_ids[0]  # the other three say where patches are
        begins[:, 1:] = (text.diff(dim=-1) != 1).to(valid.device)
        begins[:, 0] = begins.any(1)
    return begins


def cut_mask(mask: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """A prepared 4-D mask for the rows ``index`` [B, T']; keys that are not ``valid`` [B, T'] are hidden."""
    cut = gather_square(mask, index)
    hidden = ~valid[:, None, None, :]
    return cut & ~hidden if cut.dtype == torch.bool else cut.masked_fill(hidden, torch.finfo(cut.dtype).min)


def window(valid: Tensor, slots: Tensor, rows: int, size: int) -> Tensor:
    """Which keys the last ``rows`` of them see as queries: real ones, not later, fewer than ``size`` slots back.

    valid, slots [B, K] -> [B, 1, rows, K] bool.
    """
    back = slots[:, -rows:, None] - slots[:, None, :]
    return (valid[:, None, :] & (back >= 0) & (back < size))[:, None]
