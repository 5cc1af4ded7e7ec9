"""Optimisers and schedule. Muon moves the matrices inside the layers, AdamW everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of a stack of matrices (n, rows, columns) near 1 (Newton-Schulz, quintic).

    The iteration needs no more than bf16 and follows the autocast setting of the caller.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonalised step; matrices of one shape are handled as one stack."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
            for shape, params in by_shape.items():
                self._step_stack(params, shape, group)

    def _step_stack(self, params: list[nn.Parameter], shape: tuple[int, ...], group: dict) -> None:
        updates = []
        for p in params:
            state = self.state[p]
            if "average" not in state:
                state["average"] = torch.zeros_like(p)
            state["average"].lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(state["average"], group["momentum"]))
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for p, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * scale)


def optimizers(
    named: Iterable[tuple[str, nn.Parameter]], matrix: float, query_key: float, embedding: float, rest: float
) -> list[torch.optim.Optimizer]:
    """Optimisers with the learning rates that this width bears.

    Query and key matrices take a quarter of the usual Muon rate: at full rate they forget the attention patterns that
    they start with before the rest has learned to use them.

    Parameters
    ----------
    named : (name, parameter) pairs
    matrix, query_key : float
        Muon rates of the layers' matrices.
    embedding : float
        AdamW rate of patch, position and class embeddings of the tower and of token embeddings.
    rest : float
        AdamW rate of norms, biases, projector and heads.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "query_key": [], "embedding": [], "rest": []}
    for name, p in named:
        if p.ndim == 2 and ".layers." in name:
            groups["query_key" if "q_proj" in name or "k_proj" in name else "matrix"].append(p)
        else:
            groups["embedding" if "embed" in name else "rest"].append(p)
    adam = [{"params": groups[g], "lr": lr} for g, lr in (("embedding", embedding), ("rest", rest)) if groups[g]]
    out: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, betas=(0.9, 0.98), weight_decay=0.01)] if adam else []
    if groups["matrix"]:
        out += [Muon(groups["matrix"], matrix), Muon(groups["query_key"], query_key, weight_decay=0.0)]
    return out


def rate(progress: float, warm: float = 0.02, flat: float = 0.5) -> float:
    """Learning rate factor at ``progress`` in 0..1: short warm-up, flat, then a straight line to 2 %."""
    if progress < warm:
        return progress / warm + 0.02
    return 1.0 if progress < flat else max(0.02, (1 - progress) / (1 - flat))
