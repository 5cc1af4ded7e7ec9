"""Attention masks that families or callers prepared, for fewer rows, and windows counted in the slots of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from duet_vlm.ops.ragged import take_square


def cut_mask(mask: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """A prepared 4-D mask for the rows ``index`` [B, T']; keys that are not ``valid`` [B, T'] are hidden."""
    cut = take_square(mask, index)
    hidden = ~valid[:, None, None, :]
    return cut & ~hidden if cut.dtype == torch.bool else cut.masked_fill(hidden, torch.finfo(cut.dtype).min)


def window(valid: Tensor, slots: Tensor, rows: int, size: int) -> Tensor:
    """Which keys the last ``rows`` of them see as queries: real ones, not later, fewer than ``size`` slots back.

    valid, slots [B, K] -> [B, 1, rows, K] bool.
    """
    back = slots[:, -rows:, None] - slots[:, None, :]
    return (valid[:, None, :] & (back >= 0) & (back < size))[:, None]
