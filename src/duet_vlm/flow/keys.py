"""The key projection of a layer that ranks is made once: for all rows, to rank them, and the layer itself is handed those that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duet_vlm.ops.ragged import take


class Keys:
    """What a layer's key projection made of all rows [B, T, Hkv * d], between ranking and the layer's own pass."""

    def __init__(self) -> None:
        self.recording = False
        self.made: Tensor | None = None

    def keep(self, chosen: Tensor) -> None:
        """Only rows ``chosen`` [B, T'] go on."""
        if self.made is not None:
            self.made = take(self.made, chosen.to(self.made.device))


def reusing(project: Callable[..., Any], running: Callable[[], Keys | None]) -> Callable[..., Any]:
    """A key projection that is run once per ranking; ``running`` gives the keys of the prefill that runs, if one does."""

    def project_once(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys = None if torch.compiler.is_compiling() else running()
        if keys is None:
            return project(hidden, *args, **kwargs)
        if keys.recording:
            keys.made = project(hidden, *args, **kwargs)
            return keys.made
        made, keys.made = keys.made, None
        return project(hidden, *args, **kwargs) if made is None else made

    return project_once
