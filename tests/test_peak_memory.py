"""Peak memory of reading a prompt, seen in every allocation: reduction never needs more than the full model, and no map
of T x T is made."""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import duet_vlm
from duet_vlm.profiling.flop_counter import allocations

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from shapes import Shape, build, picture, prompt

WIDE = {
    "layers": 6,
    "hidden": 256,
    "heads": 4,
    "mlp": 704,
    "vision_layers": 3,
    "vision_mlp": 256,
    "side": 16,
    "text": 24,
    "vocab": 300,
}
SHAPES = {
    "llava": Shape(**WIDE, kv_heads=4, vision_hidden=128),
    # the decoder has the peak, as in large models
    "qwen2_5_vl": Shape(**WIDE, kv_heads=2, vision_hidden=64, family="qwen2_5_vl"),
}
# 1,024 patches: the tower has the peak
TOWER = Shape(**WIDE | {"vision_mlp": 512}, kv_heads=2, vision_hidden=128, family="qwen2_5_vl")
# compare every visual token of a span with many others: that table is the method
PAIRWISE = {"scope", "divprune", "duet_plus", "vispruner", "prumerge", "prumerge_plus", "tome"}
METHODS = sorted(set(duet_vlm.list_methods()) - {"none"})
QUICK = ("duet", "fastv", "scope")  # the others run under make test-all
EACH = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@functools.lru_cache(maxsize=4)
def model_of(shape: Shape) -> nn.Module:
    return build(shape)


def sizes(shape: Shape, method: str | None, budget: float | None = None) -> list[int]:
    """Every allocation and release of a prompt from pixels to its first logits, the second time that it is read."""
    model, inputs = model_of(shape), prompt(shape) | picture(shape)

    def work() -> Any:
        return model(**inputs, logits_to_keep=1, use_cache=True)

    with torch.inference_mode():
        if method is None:
            work()
            return allocations(work)
        with duet_vlm.attach(model, method, budget=budget):
            work()
            return allocations(work)


@functools.lru_cache(maxsize=64)
def peak(shape: Shape, method: str | None, budget: float | None = None) -> int:
    return max(itertools.accumulate(sizes(shape, method, budget)))


def test_the_profiler_sees_what_is_freed_again() -> None:
    """1 MiB beside 4 MiB that live for a moment, inside one operation's own scratch too."""
    kept = torch.ones(2**18)

    def work() -> torch.Tensor:
        more = kept + 1
        table = torch.ones(1024, 1024) @ torch.ones(1024, 1024)
        return more + table.sum()

    found = allocations(work)
    assert max(itertools.accumulate(found)) >= 13 * 2**20 and max(found) == 4 * 2**20


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("method", EACH)
def test_reduction_needs_no_more_than_the_full_model(family: str, method: str) -> None:
    shape = SHAPES[family]
    full, asked = peak(shape, None), 0
    # who is in whom, 33 tokens a row, weighs in rows as narrow as these
    most = 1.06 if method.startswith("prumerge") else 1.02
    for budget, allowed in ((0.95, most), (0.9, 1.0), (0.3, 1.0)):
        try:
            assert peak(shape, method, budget) <= allowed * full, budget
            asked += 1
        except duet_vlm.BudgetError:
            continue
    assert asked


def test_a_small_budget_saves_memory() -> None:
    assert peak(SHAPES["llava"], "duet", 0.22) < 0.75 * peak(SHAPES["llava"], None)


@pytest.mark.parametrize("method", ["duet", "visionzip", "fastv", "random"])
def test_where_the_tower_has_the_peak(method: str) -> None:
    """Some bytes of bookkeeping live through the tower, the choice among them."""
    assert peak(TOWER, method, 0.5) <= 1.001 * peak(TOWER, None)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [m for m in EACH if getattr(m, "values", [m])[0] not in PAIRWISE])
def test_no_allocation_of_prompt_by_prompt(family: str, method: str) -> None:
    """So narrow and so long that even a map of one byte per pair of rows would be the largest allocation by far."""
    side = 48 if family == "llava" else 24
    narrow = {
        "layers": 4,
        "hidden": 32,
        "heads": 2,
        "kv_heads": 2,
        "mlp": 48,
        "vision_layers": 2,
        "vision_hidden": 32,
        "vision_mlp": 48,
    }
    shape = Shape(family, **narrow, side=side, text=16, vocab=64)
    rows = side * side * (1 if family == "llava" else 4)  # of the tower: 2,304
    assert max(sizes(shape, method, 0.5)) < rows * rows
