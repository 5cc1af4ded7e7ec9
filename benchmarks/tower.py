"""Reduction in the tower: pixels to the first token, the tower by itself, and what choosing costs. Ratios are plain
over reduced.

The methods keep a share of the patches before the tower's first block; the decoder runs at 11 % beside it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from common import Options, side_by_side
from prefill import reader
from shapes import LLAVA, QWEN, TINY, TINY_QWEN, Shape, build, twin
from torch import nn

import duet_vlm
from duet_vlm.profiling.timing import PairedTiming, time_paired
from duet_vlm.runtime.vision_tower import tower_hooks, varlen

BUDGET, KEEPS = 0.11, (None, 0.56, 0.5, 0.4)
METHOD = "duet"
# 1,296 visual tokens, and a third of the work in the tower, as in a model of 7B
PAGE = replace(QWEN, side=36, hidden=1024, heads=16, kv_heads=2, mlp=4096, vision_hidden=384, vision_mlp=1024)
TARGETS = {("llava", 0.5): 3.0, ("llava", 0.4): 3.3, ("qwen2_5_vl", 0.5): 3.5}
CHOICE = 0.01  # of the whole tower


def run(options: Options) -> list[dict[str, Any]]:
    shapes = (TINY, TINY_QWEN) if options.quick else (LLAVA, PAGE)
    return [row for shape in shapes for row in _compare(options, shape)]


def name(shape: Shape, keep: float | None) -> str:
    return f"{shape.family}, {METHOD} at {BUDGET:.0%}" + ("" if keep is None else f", {keep:.0%} of the patches")


class Watch:
    """Seconds that the tower, and the choice in front of it, took in one call."""

    def __init__(self, model: nn.Module) -> None:
        core: Any = model.model
        part = core.visual if hasattr(core, "visual") else core.vision_tower
        self.seconds: dict[str, list[float]] = {"tower": [], "choice": []}
        part.register_forward_pre_hook(lambda *_: self.start("tower"), prepend=True)
        part.register_forward_hook(lambda *_: self.end("tower"))

    def start(self, name: str) -> None:
        self.seconds[name].append(-time.perf_counter())

    def end(self, name: str) -> None:
        self.seconds[name][-1] += time.perf_counter()

    def timing(self, name: str, last: int) -> PairedTiming:
        return PairedTiming(tuple(self.seconds[name][-last:]))


@contextlib.contextmanager
def watched_choice(watch: Watch) -> Iterator[None]:
    """The choice of units and their mass as part of the tower, timed by itself."""
    real = tower_hooks.select_patches

    def choose(*args: Any) -> Any:
        watch.start("choice")
        chosen = real(*args)
        watch.end("choice")
        return chosen

    tower_hooks.select_patches = varlen.select_patches = choose  # type: ignore[assignment]
    try:
        yield
    finally:
        tower_hooks.select_patches = varlen.select_patches = real  # type: ignore[assignment]


def _compare(options: Options, shape: Shape) -> list[dict[str, Any]]:
    plain = build(shape)
    twins = {name(shape, keep): (keep, twin(plain)) for keep in KEEPS}
    watches = {label: Watch(model) for label, (_, model) in twins.items()}
    whole = Watch(plain)  # after its twins, which would have taken over its hooks
    sides: dict[str, Callable[[], object]] = {"plain": reader(plain, shape, encoded=False)}
    reports: dict[str, Any] = {}
    with torch.inference_mode(), ExitStack() as attached:
        for label, (keep, model) in twins.items():
            settings = {} if keep is None else {"contrast_keep": keep}
            method = METHOD if keep is None else f"contrast+{METHOD}"
            handle = attached.enter_context(duet_vlm.attach(model, method, budget=BUDGET, **settings))
            sides[label] = _watched(reader(model, shape, encoded=False), watches[label])
            sides[label]()
            reports[label] = handle.report()
        times = time_paired(sides, options.repeats(7), warmup=1)
    rows = []
    last = len(times["plain"].seconds)
    for label, (keep, _) in twins.items():
        report, target = reports[label], TARGETS.get((shape.family, keep))
        found = side_by_side(
            f"{label}: pixels to first token",
            shape,
            times["plain"],
            times[label],
            predicted=report.full.flops / report.observed.flops,
        )
        if target is not None:
            found |= {"target": target, "met": found["median"] >= target}
        rows.append(found)
        if keep is None:
            continue
        stock, less = whole.timing("tower", last), watches[label].timing("tower", last)
        saved = report.full.vision_flops / report.observed.vision_flops
        rows.append(side_by_side(f"{label}: tower", shape, stock, less, predicted=saved))
        chosen = watches[label].timing("choice", last)
        rows.append(side_by_side(f"{label}: choice over the whole tower", shape, chosen, stock, CHOICE))
    return rows


def _watched(read: Callable[[], object], watch: Watch) -> Callable[[], object]:
    def go() -> object:
        with watched_choice(watch):
            return read()

    return go
