"""What ranking makes of all rows is not made again: the layer itself is handed that of the rows that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from duet_vlm.ops.ragged import gather_rows


class ProjectionCache:
    """What modules of a ranking layer (norm, key projection) made of all rows [B, T, ...], between ranking and the layer's own pass."""

    def __init__(self) -> None:
        self.recording = False
        self.by_module: dict[nn.Module, Tensor] = {}

    def keep(self, chosen: Tensor) -> None:
        """Only rows ``chosen`` [B, T'] go on."""
        self.by_module = {module: gather_rows(rows, chosen.to(rows.device)) for module, rows in self.by_module.items()}


def reuse_projection(module: nn.Module, running: Callable[[], ProjectionCache | None]) -> Callable[..., Any]:
    """A forward of ``module`` that is run once per ranking; ``running`` gives what the prefill that runs has made, if one does."""
    forward = module.forward

    def forward_once(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = None if torch.compiler.is_compiling() else running()
        if made is None:
            return forward(hidden, *args, **kwargs)
        if made.recording:
            made.by_module[module] = forward(hidden, *args, **kwargs)
            return made.by_module[module]
        rows = made.by_module.pop(module, None)
        return forward(hidden, *args, **kwargs) if rows is None else rows

    return forward_once
