"""Marks of dropped rows: NaN in their place keeps every count of the stock model valid until the decoder begins."""

from __future__ import annotations

from torch import Tensor

MARK = float("nan")  # value of dropped rows; kept rows are checked to be finite


def is_marked(rows: Tensor) -> Tensor:
    """Rows [..., D] that were dropped: [...] bool."""
    return rows[..., 0].isnan()
