"""What every method costs by itself: the time spent in the library's own work in one call, over the full prefill.

Clocks stand around everything of ours that runs in a call: recording and reading signals, choosing and merging before
the decoder, cutting the prompt, ranking and dropping in front of decoder layers. What a rank stage computes and its
layer then takes over (norm and keys of the rows that are left) is counted here, too, so rows of methods that rank by
attention are upper bounds; ``t2v.py`` takes it apart. ``predicted`` is the report's FLOPs of ranking and selection over
those of the full prefill. The projector runs on all rows where a method reads projected rows (DivPrune) or sends
changed ones through it (ZOO-Prune): of that only what the method itself calls is timed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from common import Options, side_by_side
from prefill import reader
from shapes import LLAVA, TINY, WIDE, Shape, build, twin
from torch import nn

import duet_vlm
from duet_vlm.profiling.timing import PairedTiming, time_paired
from duet_vlm.reducers.inputs import Input
from duet_vlm.runtime.encode.attention_intercept import QKRecorder
from duet_vlm.runtime.encode.encoder import EncoderHooks
from duet_vlm.runtime.prefill import entry
from duet_vlm.runtime.prefill.layers import PrefillPass

FREE, MERGES, CHOOSES, RANKS = 0.01, 0.02, 0.03, 0.03
BUDGETS = (0.22, 0.33)  # the first that a method can reach
OURS: tuple[tuple[Any, str], ...] = (
    *((EncoderHooks, name) for name in ("after_attention", "after_block", "record_projector_args", "before_projector", "after_projector", "_store_result")),
    (QKRecorder, "on_attention"), (entry, "_prefill"), (PrefillPass, "at_layer"),
)  # fmt: skip


def run(options: Options) -> list[dict[str, Any]]:
    image = TINY if options.quick else replace(LLAVA, vision_layers=6)  # of the tower only what is recorded counts
    wide = replace(TINY, hidden=128) if options.quick else WIDE
    decoder = tuple(name for name in names() if issubclass(duet_vlm.list_methods()[name], duet_vlm.DecoderReducer))
    return [
        *_compare(options, image, names(), 7, "of the prefill"),
        *_compare(options, wide, decoder, 3, "of one layer, 4096 wide"),
    ]


def names() -> tuple[str, ...]:
    """Methods for pictures, in front of the decoder or inside it."""
    kinds = {
        name: kind
        for name, kind in duet_vlm.list_methods().items()
        if name != "none" and not issubclass(kind, duet_vlm.TowerReducer)
    }
    return tuple(name for name, kind in kinds.items() if not kind.compares_frames)


def _compare(options: Options, shape: Shape, methods: tuple[str, ...], pairs: int, unit: str) -> list[dict[str, Any]]:
    """All methods in turns with the plain prefill of an encoded image; methods that cannot run here are left out by
    their error."""
    plain = build(shape)
    clock, rows = Clock(), []
    of_layers = 1 if "prefill" in unit else shape.layers
    with torch.no_grad():  # a gradient inside the decoder needs more than inference mode
        full = reader(plain, shape, encoded=True)
        for method in methods:
            try:
                model = twin(plain)
                budget = reachable(model, method)
                with clock.watching(), duet_vlm.attach(model, method, budget=budget) as handle:
                    read = clock.around(reader(model, shape, encoded=False))
                    read()
                    times = time_paired({"full": full, "ours": read}, options.repeats(pairs), warmup=1)
                    report = handle.report()
                    kind = type(handle.reducer)
            except (duet_vlm.BudgetError, TypeError, ValueError) as error:
                rows.append({"name": f"{method}, {unit}", "status": "left out", "reason": str(error)})
                continue
            ours = PairedTiming(tuple(clock.spent[-len(times["full"].seconds) :]))
            layer = PairedTiming(tuple(seconds / of_layers for seconds in times["full"].seconds))
            cost = report.observed.ranking_flops + report.observed.selection_flops
            predicted = of_layers * cost / report.full.decoder_flops
            rows.append(
                side_by_side(
                    f"{method}, {unit}",
                    shape,
                    ours,
                    layer,
                    target(kind),
                    predicted=predicted,
                    budget=budget,
                    method=method,
                )
            )
    return rows


def target(kind: type[duet_vlm.Reducer]) -> float:
    decides = issubclass(kind, duet_vlm.DecoderReducer)
    if issubclass(kind, duet_vlm.EncoderReducer):
        return CHOOSES + (RANKS if decides else 0)
    return RANKS if Input.SCORES in kind.requires or not decides else MERGES if kind.merges else FREE


def reachable(model: nn.Module, method: str) -> float:
    """The first budget that a method can reach on a model."""
    for budget in BUDGETS[:-1]:
        with contextlib.suppress(duet_vlm.BudgetError), duet_vlm.attach(model, method, budget=budget):
            return budget
    return BUDGETS[-1]


class Clock:
    """Adds up the time inside functions, counting each moment once."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.depth = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as patches:
            for owner, name in OURS:
                patches.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def around(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call, whose part in our functions becomes one more entry of ``spent``."""

        def counted() -> object:
            self.spent.append(0.0)
            return call()

        return counted

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = time.perf_counter(), self.depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth and self.spent:
                    self.spent[-1] += time.perf_counter() - start

        return timed
