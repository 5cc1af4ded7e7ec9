"""The computation that is the same for all runs of a batch, done once: the lower layers of the vision tower.

They depend on the pixels alone, and no method takes signals from them, so a dozen methods on one batch need not repeat
them. Answers are bit-equal to those without sharing (a test compares). Timing never happens inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from duet_vlm.models.lookup import adapter_for


class SharedVision:
    """The lower vision layers of a model, for calls with the same images."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(adapter_for(model).layers_before_signals())
        self.output: Any = None  # of the last of them, known after the first call

    @contextlib.contextmanager
    def reused(self) -> Iterator[None]:
        """The first call inside computes the layers, later ones (inside a later ``with``, too) get its output; undone
        at the end."""
        try:
            for layer in self.layers:
                layer.forward = self._instead_of(layer.forward, layer is self.layers[-1])
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _instead_of(self, real: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def forward(hidden: Any, *args: Any, **kwargs: Any) -> Any:
            if self.output is not None:
                return self.output if is_last else hidden
            made = real(hidden, *args, **kwargs)
            if is_last:
                self.output = made
            return made

        return forward
