"""Information of rows: contribution to the spectrum of all rows, and the residual of an approximation by a few rows."""

from __future__ import annotations

import torch
from torch import Tensor


def information(rows: Tensor, valid: Tensor) -> Tensor:
    """Compute sum over k of |U_ik S_k| of the singular value decomposition rows = U S W (TokenCarve).

    From the eigenvectors of the smaller Gram matrix, N x N or D x D (TokenCarve decomposes the rows themselves);
    padding counts as zeros.

    Parameters
    ----------
    rows : Tensor
        [B, N, D].
    valid : Tensor
        [B, N] bool, False for padding.

    Returns
    -------
    Tensor
        [B, N] float32.
    """
    rows = rows.float() * valid[..., None]
    count, width = rows.shape[1:]
    if count > width:
        return (rows @ torch.linalg.eigh(rows.transpose(1, 2) @ rows).eigenvectors).abs().sum(-1)
    values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
    return (vectors.abs() @ values.clamp(min=0).sqrt()[..., None])[..., 0]


def residual(rows: Tensor, basis: Tensor, ridge: Tensor | float) -> Tensor:
    """Subtract from each row its best approximation by the basis rows (ridge regression).

    Parameters
    ----------
    rows : Tensor
        [B, N, D].
    basis : Tensor
        [B, M, D]; rows of zeros are ignored.
    ridge : float or Tensor
        Weight of the squared coefficients, above 0, a number or [B, 1, 1]; raised where basis rows are so large and so
        similar that float32 cannot separate them.

    Returns
    -------
    Tensor
        [B, N, D] float32.
    """
    rows, basis = rows.float(), basis.float()
    gram, identity = basis @ basis.transpose(1, 2), torch.eye(basis.shape[1], device=basis.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    larger = ridge + 8 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    factor = torch.where(failed[:, None, None] > 0, torch.linalg.cholesky_ex(gram + larger * identity).L, factor)
    return rows - torch.cholesky_solve(basis @ rows.transpose(1, 2), factor).transpose(1, 2) @ basis
