"""What a row has that others have not: what it adds to the spectrum of all rows, and what a few rows cannot make of it."""

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


def residual(rows: Tensor, basis: Tensor, ridge: Tensor | float) -> Tensor:
    """What is left of each row when the best combination of the basis rows is taken away: rows [B, N, D], basis [B, M, D] -> [B, N, D] float32.

    Best by least squares with ``ridge`` (or [B, 1, 1] of them), above 0, times the squared coefficients; more where rows of the basis are so large
    and so alike that float32 takes them for one. Basis rows of zeros count for nothing.
    """
    rows, basis = rows.float(), basis.float()
    gram, one = basis @ basis.transpose(1, 2), torch.eye(basis.shape[1], device=basis.device)
    factor, wrong = torch.linalg.cholesky_ex(gram + ridge * one)
    more = ridge + 8 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    factor = torch.where(wrong[:, None, None] > 0, torch.linalg.cholesky_ex(gram + more * one).L, factor)
    return rows - torch.cholesky_solve(basis @ rows.transpose(1, 2), factor).transpose(1, 2) @ basis
