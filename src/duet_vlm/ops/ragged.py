"""Rows of unequal length in one tensor: gather, pack, pad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def upload(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers or a tensor of the host to a device without waiting for it.

    ``torch.tensor(numbers, device=device)`` waits until an accelerator has finished all earlier work; this does not.
    """
    held = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype, device="cpu")
    return held.to(device, non_blocking=True)


def after_last_true(rows: Tensor) -> Tensor:
    """Mask of the positions after the last True of each row (all where there is none): [B, S] bool -> [B, S] bool."""
    return rows.flip(1).cumsum(1).flip(1) == 0


def last_true(rows: Tensor) -> Tensor:
    """Mask of the last True of each row: [B, S] bool -> [B, S] bool."""
    return rows & (rows.flip(1).cumsum(1).flip(1) == 1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: x [B or 1, T, ...], index [B, n] -> [B, n, ...]."""
    if len(index) == x.shape[0] == 1:
        return x[0].index_select(0, index[0])[None]  # copies whole rows: a third of the time
    if x.shape[0] == 1:
        return x[0][index]
    return x[torch.arange(len(index), device=x.device)[:, None], index]


def gather_last_dim(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the last dimension of position ids, with or without M-RoPE axes.

    x [..., B or 1, T], index [B, n] -> [..., B, n].
    """
    batch, count = index.shape
    return x.expand(*x.shape[:-2], batch, x.shape[-1]).gather(-1, index.expand(*x.shape[:-2], batch, count))


def gather_square(mask: Tensor, index: Tensor) -> Tensor:
    """Gather query and key rows of an attention mask [B or 1, H, T, T]: index [B, n] -> [B, H, n, n]."""
    batch, count = index.shape
    mask = mask.expand(batch, *mask.shape[1:])
    mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], count, -1))


def pack_left(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept rows in order, short samples padded on the left.

    Parameters
    ----------
    keep : Tensor
        [B, T] bool.
    width : int
        Length of the result: at least the largest number kept, at most T.

    Returns
    -------
    index : Tensor
        [B, width] long; padding points at dropped rows.
    valid : Tensor
        [B, width] bool, False for padding.
    """
    order = keep.view(torch.uint8).sort(dim=1, stable=True).indices[:, keep.shape[1] - width :]
    return order, keep.gather(1, order)


def pack_right(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Indices of the kept rows in order, short samples padded on the right; as ``pack_left`` otherwise."""
    order = keep.view(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    return order, keep.gather(1, order)


def stacked(rows: list[Tensor]) -> Tensor:
    """Stack tensors of one shape [...] to [B, ...]; a single one is not copied."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def pad_rows(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack [n_i, ...] tensors to [B, max n, ...] with a validity mask [B, max n]; a single one is not copied."""
    lengths = upload([len(r) for r in rows], rows[0].device)
    padded = stacked(rows) if len({len(r) for r in rows}) == 1 else pad_sequence(rows, batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
