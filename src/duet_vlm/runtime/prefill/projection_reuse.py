"""Reuse of projections.

A layer whose keys were computed for scoring gets those of the kept tokens instead of computing them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.ops.ragged import gather_rows


class ProjectionCache:
    """Outputs of modules of a scoring layer (norm, key projection) [B, T, ...], between scoring and the layer's own
    forward."""

    def __init__(self) -> None:
        self.recording = False
        self.by_module: dict[nn.Module, Tensor] = {}

    def keep(self, index: Tensor) -> None:
        """Keep only the rows ``index`` [B, T']."""
        self.by_module = {module: gather_rows(rows, index.to(rows.device)) for module, rows in self.by_module.items()}


def reuse_projection(module: nn.Module, running: Callable[[], ProjectionCache | None]) -> Callable[..., Any]:
    """A forward of ``module`` that runs once per scoring.

    ``running`` returns the cache of the running prefill, if there is one.
    """
    forward = module.forward

    def forward_once(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = None if torch.compiler.is_compiling() else running()
        if cache is None:
            return forward(hidden, *args, **kwargs)
        if cache.recording:
            cache.by_module[module] = forward(hidden, *args, **kwargs)
            return cache.by_module[module]
        cached = cache.by_module.pop(module, None)
        return forward(hidden, *args, **kwargs) if cached is None else cached

    return forward_once
