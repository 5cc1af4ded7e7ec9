"""How much each row adds to the spectrum of all rows."""

from __future__ import annotations

import torch
from torch import Tensor


def information(rows: Tensor, valid: Tensor) -> Tensor:
    """Sum over k of |U_ik S_k| of the singular value decomposition rows = U S W: rows [B, N, D], valid [B, N] -> [B, N] float32.

    From the eigenvectors of the smaller Gram matrix, N x N or D x D (TokenCarve, which decomposes the rows themselves); rows that are not valid
    count as zeros.
    """
    rows = rows.float() * valid[..., None]
    count, width = rows.shape[1:]
    if count > width:
        return (rows @ torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors).abs().sum(-1)
    values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
    return (vectors.abs() @ values.clamp(min=0).sqrt()[..., None])[..., 0]
