"""Timers around the parts of a model: hooks that note the time and change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from duet_vlm.models.adapter import Adapter


class StageTimers:
    """Times of one pass. On CUDA the device's own clock is noted, so nothing waits for it before ``read``.

    Made before a handle is attached; ``inside`` is called after, so that its hooks run within the handle's: the time
    between the two is the handle's own work.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.notes: dict[str, list[Any]] = {}
        self.hooks: list[Any] = []
        self.muted = False  # the hooks note nothing; ``note`` still does
        self.cuda = next(adapter.model.parameters()).device.type == "cuda"
        for index, layer in enumerate(adapter.layers):
            self._before(layer, f"hook {index}")
        self._after(adapter.projector(), "projector ends")

    def inside(self) -> None:
        adapter = self.adapter
        tower = adapter.tower()
        for part in tower if isinstance(tower, nn.ModuleList) else [tower]:  # a list of towers is never called itself
            self._before(part, "tower starts")
            self._after(part, "tower ends")
        self._before(adapter.projector(), "projector starts")
        for index, layer in enumerate(adapter.layers):
            self._before(layer, f"layer {index} starts")
            self._after(layer, f"layer {index} ends")

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def note(self, name: str) -> None:
        """Record the time of ``name`` once more."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            now: Any = event
        else:
            now = time.perf_counter()
        self.notes.setdefault(name, []).append(now)

    def read(self) -> dict[str, float]:
        """Seconds of each stage of the pass, and of its layers: ``layer i``, and ``hook i`` for the handle's work
        before it."""
        if self.cuda:
            torch.cuda.synchronize()
        depth = len(self.adapter.layers)
        inside = any(module is self.adapter.projector() for module in self.adapter.tower().modules())
        tower, projector = self._total("tower starts", "tower ends"), self._total("projector starts", "projector ends")
        encode = self._total("encode starts", "encode ends")
        tower -= projector * inside
        seconds = {"vision": tower, "projector": projector, "v2v": max(0.0, encode - tower - projector)}
        seconds |= {
            "prefill": self._total("prefill starts", "prefill ends"),
            "decode step": self._mean("step starts", "step ends"),
        }
        for index in range(depth):
            seconds[f"layer {index}"] = self._first(f"layer {index} starts", f"layer {index} ends")
            seconds[f"hook {index}"] = self._first(f"hook {index}", f"layer {index} starts")
        return seconds | {"to first token": encode + seconds["prefill"]}

    def _pairs(self, start: str, end: str) -> list[float]:
        pairs = zip(self.notes.get(start, []), self.notes.get(end, []), strict=False)
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]

    def _total(self, start: str, end: str) -> float:
        return sum(self._pairs(start, end))

    def _mean(self, start: str, end: str) -> float:
        pairs = self._pairs(start, end)
        return sum(pairs) / len(pairs) if pairs else 0.0

    def _first(self, start: str, end: str) -> float:
        """Seconds of the prompt's own pass; later ones are steps of decoding."""
        return self._pairs(start, end)[0]

    def _before(self, module: nn.Module, name: str) -> None:
        self.hooks.append(module.register_forward_pre_hook(self._noting(name)))

    def _after(self, module: nn.Module, name: str) -> None:
        self.hooks.append(module.register_forward_hook(self._noting(name)))

    def _noting(self, name: str) -> Callable[..., None]:
        def note(*ignored: Any) -> None:
            if not self.muted:
                self.note(name)

        return note
