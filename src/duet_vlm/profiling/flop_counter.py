"""Measured costs: FLOPs that torch dispatched, rows at the input of each layer, bytes of the cache, memory of the
tensors."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MIB = 2**20


def _sdpa(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The CPU's fused attention, which torch's own counter does not know."""
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(
    gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _grouped(rows: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """[rows, in] x [experts, in, out], each row through one expert."""
    return 2 * rows[0] * rows[1] * weights[-1]


def _unknown_to_torch() -> dict[Any, Any]:
    aten = torch.ops.aten
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    counters = {fused: _sdpa, f"{fused}_backward": _sdpa_backward, "_grouped_mm": _grouped}
    return {getattr(aten, name): count for name, count in counters.items() if hasattr(aten, name)}


def count_flops(work: Callable[[], Any]) -> int:
    """Two per multiply-add of every matrix product that ``work`` dispatched, fused attention as the whole rectangle of
    queries by keys."""
    with FlopCounterMode(display=False, custom_mapping=_unknown_to_torch()) as counter:
        work()
    return counter.get_total_flops()


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of a cache: of keys and values, and of the states of linear layers. No device access."""
    pairs = [_bytes(getattr(layer, name, None)) for layer in cache.layers for name in ("keys", "values")]
    states = [
        _bytes(getattr(layer, name, None)) for layer in cache.layers for name in ("conv_states", "recurrent_states")
    ]
    return sum(pairs), sum(states)


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(_bytes(t) for t in (tensors.values() if isinstance(tensors, dict) else tensors or ()))


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU while ``work`` ran and its result was
    kept, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()  # noqa: F841 (alive until the last allocation is counted)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return [e["args"]["Bytes"] for e in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])]


def memory_of(work: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Bytes that tensors took beyond those before: at most while ``work`` ran, and at its end with its result still
    alive.

    Counted in the allocator: on CUDA by torch's own statistics, on a CPU by adding up the allocations in the profiler's
    trace.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()  # noqa: F841
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    sizes = allocations(work)
    return max(itertools.accumulate(sizes), default=0), sum(sizes)
